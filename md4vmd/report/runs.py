"""Runs as they lie on the disk: what was set, trained and measured. No file is trusted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from md4vmd import writers

_NOT_RUNS = {"checkpoints", "samples", "eval"}
_EVALUATION = re.compile(r"(\d{1,15})-([a-z0-9_-]+)\.json")
# What a file that is not what a run wrote can raise.
_DAMAGE = (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError)
_FEWEST_POINTS = 8  # of the last half of a curve, for its noise
_LARGEST = 1e100  # no figure of a run is larger, and plots overflow


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    name: its folder, from the folder of the report.
    settings: values of the config by dotted key.
    lines: metrics by step, in order.
    evaluations: records by evaluator and step.
  """

  name: str
  settings: dict[str, Any]
  lines: list[dict[str, Any]]
  evaluations: dict[str, dict[int, dict[str, Any]]]

  def series(self, metric: str) -> list[tuple[int, float]]:
    """(step, value) wherever the metric is a finite number, in the order of the steps."""
    points = [(int(line["step"]), number(line.get(metric))) for line in self.lines]
    return sorted((step, value) for step, value in points if value is not None)

  @property
  def steps(self) -> int | None:
    """The last step that was trained, as the metrics say."""
    return max((int(line["step"]) for line in self.lines), default=None)

  @property
  def tokens_per_second(self) -> float | None:
    """Median over the run of scored training tokens per second."""
    rates = [rate for _, rate in self.series("train/tokens_per_second")]
    return statistics.median(rates) if rates else None

  @property
  def parameters(self) -> float | None:
    """Number of parameters, where an evaluation recorded it."""
    counts = [number(record.get("parameters")) for _, record in self.newest().values()]
    return next((count for count in counts if count is not None), None)

  @property
  def noise_bits(self) -> float | None:
    """Standard deviation of one step's training bound around its curve, in bits per token.

    Point i is the mean of n_i steps, so its variance is v / n_i. It is compared with the mean of
    its neighbours, which stands for the smoothed curve: the difference has the variance
    v (1/n_i + (1/n_{i-1} + 1/n_{i+1}) / 4). The estimate of v is the mean, over the last half of
    the run, of the squared difference by that factor (Gasser, Sroka and Jennen-Steinmetz 1986).
    """
    points = self.series("train/nelbo_bits_per_token")
    spans = [step - before for (before, _), (step, _) in itertools.pairwise(points)]
    points = points[1:][len(points) // 2 :]
    spans = spans[len(spans) - len(points) :]
    if len(points) < _FEWEST_POINTS or min(spans) < 1:
      return None
    squares = []
    for i in range(1, len(points) - 1):
      difference = points[i][1] - (points[i - 1][1] + points[i + 1][1]) / 2
      factor = 1 / spans[i] + (1 / spans[i - 1] + 1 / spans[i + 1]) / 4
      squares.append(difference * difference / factor)
    return number(math.sqrt(statistics.fmean(squares)))

  def newest(self) -> dict[str, tuple[int, dict[str, Any]]]:
    """(step, record) of the newest evaluation by every evaluator."""
    return {name: max(by_step.items()) for name, by_step in self.evaluations.items()}

  def bounds(self) -> list[tuple[int, float, float | None]]:
    """(step, bits per token, standard error) of every evaluation of the bound."""
    found = []
    for step, record in sorted(self.evaluations.get("likelihood", {}).items()):
      for name in record:
        if name.endswith("/nelbo_bits_per_token") and (bits := number(record[name])) is not None:
          found.append((step, bits, number(record.get(f"{name}_standard_error"))))
    return found


def number(value: Any) -> float | None:
  """The float of a JSON number, or None where it is none, not finite or absurdly large."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return float(value) if abs(value) < _LARGEST else None


def printable(text: Any) -> str:
  """Text on one line without control characters."""
  return "".join(c if c.isprintable() else " " for c in str(text))


def find_runs(folder: pathlib.Path) -> tuple[list[Run], list[str]]:
  """Every run in a folder and below, and a line for each file that cannot be read.

  A run is a folder with a config.json or a metrics.jsonl. Links to folders are not followed.

  Raises:
    ValueError: there is no run.
  """
  runs, complaints = [], []
  for parent, folders, files in os.walk(folder):
    folders[:] = [name for name in folders if name not in _NOT_RUNS and name[0] != "."]
    if "config.json" in files or "metrics.jsonl" in files:
      runs.append(_read_run(folder, pathlib.Path(parent), complaints))
  if not runs:
    raise ValueError(
      f"there is no run in {folder}: a run has a config.json or a metrics.jsonl; give the folder "
      "of one run or of several with --workdir"
    )
  return sorted(runs, key=lambda run: _natural(run.name)), sorted(complaints)


def _read_run(folder: pathlib.Path, path: pathlib.Path, complaints: list[str]) -> Run:
  def attempt(file: pathlib.Path, read: Callable[[], Any], otherwise: Any) -> Any:
    try:
      if file.exists() and not file.is_file():
        raise ValueError("no plain file")
      return read()
    except _DAMAGE as error:
      reason = printable(error)[:200] or type(error).__name__
      complaints.append(f"skipped {printable(file.relative_to(folder))}: {reason}")
      return otherwise

  evaluations: dict[str, dict[int, dict[str, Any]]] = {}
  for file in sorted(path.glob("eval/*.json")):
    if match := _EVALUATION.fullmatch(file.name):
      record = attempt(file, lambda file=file: _object(file), None)
      if record is not None:
        evaluations.setdefault(match[2], {})[int(match[1])] = record
  config, metrics = path / "config.json", path / "metrics.jsonl"
  return Run(
    name=printable(path.relative_to(folder)) if path != folder else printable(path.name),
    settings=attempt(config, lambda: dict(_leaves(_object(config))) if config.exists() else {}, {}),
    lines=attempt(metrics, lambda: _metrics(path), []),
    evaluations=evaluations,
  )


def _object(file: pathlib.Path) -> dict[str, Any]:
  value = json.loads(file.read_text(encoding="utf-8"))
  if not isinstance(value, dict):
    raise ValueError("no JSON object")
  writers.dump(value).encode()  # what cannot be written again is damaged too
  return value


def _metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  lines = writers.read_metrics(path)
  for line in lines:
    if number(line["step"]) is None:
      raise ValueError(f"{line['step']!r} is no step")
  return lines


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, inner in value.items():
    if isinstance(inner, Mapping):
      yield from _leaves(inner, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", inner


def _natural(name: str) -> list[tuple[bool, Any]]:
  """A sort key in which 8 comes before 64."""
  parts = [part for part in re.split(r"([0-9]{1,15})", name) if part]
  return [(True, int(part)) if part[0] in "0123456789" else (False, part) for part in parts]
