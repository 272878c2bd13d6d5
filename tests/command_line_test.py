"""What the command answers to mistakes: one line that says what to change, and status 1."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from md4vmd import main
from tests import shrunken

# Imports everything once and runs each command in a fork of its own, which saves seconds each.
FORKS = """
import json, os, sys
from md4vmd import main, evaluate, sample, train

for name, arguments in json.load(sys.stdin).items():
  if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(name + ".status", "w").write(str(status))
    continue
  os.dup2(os.open(name + ".out", os.O_WRONLY | os.O_CREAT), 1)
  os.dup2(os.open(name + ".err", os.O_WRONLY | os.O_CREAT), 2)
  sys.argv = ["md4vmd", *arguments]
  main.entry()
  os._exit(0)
"""
# name: (arguments, what the line must say)
MISTAKES = {
  "no config": ([], ["no --config given; try --config=configs/quickstart.py"]),
  "missing config": (
    ["--config=configs/quickstrat.py"],
    ["no config file configs/quickstrat.py", "did you mean 'quickstart.py'?"],
  ),
  "unknown variant": (
    ["--config=configs/sudoku.py:9x8"],
    ["there is no variant '9x8'", "4x4, 4x4-several, vmd, 9x9"],
  ),
  "variant of a config that has none": (
    ["--config=configs/quickstart.py:long"],
    ["this config has no variants; leave out the colon"],
  ),
  "unknown key": (
    ["--config=configs/synthetic.py", "--config.network.widht=8"],
    ["the config has no 'widht'; did you mean \"width\""],
  ),
  "unknown section": (
    ["--config=configs/synthetic.py", "--config.optimiser.ema=0.5"],
    ["the config has no 'optimiser'; did you mean \"optimizer\""],
  ),
  "unknown key far from all": (
    ["--config=configs/synthetic.py", "--config.run.zzzz=1"],
    ["the config has no 'zzzz'"],
  ),
  "unknown entry": (
    ["--config=configs/synthetic.py", "--config.schedule.name=cosin"],
    ["schedule: there is no 'cosin'; did you mean 'cosine'?"],
  ),
  "unknown sampler": (
    ["--config=configs/synthetic.py", "--config.sampler.name=top-prob"],
    ["sampler: there is no 'top-prob'; did you mean 'top_prob'?"],
  ),
  "unknown distribution": (
    ["--config=configs/synthetic.py", "--config.data.distribution=d7"],
    ["distribution='d7'", "pairs, pairs_skewed, d1, d2"],
  ),
  "wrong type": (
    ["--config=configs/synthetic.py", "--config.run.steps=many"],
    ["config.run.steps=many: 'many' is no whole number"],
  ),
  "no number": (
    ["--config=configs/synthetic.py", "--config.optimizer.learning_rate=fast"],
    ["config.optimizer.learning_rate=fast: 'fast' is no number"],
  ),
  "no Boolean": (
    ["--config=configs/synthetic.py", "--config.network.absolute_positions=maybe"],
    ["config.network.absolute_positions=maybe: 'maybe' is neither true nor false"],
  ),
  "no default": (
    ["--config=configs/synthetic.py", "--config.seed=None"],
    ["config.seed has no default that None could stand for; give a value"],
  ),
  "a needed value left out": (
    ["--config=configs/synthetic.py", "--config.run.steps=None"],
    ["run needs a value for 'steps'"],
  ),
  "an unknown key left out": (
    ["--config=configs/synthetic.py", "--config.network.widht=None"],
    ["the config has no 'widht'; did you mean \"width\""],
  ),
  "wrong value": (
    ["--config=configs/synthetic.py", "--config.run.steps=-1"],
    ["run.steps is -1; it must be at least 1"],
  ),
  "unknown flag": (["--config=configs/synthetic.py", "--workdri=x"], ["workdri", "workdir"]),
  "bad mode": (
    ["--config=configs/synthetic.py", "--mode=trian"],
    ["trian", "train|evaluate|sample"],
  ),
  "stray word": (["--config=configs/synthetic.py", "evaluate"], ["unknown argument 'evaluate'"]),
  "setting of another entry": (
    ["--config=configs/synthetic.py", "--config.schedule.power=2.0"],
    ["schedule 'linear' takes no 'power'"],
  ),
  "missing data": (
    ["--config=configs/text8.py", "--config.data.path=nowhere/text8.gz"],
    ["no text file at 'nowhere/text8.gz'"],
  ),
  "missing puzzles": (
    ["--config=configs/sudoku.py:9x9", "--config.data.path=nowhere/*.csv"],
    ["'nowhere/*.csv' names no file"],
  ),
  "evaluate without a checkpoint": (
    ["--config=configs/synthetic.py", "--mode=evaluate"],
    ["no checkpoint in ", "runs/synthetic-default/checkpoints", "train first"],
  ),
  "sample without a checkpoint": (
    ["--config=configs/synthetic.py:d1", "--mode=sample", "--workdir=elsewhere"],
    ["no checkpoint in ", "elsewhere/checkpoints", "train first"],
  ),
  "an address as the workdir": (
    ["--config=configs/synthetic.py", "--workdir=gs://bucket/runs"],
    ["--workdir=gs://bucket/runs is an address", "give a folder"],
  ),
  "report without runs": (
    ["--mode=report", "--workdir=elsewhere"],
    ["there is no run in elsewhere: a run has a config.json or a metrics.jsonl"],
  ),
  "impossible mesh": (
    ["--config=configs/synthetic.py", "--config.mesh.fsdp=64"],
    ["mesh data=-1, fsdp=64, tensor=1, sequence=1 does not fit"],
  ),
}
# What is right, up to the end of the command, where data or a checkpoint is missing.
RIGHT = {
  "another schedule": ["--config=configs/text8.py", "--config.schedule.name=cosine"],
  "another objective": [
    "--config=configs/text8.py",
    "--config.objective.name=ar",
    "--config.objective.estimator=None",
    "--config.run.evaluators=('likelihood',)",
  ],
  "another folder": ["--config={elsewhere}/configs/mine.py"],
  "a variant of another folder": ["--config={elsewhere}/configs/sudoku.py:4x4-several"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
  """name -> (status, stdout, stderr) of every command above, run in a folder with configs/."""
  folder = tmp_path_factory.mktemp("command")
  (folder / "configs").symlink_to(shrunken.ROOT / "configs")
  elsewhere = folder / "elsewhere"
  shutil.copytree(shrunken.ROOT / "configs", elsewhere / "configs")
  # A config of one's own beside a common.py of one's own.
  with (elsewhere / "configs/common.py").open("a") as common:
    common.write(
      "\n\ndef mine():\n  config = base()\n  config.data.name = 'mine'\n  return config\n"
    )
  (elsewhere / "configs/mine.py").write_text(
    "from configs import common\n\n\ndef get_config():\n  return common.mine()\n"
  )
  path = shrunken.write_text(folder)
  (folder / "broken.py").write_text("def get_config():\n  return {}['key that is not there']\n")
  commands = {name: arguments for name, (arguments, _) in MISTAKES.items()}
  commands |= {
    name: [argument.format(elsewhere=elsewhere) for argument in arguments]
    for name, arguments in RIGHT.items()
  }
  for name in ("another schedule", "another objective"):
    commands[name] += [
      f"--config.data.path={path}",
      "--mode=sample",
      "--config.sampler.prompt=[MASK]!",
    ]
  commands["a variant of another folder"] += ["--mode=sample"]
  commands["a config that raises"] = ["--config=broken.py"]
  commands["traceback"] = [*commands["unknown entry"], "--traceback"]
  subprocess.run(
    [sys.executable, "-c", FORKS],
    input=json.dumps(commands),
    text=True,
    check=True,
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(shrunken.ROOT), "JAX_PLATFORMS": "cpu"},
    timeout=300,
  )
  read = lambda name, end: (folder / f"{name}.{end}").read_text()
  return {
    name: (int(read(name, "status")), read(name, "out"), read(name, "err")) for name in commands
  }


def one_line(answer):
  status, out, err = answer
  assert status == 1
  assert out == ""
  assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
  return err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_line_that_says_what_is_wrong(answers, name):
  line = one_line(answers[name])
  for words in MISTAKES[name][1]:
    assert words in line


def test_a_config_that_raises_is_answered_with_its_error(answers):
  assert "key that is not there" in one_line(answers["a config that raises"])


def test_a_traceback_is_shown_where_it_is_asked_for(answers):
  status, _, err = answers["traceback"]
  assert status == 1
  assert "Traceback (most recent call last)" in err and "build.py" in err


@pytest.mark.parametrize("name", ["another schedule", "another objective"])
def test_the_setting_of_another_entry_of_the_table_is_taken(answers, name):
  # Everything is built as it says; what stops the command is the prompt alone.
  assert "'!' is not a token" in one_line(answers[name])


def test_a_config_is_found_by_its_path_from_another_folder_with_its_own_neighbours(answers):
  assert "data: there is no 'mine'" in one_line(answers["another folder"])
  line = one_line(answers["a variant of another folder"])
  assert "runs/sudoku-4x4-several/checkpoints" in line


@pytest.mark.parametrize(
  "flag, folder",
  [
    ("configs/quickstart.py", "runs/quickstart-default"),
    ("configs/sudoku.py:9x9", "runs/sudoku-9x9"),
    ("/abs/path/configs/text8.py", "runs/text8-default"),
    ("configs/owt.py:a b/c", "runs/owt-a-b-c"),
  ],
)
def test_the_default_workdir_is_named_after_config_and_variant(flag, folder):
  assert main.default_workdir(flag) == pathlib.Path(folder)
