"""What a run writes about itself: metrics.jsonl, TensorBoard events, config.json and eval/*.json.

`metrics.jsonl` is the source of truth, one JSON object a line: {"step": 100, "train/loss": 3.2}.
The workdir is a mounted folder; one process writes.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
import tensorboardX
import tensorboardX.summary
from tqdm import tqdm

_WORD = re.compile(r"[a-z0-9_-]+")


def say(text: str) -> None:
  """Shows a line to the person at the terminal, above any progress bar; once in a pod."""
  if jax.process_index() == 0:
    tqdm.write(text)
    sys.stdout.flush()


class Writers:
  """The files of one run, opened when something is written.

  Args:
    workdir: folder of the run, created if missing.
    active: False on processes that do not write; every method then only checks its arguments.
  """

  def __init__(self, workdir: str | pathlib.Path, *, active: bool = True):
    self.workdir = pathlib.Path(workdir)
    self._active = active
    self._first_step: int | None = None
    self._lines: TextIO | None = None
    self._events: tensorboardX.SummaryWriter | None = None
    if active:
      self.workdir.mkdir(parents=True, exist_ok=True)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line to metrics.jsonl and the finite numbers to the TensorBoard events.

    Args:
      step: the training step the values belong to.
      metrics: numbers, or arrays without axes, by `split/quantity_unit`.

    Raises:
      ValueError: a value is no number.
    """
    values = {name: _number(name, value) for name, value in metrics.items()}
    if not self._active:
      return
    if self._lines is None:
      path = self.workdir / "metrics.jsonl"
      _cut_torn_line(path)
      self._lines = path.open("a", encoding="utf-8")
    self._lines.write(dump({"step": int(step), **values}) + "\n")
    self._lines.flush()
    for name, value in values.items():
      if not isinstance(value, str):
        self._open_events().add_scalar(name, value, int(step))

  def truncate_after(self, step: int) -> None:
    """Drops what a killed run left behind: metrics of later steps and a torn last line."""
    if not self._active:
      return
    self.close()
    path = self.workdir / "metrics.jsonl"
    kept = [line for line in _read_lines(path) if line["step"] <= step]
    replace_file(path, "".join(dump(line) + "\n" for line in kept))
    self._first_step = step + 1  # TensorBoard hides older events from this step on

  def write_config(self, config: Mapping[str, Any]) -> None:
    """Writes config.json and shows the settings in TensorBoard's hyperparameter tab."""
    if not self._active:
      return
    replace_file(self.workdir / "config.json", dump(config, indent=2) + "\n")
    # The summaries go into this writer's own file: SummaryWriter.add_hparams would open a second
    # file, and TensorBoard then shows the run without its scalars.
    settings = {name: _setting(value) for name, value in _flatten(config)}
    file_writer = self._open_events().file_writer
    assert file_writer is not None
    for summary in tensorboardX.summary.hparams(settings, {}):
      file_writer.add_summary(summary)

  def write_evaluation(self, step: int, name: str, values: Mapping[str, Any]) -> pathlib.Path:
    """Writes eval/<step>-<name>.json.

    Args:
      step: the step that was evaluated.
      name: a plain word, such as `likelihood` or `zero_shot`.
      values: flat JSON values by name; NaN and the infinities become strings.

    Returns:
      The path of the file, which an inactive writer has not written.

    Raises:
      ValueError: `name` is no plain word, or a value is a mapping.
    """
    if not _WORD.fullmatch(name):
      raise ValueError(f"evaluation name {name!r} must consist of a-z, 0-9, _ and -")
    nested = [key for key, value in values.items() if isinstance(value, Mapping)]
    if nested:
      raise ValueError(f"evaluation {name}: {nested[0]} is a mapping; use flat names, a/b")
    path = self.workdir / "eval" / f"{int(step)}-{name}.json"
    if self._active:
      path.parent.mkdir(exist_ok=True)
      replace_file(path, dump({"step": int(step), **values}, indent=2) + "\n")
    return path

  def close(self) -> None:
    """Flushes and closes the files; a later write opens them again."""
    for file in (self._lines, self._events):
      if file is not None:
        file.close()
    self._lines = self._events = None

  def _open_events(self) -> tensorboardX.SummaryWriter:
    if self._events is None:
      # The default file name counts seconds, so that a second writer could overwrite the first.
      suffix = f".{time.time_ns()}"
      self._events = tensorboardX.SummaryWriter(
        str(self.workdir), purge_step=self._first_step, filename_suffix=suffix
      )
      self._first_step = None
    return self._events


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl in order, as dicts with `step`; [] where there is none.

  A torn last line is left out; NaN and the infinities are floats again.

  Raises:
    ValueError: a complete line is no JSON object with a step.
  """
  lines = _read_lines(pathlib.Path(workdir) / "metrics.jsonl")
  return [{k: float(v) if isinstance(v, str) else v for k, v in line.items()} for line in lines]


def read_config(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """config.json of a run, or None where there is none.

  Raises:
    ValueError: it is damaged.
  """
  path = pathlib.Path(workdir) / "config.json"
  if not path.exists():
    return None
  try:
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
      raise ValueError(f"it holds a {type(settings).__name__}, no object")
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({error}); delete it to go on with any config") from error
  return settings


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  lines = []
  complete = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
  for number, text in enumerate(complete, start=1):
    try:
      line = json.loads(text)
      int(line["step"])
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f"{path}:{number} is no JSON object with a step ({error}); repair or delete that line"
      ) from error
    lines.append(line)
  return lines


def _cut_torn_line(path: pathlib.Path) -> None:
  """Removes a last line that a killed process left without its newline."""
  if path.exists():
    raw = path.read_bytes()
    os.truncate(path, raw.rfind(b"\n") + 1)


def replace_file(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader sees the old one or the new one, never a part."""
  partial = path.with_name(path.name + ".partial")
  with partial.open("w", encoding="utf-8") as stream:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())
  os.replace(partial, path)


def dump(value: Any, indent: int | None = None) -> str:
  """JSON text of a value; JSON has no NaN or infinity, so those become "nan", "inf", "-inf"."""
  return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _number(name: str, value: Any) -> Any:
  """A Python number, or the name of a number that is not finite."""
  value = _plain(value)
  is_number = isinstance(value, int | float) or value in ("nan", "inf", "-inf")
  if not is_number:
    raise ValueError(f"metric {name} is {value!r}; a metric is one number")
  return value


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _setting(value: Any) -> Any:
  return value if isinstance(value, bool | int | float | str) else str(value)
