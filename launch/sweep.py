"""Runs a grid over config keys, one workdir per cell; given again, it goes on where it stopped.

  python launch/sweep.py --config=configs/text8.py --set data.path=text8 --folder=runs/sweep \\
    --grid schedule.name=linear,cosine \\
    --grid objective.estimator=count,time,steps+objective.steps=64

runs 2 x 3 cells, among them runs/sweep/schedule.name=linear,objective.estimator=count. An axis is a
key and its values with commas between them. `+key=value` after a value sets a further key in that
value's cells alone: above, objective.steps where the estimator is 'steps'. A comma inside brackets
separates nothing: objective.step_counts=(8,16),(32,64) has two values. The last axis runs fastest.

Every cell is `python -m md4vmd.main` in its own workdir, with its output in log.txt there. All keys
and types are checked before the first one starts. A cell is finished once its command has ended
well with the config as it is now, and its newest checkpoint is still that of then; anything else is
started again, and training continues from its checkpoint. A cell that fails does not stop the
others. Ctrl-C or SIGTERM lets the running cells save their state. Two sweeps of one folder, on one
machine or several with a shared disk, share out its cells.

Exit status: 0, or 1 if a cell failed, or 42 if cells were stopped with their state saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from absl import flags
from ml_collections import config_flags

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from md4vmd import main as command_line  # noqa: E402

STOPPED = 42  # what the trainer ends with once it was stopped and has saved its state
_LONGEST_NAME = 200  # of a folder; file systems allow 255 bytes
_TAIL = 2**16  # bytes of a log in which the error is looked for


@dataclasses.dataclass(frozen=True)
class Cell:
  """One point of the grid.

  Attributes:
    name: its settings as the name of a folder.
    workdir: that folder.
    command: what runs it.
    config: its config as nested dicts.
  """

  name: str
  workdir: pathlib.Path
  command: list[str]
  config: dict[str, Any]


@dataclasses.dataclass
class Running:
  """A cell that runs; its open log holds the lock on the workdir."""

  cell: Cell
  process: subprocess.Popen
  log: BinaryIO
  began: float


def parse_axis(text: str) -> list[dict[str, str]]:
  """The settings of each value of `key=value,value+key=value`.

  Raises:
    ValueError: no key or no value.
  """
  key, _, values = text.partition("=")
  points = [_settings(f"{key}={value}") for value in _split_at_commas(values)]
  if not re.fullmatch(r"\w+(\.\w+)*", key) or not all(point[key] for point in points):
    raise ValueError(f"--grid '{text}' must be like schedule.name=linear,cosine")
  return points


def _settings(text: str) -> dict[str, str]:
  """{key: value} of `key=value+key=value`."""
  parts = re.split(r"\+(?=[A-Za-z_][\w.]*=)", text)
  pairs = [part.partition("=") for part in parts]
  return _merge({key: value} for key, _, value in pairs)


def _split_at_commas(text: str) -> list[str]:
  """Cuts at the commas that stand outside of brackets."""
  pieces, depth = [""], 0
  for letter in text:
    depth += (letter in "([") - (letter in ")]")
    if letter == "," and depth == 0:
      pieces.append("")
    else:
      pieces[-1] += letter
  return pieces


def _merge(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
  merged: dict[str, str] = {}
  for part in parts:
    for key in part:
      if key in merged:
        raise ValueError(f"'{key}' is set twice in one cell; name it in one --grid or --set only")
    merged |= part
  return merged


def folder_name(settings: Mapping[str, str]) -> str:
  """`key=value,key=value` as one safe folder name; what had to be changed is told by a hash."""
  plain = ",".join(f"{key}={value}" for key, value in settings.items())
  safe = re.sub(r"[^A-Za-z0-9_.,=+-]", "-", plain)[:_LONGEST_NAME]
  return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def load_config(config: str, settings: Mapping[str, str]) -> dict[str, Any]:
  """The config with these settings, as nested dicts.

  Raises:
    Exception: of ml_collections, for a key or a value that does not fit.
  """
  arguments = [f"--config={config}", *_overrides(settings)]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", lock_config=True, flag_values=values, sys_argv=["sweep", *arguments]
  )
  values(["sweep", *arguments])
  loaded: Any = values["config"].value
  return json.loads(json.dumps(loaded.to_dict()))


def _overrides(settings: Mapping[str, str]) -> list[str]:
  return [f"--config.{key}={value}" for key, value in settings.items()]


def make_cells(args: argparse.Namespace) -> list[Cell]:
  """Every cell of the grid, its config loaded.

  Raises:
    ValueError: a cell that is there twice, or a key that is set twice.
  """
  base = _merge(_settings(text) for text in args.set)
  cells: dict[str, Cell] = {}
  for point in itertools.product(*map(parse_axis, args.grid)):
    settings = _merge(point)
    name, everything = folder_name(settings), _merge([base, settings])
    if name in cells:
      raise ValueError(f"the grid has the cell {name} twice")
    workdir = args.folder / name
    command = [sys.executable, "-m", "md4vmd.main", f"--config={args.config}"]
    command += [f"--mode={args.mode}", f"--workdir={workdir}", *_overrides(everything)]
    cells[name] = Cell(name, workdir, command, load_config(args.config, everything))
  return list(cells.values())


class Sweep:
  """The cells, and which of them are finished, running, failed or stopped.

  Args:
    cells: the grid.
    mode: the job of every cell.
    jobs: cells that run at a time; they share the machine and its devices.
  """

  def __init__(self, cells: list[Cell], mode: str, jobs: int):
    self.cells, self.mode, self.jobs = cells, mode, jobs
    self.running: list[Running] = []
    self.failed: list[Cell] = []
    self.stopped: list[Cell] = []
    self.is_stopping = False

  def is_finished(self, cell: Cell) -> bool:
    """Whether the job has ended well with this config on the checkpoint that is there now."""
    try:
      record = json.loads(self._record(cell).read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return False
    step = newest_checkpoint(cell.workdir)
    return step is not None and record == {"step": step, "config": cell.config}

  def run(self) -> int:
    """Runs what is not finished; returns the exit status."""
    waiting = iter(enumerate(self.cells, start=1))
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, self._stop) for number in signals]
    try:
      self._fill(waiting)
      while self.running:
        time.sleep(0.1)
        for running in [each for each in self.running if each.process.poll() is not None]:
          self._end(running)
        self._fill(waiting)
    finally:
      for number, handler in zip(signals, before, strict=True):
        signal.signal(number, handler)
    return 1 if self.failed else STOPPED if self.stopped or self.is_stopping else 0

  def _fill(self, waiting: Iterator[tuple[int, Cell]]) -> None:
    """Starts cells until as many run as may."""
    while not self.is_stopping and len(self.running) < self.jobs:
      number, cell = next(waiting, (0, None))
      if cell is None:
        return
      done = self._start(cell)
      print(f"[{number}/{len(self.cells)}] {done}  {cell.name}", flush=True)

  def _start(self, cell: Cell) -> str:
    """Starts a cell unless it is finished or runs elsewhere; says which."""
    cell.workdir.mkdir(parents=True, exist_ok=True)
    log = (cell.workdir / "log.txt").open("ab")
    try:
      # The process inherits the lock, so that it outlives a sweep that is killed.
      fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log.close()
      return "runs in another sweep"
    if self.is_finished(cell):
      log.close()
      return "finished before"
    log.write(f"$ {shlex.join(cell.command)}\n".encode())
    log.flush()
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
      cell.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
      start_new_session=True,  # Ctrl-C goes to the sweep alone, which asks the cells to save
    )
    self.running.append(Running(cell, process, log, time.monotonic()))
    if self.is_stopping:  # a signal came while the cell was being started, and missed it
      process.send_signal(signal.SIGTERM)
    return "start"

  def _end(self, running: Running) -> None:
    """Records how a cell ended."""
    cell, status = running.cell, running.process.returncode
    self.running.remove(running)
    took = f"{time.monotonic() - running.began:.0f} s"
    step = newest_checkpoint(cell.workdir)
    if status == 0:
      partial = cell.workdir / "sweep.partial"
      partial.write_text(json.dumps({"step": step, "config": cell.config}), encoding="utf-8")
      partial.replace(self._record(cell))
      print(f"done in {took}  {cell.name}", flush=True)
    elif status == STOPPED or self.is_stopping:
      self.stopped.append(cell)
      print(f"stopped, newest checkpoint at step {step}  {cell.name}", flush=True)
    else:
      self.failed.append(cell)
      log = cell.workdir / "log.txt"
      print(f"failed after {took}  {cell.name}\n  {last_error(log)}\n  {log}", flush=True)
    running.log.close()

  def _stop(self, *_: Any) -> None:
    """On a signal: the running cells save and end, no other starts; on a second one they die."""
    for running in self.running:
      running.process.send_signal(signal.SIGKILL if self.is_stopping else signal.SIGTERM)
    if not self.is_stopping:
      print(f"stopping {len(self.running)} cells; a second time kills them", flush=True)
    self.is_stopping = True

  def _record(self, cell: Cell) -> pathlib.Path:
    return cell.workdir / f"sweep-{self.mode}.json"


def newest_checkpoint(workdir: pathlib.Path) -> int | None:
  """The newest step in checkpoints/, or None."""
  names = [path.name for path in (workdir / "checkpoints").glob("*") if path.is_dir()]
  return max((int(name) for name in names if name.isascii() and name.isdigit()), default=None)


def last_error(log: pathlib.Path) -> str:
  """The last line of a log that begins with `error:`, or the last line that is not empty."""
  with log.open("rb") as file:
    file.seek(max(0, log.stat().st_size - _TAIL))
    text = file.read().decode(errors="replace")
  last_run = re.split(r"^\$ ", text, flags=re.MULTILINE)[-1]
  lines = [re.sub(r"[^ -~\u00a0-\uffff]", "", line) for line in last_run.splitlines()[1:]]
  errors = [line for line in lines if line.startswith("error:")]
  return next(reversed(errors or list(filter(str.strip, lines))), "no output")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--config", required=True, help="config file, with a variant after a colon")
  add("--grid", action="append", required=True, metavar="KEY=VALUE,...", help="an axis; repeat it")
  add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all cells")
  add("--folder", required=True, type=pathlib.Path, help="where the workdirs of the cells are")
  add("--mode", choices=("train", "evaluate", "sample"), default="train", help="job of every cell")
  add("--jobs", type=int, default=1, help="cells at a time, on the same devices")
  add("--dry-run", action="store_true", help="show the commands and start nothing")
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs the sweep of a command line; returns the exit status."""
  args = _parser().parse_args(argv)
  try:
    if args.jobs < 1:
      raise ValueError(f"--jobs is {args.jobs}; it must be at least 1")
    command_line.find_config(args.config.partition(":")[0])
    cells = make_cells(args)
  except Exception as error:  # a config may raise anything
    print(f"error: {command_line.explain(error)}", file=sys.stderr)
    return 1
  sweep = Sweep(cells, args.mode, args.jobs)
  if args.dry_run:
    for cell in cells:
      print(f"{'# finished: ' if sweep.is_finished(cell) else ''}{shlex.join(cell.command)}")
    return 0
  status = sweep.run()
  finished = sum(map(sweep.is_finished, cells))
  print(f"{finished} of {len(cells)} cells are finished, {len(sweep.failed)} failed")
  print(f"Compare: python -m md4vmd.main --mode=report --workdir={shlex.quote(str(args.folder))}")
  return status


if __name__ == "__main__":
  sys.exit(main())
