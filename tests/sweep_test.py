"""The sweep: its grid, what it answers before it starts, and which cells it runs again."""

import ast
import dataclasses
import fcntl
import json
import pathlib
import signal
import subprocess
import sys

import pytest

from launch import sweep

SYNTHETIC = str(pathlib.Path(__file__).parent.parent / "configs/synthetic.py")

# Stand-ins for the trainer, which takes seconds to start; {step} is the checkpoint they leave.
SUCCEED = "import pathlib; pathlib.Path('{workdir}/checkpoints/{step}').mkdir(parents=True)"
FAIL = "print('error: the first mistake'); print('error: the value is wrong'); print(); exit(1)"
STOP = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
os.kill(os.getppid(), signal.SIGTERM)
signal.pause()
"""

SLEEP = "import time; time.sleep(20)"


@pytest.mark.parametrize(
  ("text", "points"),
  [
    ("a.b=1", [{"a.b": "1"}]),
    ("a.b=1,2.5,1e+3", [{"a.b": "1"}, {"a.b": "2.5"}, {"a.b": "1e+3"}]),
    ("a=x,y+b.c=3+d=4", [{"a": "x"}, {"a": "y", "b.c": "3", "d": "4"}]),
    ("a=(1,2),((1,2),(3,4))", [{"a": "(1,2)"}, {"a": "((1,2),(3,4))"}]),
    ("a=b=c", [{"a": "b=c"}]),
  ],
)
def test_an_axis_is_a_key_its_values_and_what_comes_with_them(text, points):
  assert sweep.parse_axis(text) == points


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=1,", "a b=1", "../a=1"])
def test_an_axis_without_a_key_or_a_value_is_refused(text):
  with pytest.raises(ValueError, match="must be like schedule"):
    sweep.parse_axis(text)


def test_a_folder_name_is_one_plain_name_and_tells_settings_apart():
  assert sweep.folder_name({"a.b": "1e-3", "c": "x"}) == "a.b=1e-3,c=x"
  odd = ["../../x", "..-..-x", "a b", "a\nb", "a" * 300, "a" * 301, "~", "", "ä"]
  names = [sweep.folder_name({"key": value}) for value in odd]
  assert len(set(names)) == len(odd)
  for name in names:
    assert pathlib.PurePath(name).name == name and name.isascii() and len(name) < 240


def run(capsys, *arguments, folder):
  """(status, lines of stdout, stderr) of a command line that must start nothing."""
  status = sweep.main([f"--config={SYNTHETIC}", f"--folder={folder}", *arguments])
  captured = capsys.readouterr()
  assert not folder.exists()
  return status, captured.out.splitlines(), captured.err


def test_a_dry_run_shows_the_command_of_every_cell(capsys, tmp_path):
  axes = ["--grid=schedule.name=linear,cosine"]
  axes += ["--grid=objective.estimator=count,steps+objective.steps=8"]
  folder = tmp_path / "runs"
  status, lines, _ = run(capsys, *axes, "--set=run.steps=5", "--dry-run", folder=folder)
  assert status == 0 and len(lines) == 4
  assert all("-m md4vmd.main" in line and "--config.run.steps=5" in line for line in lines)
  name = "schedule.name=linear,objective.estimator=steps,objective.steps=8"
  assert f"--workdir={folder / name} " in lines[1]
  assert "--config.objective.estimator=steps --config.objective.steps=8" in lines[1]
  assert "--config.schedule.name=cosine --config.objective.estimator=count" in lines[2]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--grid=schedule.nmae=linear"], "the config has no 'nmae'; did you mean \"name\""),
    (["--grid=network.depth=1,deep"], "config.network.depth=deep: 'deep' is no whole number"),
    (["--grid=seed=1", "--set=run.stesp=1"], "the config has no 'stesp'"),
    (["--grid=seed=1,1"], "the grid has the cell seed=1 twice"),
    (["--grid=seed=1", "--grid=seed=2"], "'seed' is set twice in one cell"),
    (["--grid=seed=1", "--set=seed=2"], "'seed' is set twice in one cell"),
    (["--grid=seed=1", "--jobs=0"], "--jobs is 0; it must be at least 1"),
    (["--grid=seed=1", "--config=configs/synthetci.py"], "did you mean 'synthetic.py'"),
  ],
)
def test_a_mistake_is_answered_in_one_line_before_anything_starts(
  arguments, words, capsys, tmp_path
):
  status, lines, err = run(capsys, *arguments, folder=tmp_path / "runs")
  assert status == 1 and lines == []
  assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.fixture
def make_cell(tmp_path):
  """A function (name, program, step) -> a cell whose command is the program."""

  def make(name, program, step=3):
    workdir = tmp_path / name
    code = program.replace("{workdir}", str(workdir)).replace("{step}", str(step))
    return sweep.Cell(name, workdir, [sys.executable, "-c", code], {"seed": 0})

  return make


def test_a_cell_that_fails_is_told_and_the_others_go_on(make_cell, capsys):
  cells = [make_cell("bad", FAIL), make_cell("good", SUCCEED)]
  first = sweep.Sweep(cells, "train", jobs=1)
  assert first.run() == 1
  out = capsys.readouterr().out
  assert "failed" in out and "error: the value is wrong" in out and "first mistake" not in out
  assert [first.is_finished(cell) for cell in cells] == [False, True]
  log = (cells[0].workdir / "log.txt").read_text()
  assert log.startswith("$ ") and "error: the value is wrong" in log


def test_a_finished_cell_is_not_started_again(make_cell, capsys):
  cell = make_cell("cell", SUCCEED)  # whose program fails where the checkpoint is there already
  assert sweep.Sweep([cell], "train", jobs=2).run() == 0
  assert sweep.Sweep([cell], "train", jobs=2).run() == 0
  assert "[1/1] finished before  cell" in capsys.readouterr().out
  assert not sweep.Sweep([cell], "evaluate", jobs=1).is_finished(cell)


@pytest.mark.parametrize("what", ["its config", "its checkpoint", "no checkpoint", "its record"])
def test_a_cell_is_no_longer_finished_once_something_changed(make_cell, what):
  cell = make_cell("cell", SUCCEED)
  record = cell.workdir / "sweep-train.json"
  (cell.workdir / "checkpoints/3").mkdir(parents=True)
  record.write_text(json.dumps({"step": 3, "config": {"seed": 0}}))
  assert sweep.Sweep([cell], "train", jobs=1).is_finished(cell)
  if what == "its config":
    cell = dataclasses.replace(cell, config={"seed": 1})
  elif what == "its checkpoint":
    (cell.workdir / "checkpoints/10").mkdir()
    (cell.workdir / "checkpoints/11.partial").mkdir()
  elif what == "no checkpoint":
    (cell.workdir / "checkpoints/3").rmdir()
  else:
    record.write_text("{")
  assert not sweep.Sweep([cell], "train", jobs=1).is_finished(cell)


def test_a_signal_lets_running_cells_save_and_starts_no_other(make_cell, capsys):
  cells = [make_cell("first", STOP), make_cell("second", SUCCEED)]
  stopped = sweep.Sweep(cells, "train", jobs=1)
  assert stopped.run() == sweep.STOPPED
  assert stopped.stopped == cells[:1] and not stopped.failed
  assert not cells[1].workdir.exists()
  assert "stopped, newest checkpoint at step None  first" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_a_cell_is_started_reaches_it(
  make_cell, monkeypatch, capsys, number
):
  class Popen(subprocess.Popen):
    def __init__(self, *args, **settings):
      super().__init__(*args, **settings)
      signal.raise_signal(number)

  monkeypatch.setattr(sweep.subprocess, "Popen", Popen)
  cells = [make_cell("first", SLEEP), make_cell("second", SUCCEED)]
  stopped = sweep.Sweep(cells, "train", jobs=1)
  assert stopped.run() == sweep.STOPPED
  assert stopped.stopped == cells[:1] and not cells[1].workdir.exists()
  assert "stopped, newest checkpoint at step None  first" in capsys.readouterr().out


def test_a_cell_that_runs_in_another_sweep_is_passed_over(make_cell, capsys):
  cell = make_cell("cell", SUCCEED)
  cell.workdir.mkdir()
  with (cell.workdir / "log.txt").open("ab") as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    assert sweep.Sweep([cell], "train", jobs=1).run() == 0
  assert "runs in another sweep  cell" in capsys.readouterr().out
  assert not (cell.workdir / "checkpoints").exists()


def test_launch_holds_no_logic_of_the_model():
  for path in pathlib.Path(sweep.__file__).parent.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      for name in names:
        library = name.split(".")[0]
        known = library in {"absl", "ml_collections", *sys.stdlib_module_names}
        assert known or name == "md4vmd.main", f"{path.name} imports {name}"
