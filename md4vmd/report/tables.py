"""Tables of runs: cells of text, the same for the terminal, Markdown and HTML."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from md4vmd.report.runs import Run, number, printable

NOTHING = "–"
_LONGEST_VALUE = 48
_ERROR = "_standard_error"
_ABOUT = ("step", "seed", "parameters")  # numbers of a record that are no figures

NOISE = (
  "The noise is the standard deviation of the training bound of one step around its smoothed "
  "curve, over the last half of the run: each logged point against the mean of its two neighbours, "
  "with the number of steps that each point averages taken into account. It is a spread over "
  "batches, so it holds the noise of the estimator (times and masks) and that of the data in a "
  "batch, and it falls as the batch grows: compare runs of one batch size on one data set."
)


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells of text under a title.

  Attributes:
    title: what the table is.
    header: names of the columns; the first is the run.
    rows: one list of cells per run.
    note: what the figures are, in words; "" for nothing to say.
  """

  title: str
  header: list[str]
  rows: list[list[str]]
  note: str = ""


def differing(runs: Sequence[Run]) -> list[str]:
  """The settings in which the runs differ, in the order of their configs."""
  keys = dict.fromkeys(key for run in runs for key in run.settings)
  return [key for key in keys if len({_canonical(run.settings.get(key)) for run in runs}) > 1]


def labels(runs: Sequence[Run]) -> list[str]:
  """A short name for each run: the values in which it differs if they tell it apart."""
  keys = differing(runs)
  short = [", ".join(filter(None, (_word(key, run) for key in keys))) for run in runs]
  is_short = len(set(short)) == len(runs) and max(map(len, short)) <= _LONGEST_VALUE
  return short if is_short and all(short) else [run.name for run in runs]


def main_table(runs: Sequence[Run]) -> Table:
  """Settings that differ, and what every run has: steps, speed, bound, noise."""
  keys = differing(runs)
  measures: dict[str, Callable[[Run], str]] = {
    "steps": lambda run: _count(run.steps),
    "parameters": lambda run: _count(run.parameters),
    "tokens/s": lambda run: _count(run.tokens_per_second),
    "bound, bits/token": lambda run: with_error(*run.bounds()[-1][1:]) if run.bounds() else NOTHING,
    "at step": lambda run: _count(run.bounds()[-1][0]) if run.bounds() else NOTHING,
    "training noise, bits/token": lambda run: _figure(run.noise_bits),
  }
  rows = [
    [run.name]
    + [_setting(run.settings.get(key)) for key in keys]
    + [measure(run) for measure in measures.values()]
    for run in runs
  ]
  header = ["run", *(printable(key).removesuffix(".name") for key in keys), *measures]
  return Table("Runs", header, rows, f"The bound is that of the newest evaluation. {NOISE}")


def over_seeds(runs: Sequence[Run]) -> Table | None:
  """Mean and spread of the bound over runs that differ in their seed alone, or None.

  The bound of a run is its newest one, and bounds of the same step are averaged. Of several runs
  with one seed that have one, the first by name counts.
  """
  keys = [key for key in differing(runs) if key != "seed"]
  groups: dict[tuple[str, int], dict[str, Run]] = {}
  for run in runs:
    if run.bounds():
      values = _canonical({key: run.settings.get(key) for key in keys})
      by_seed = groups.setdefault((values, run.bounds()[-1][0]), {})
      by_seed.setdefault(_canonical(run.settings.get("seed")), run)
  rows = []
  for (_, step), by_seed in groups.items():
    group = list(by_seed.values())
    bits = [run.bounds()[-1][1] for run in group]
    if len(bits) > 1:
      settings = ", ".join(
        f"{printable(key)}={_setting(group[0].settings.get(key))}" for key in keys
      )
      spread = statistics.stdev(bits)
      mean = with_error(statistics.fmean(bits), spread / math.sqrt(len(bits)))
      rows.append([settings or "all", str(len(bits)), _count(step), mean, _figure(spread)])
  if not rows:
    return None
  header = ["settings", "seeds", "at step", "mean bound, bits/token", "deviation between seeds"]
  return Table("Over seeds", header, rows, "The error of the mean is that of the seeds.")


def evaluator_tables(runs: Sequence[Run]) -> list[Table]:
  """One table per evaluator: the figures of its newest evaluation of every run."""
  tables = []
  for evaluator in dict.fromkeys(name for run in runs for name in sorted(run.evaluations)):
    newest = [run.newest().get(evaluator, (None, {})) for run in runs]
    names = dict.fromkeys(
      name
      for _, record in newest
      for name in record
      if number(record[name]) is not None and name not in _ABOUT and not name.endswith(_ERROR)
    )
    names = [name for name in names if not _is_told_in_bits(name, names)]
    rows = [
      [label, _count(step)]
      + [with_error(number(record.get(name)), number(record.get(name + _ERROR))) for name in names]
      for label, (step, record) in zip(labels(runs), newest, strict=True)
    ]
    said = dict.fromkeys(
      str(record["convention"]) for _, record in newest if "convention" in record
    )
    note = "; or: ".join(map(printable, said))
    header = ["run", "at step", *map(printable, names)]
    tables.append(Table(evaluator, header, rows, note))
  return tables


def with_error(value: float | None, error: float | None = None) -> str:
  """`1.2345 ± 0.0012`: as many decimals as the error's second digit needs."""
  if value is None or error is None or error <= 0:
    return _figure(value)
  decimals = min(8, max(0, 1 - math.floor(math.log10(error))))
  return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _is_told_in_bits(name: str, names: Any) -> bool:
  """Whether a figure in nats or per another unit stands beside itself in bits per token."""
  in_bits = name.replace("_nats_per_token", "_bits_per_token")
  for unit in ("character", "dim"):
    in_bits = in_bits.replace(f"_bits_per_{unit}", "_bits_per_token")
  return in_bits != name and in_bits in names


def _word(key: str, run: Run) -> str:
  """A setting where it needs no context: a name as it is, a number with its key."""
  value = run.settings.get(key)
  name = "" if isinstance(value, str) else f"{printable(key.split('.')[-1])}="
  return "" if value is None else f"{name}{_setting(value)}"


def _canonical(value: Any) -> str:
  return json.dumps(value, sort_keys=True)


def _setting(value: Any) -> str:
  text = NOTHING if value is None else value if isinstance(value, str) else json.dumps(value)
  text = printable(text)
  return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _figure(value: float | None) -> str:
  return NOTHING if value is None else f"{value:.4g}"


def _count(value: float | None) -> str:
  return NOTHING if value is None else f"{value:,.0f}"
