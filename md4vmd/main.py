"""The command line: `python -m md4vmd.main --config=configs/quickstart.py`."""

from __future__ import annotations

import difflib
import pathlib
import re
import signal
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from md4vmd import host_memory

MODES = ("train", "evaluate", "sample", "export", "report")

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, with a variant after a colon: configs/sudoku.py:9x9.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run, runs/<config>-<variant> by default; of all runs in --mode=report, runs.",
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; report needs no --config.")
_STEP = flags.DEFINE_string(
  "step", "latest", "Checkpoint to evaluate, sample or export: latest, best or a number."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show where in the code an error arose.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "Of a run of several processes: HOST:PORT that process 0 opens; auto lets jax find it, as on a "
  "TPU VM; none is a run by itself. SLURM steps and TPU slices on GKE need no such flag.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: how many there are.")
_PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: which one this is, from 0.")

_UNSET = re.compile(r"--config\.(.+)=None")  # flags of numbers and Booleans take no None


def default_workdir(config_flag: str) -> pathlib.Path:
  """runs/<config>-<variant> of a --config value; the variant of a plain config is "default"."""
  path, _, variant = config_flag.partition(":")
  variant = re.sub(r"[^A-Za-z0-9_.-]+", "-", variant) or "default"
  return pathlib.Path("runs") / f"{pathlib.Path(path).stem}-{variant}"


# What a user can mend by what the error says; any other one shows where it comes from.
_EXPLAINED = (ValueError, OSError, ArithmeticError)


def _folder(name: str) -> pathlib.Path:
  if "://" in name:
    raise ValueError(
      f"--workdir={name} is an address; give a folder that every process has mounted"
    )
  return pathlib.Path(name)


def main(argv: list[str]) -> None:
  """Runs the job that --mode names."""
  if argv[1:]:
    raise ValueError(f"unknown argument '{argv[1]}'; options start with --")
  # Imported here, so that a mistyped option is answered at once.
  if _MODE.value == "report":
    from md4vmd import report

    report.report(_folder(_WORKDIR.value or "runs"))
    return
  from md4vmd import evaluate, export, processes, sample, train

  processes.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  config = _CONFIG.value
  flag = config_flags.get_config_filename(flags.FLAGS["config"])
  workdir = _folder(_WORKDIR.value) if _WORKDIR.value else default_workdir(flag)
  if _MODE.value == "train":
    if not processes.name():  # in a pod jax's service takes it, for the training to ask about
      signal.signal(signal.SIGTERM, _on_term)
    train.train(config, workdir)
    processes.end_on_term()
    for job in config.run.then:
      {"evaluate": evaluate.evaluate, "sample": sample.sample}[job](config, workdir)
    return
  processes.end_on_term()
  jobs = {"evaluate": evaluate.evaluate, "sample": sample.sample, "export": export.export}
  jobs[_MODE.value](config, workdir, _STEP.value)


def _on_term(*_: Any) -> None:
  """Ends a training command outside its steps, which note SIGTERM themselves."""
  from md4vmd import train

  print("Stopped on SIGTERM; the same command goes on from what is saved.", flush=True)
  raise train.Preempted


def _parse(argv: list[str]) -> list[str]:
  """Parses the command line; what is wrong with it becomes one line."""
  try:
    for argument in argv:
      if argument.startswith("--config="):
        find_config(argument.partition("=")[2].partition(":")[0])
    rest = flags.FLAGS([argument for argument in argv if not _UNSET.fullmatch(argument)])
    if not re.fullmatch(r"latest|best|\d+", _STEP.value):
      raise ValueError(f"--step={_STEP.value} must be latest, best or the number of a checkpoint")
    if _CONFIG.value is None and _MODE.value != "report":
      raise ValueError("no --config given; try --config=configs/quickstart.py")
    for unset in filter(None, map(_UNSET.fullmatch, argv)):
      _leave_at_default(_CONFIG.value, unset[1])
    return rest
  except (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
    _fail(error)


def _leave_at_default(config: Any, name: str) -> None:
  """Sets a key to None, which leaves it at the default of what is built from its section."""
  *sections, key = name.split(".")
  section = config
  for each in sections:
    section = section[each]
  whole = (ConfigDict, tuple)
  if not sections or not isinstance(section, ConfigDict) or isinstance(section[key], whole):
    raise ValueError(f"config.{name} has no default that None could stand for; give a value")
  section[key] = None


def find_config(name: str) -> None:
  """Puts the folder that holds `configs` on the import path, for configs import configs.common.

  Raises:
    ValueError: there is no such file.
  """
  path = pathlib.Path(name).resolve()
  if not path.is_file():
    others = [other.name for other in path.parent.glob("*.py") if not other.name.startswith("_")]
    close = difflib.get_close_matches(path.name, others, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"there is no config file {name}{hint}")
  sys.path.insert(0, str(path.parent.parent))


# How absl and Python say it, and how we do.
_IN_PLAIN_WORDS = {
  r"\('Non-boolean argument to boolean flag', (.*)\)": r"\1 is neither true nor false",
  r"invalid literal for int\(\) with base 10: (.*)": r"\1 is no whole number",
  r"could not convert string to float: (.*)": r"\1 is no number",
  r"get_config\(\) takes 0 positional .*": "this config has no variants; leave out the colon",
}


def explain(error: BaseException) -> str:
  """One line that says what is wrong, of an error of a config, its overrides or a job."""
  while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps its errors
    error = error.args[0]
  text = str(error)
  if isinstance(error, KeyError) and error.args:  # of an override, by ml_collections
    text = f"the config has no {error.args[0]}".replace("\nDid you", "; did you")
  for theirs, ours in _IN_PLAIN_WORDS.items():
    text = re.sub(theirs, ours, text)
  lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
  if any(line.startswith("Traceback") for line in lines):  # of a config that raised
    lines = [lines[-1].partition(": ")[2]]
  return " ".join(lines) or type(error).__name__


def _fail(error: BaseException) -> NoReturn:
  """Prints one line for the user and leaves with status 1."""
  if _shows_traceback():
    raise error
  print(f"error: {explain(error)}", file=sys.stderr)
  sys.exit(1)


def _shows_traceback() -> bool:
  return any(re.fullmatch(r"--traceback(=true|=1)?", argument) for argument in sys.argv)


def _run(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax narrates every save at INFO
  try:
    main(argv)
  except (Exception, KeyboardInterrupt) as error:
    _leave_the_others(error)
    if isinstance(error, _EXPLAINED):
      _fail(error)
    if isinstance(error, KeyboardInterrupt) and not _shows_traceback():
      print("error: interrupted", file=sys.stderr)
      sys.exit(128 + signal.SIGINT)
    raise


def _leave_the_others(error: BaseException) -> None:
  """Ends this process if it is one of several; returns if it is alone."""
  processes = sys.modules.get("md4vmd.processes")  # not imported before the command line is right
  if processes is not None and processes.name():
    # RuntimeError is jax's too, where another process is gone or memory is short.
    expected = (*_EXPLAINED, RuntimeError, KeyboardInterrupt)
    if _shows_traceback() or not isinstance(error, expected):
      traceback.print_exception(error)
    processes.leave(error, explain(error))


def entry() -> None:
  """Entry point of the command."""
  host_memory.keep()
  app.run(_run, flags_parser=_parse)


if __name__ == "__main__":
  entry()
