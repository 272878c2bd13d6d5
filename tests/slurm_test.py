"""docs/pods.md's cluster of two nodes on this machine, and launch/slurm.sbatch on it."""

import contextlib
import getpass
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tests import shrunken

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
pytestmark = pytest.mark.skipif(
  not all(map(shutil.which, PROGRAMS)),
  reason="SLURM is not installed; Debian's slurm-wlm and munge",
)


def on_the_page(folder):
  """(slurm.conf, commands) of docs/pods.md, for that folder."""
  page = (shrunken.ROOT / "docs/pods.md").read_text().partition("**SLURM on one machine**")[2]
  conf = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
  commands = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", " ")
  place = {"HOST": socket.gethostname().partition(".")[0], "USER": getpass.getuser()}
  for word, text in (place | {"FOLDER": str(folder)}).items():
    conf, commands = (re.sub(rf"\b{word}\b", text, each) for each in (conf, commands))
  return conf, [shlex.split(line) for line in commands.splitlines()]


def wait_until(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen in time"
    time.sleep(0.1)


@pytest.fixture
def folder():
  """One that all can enter, as munged insists on."""
  with tempfile.TemporaryDirectory() as name:
    path = pathlib.Path(name)
    path.chmod(0o755)
    yield path


@pytest.fixture
def cluster(folder, monkeypatch):
  """A function (words) -> stdout of a command of SLURM; the folder is where its daemons live."""
  conf, commands = on_the_page(folder)
  (folder / "slurm.conf").write_text(conf)
  monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))

  def slurm(*words):
    done = subprocess.run(words, cwd=shrunken.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout

  with contextlib.ExitStack() as daemons:
    for command in commands[1:-1]:
      if command[0] in ("mkdir", "mungekey"):
        slurm(*command)
        continue
      stay = "--foreground" if command[0] == "munged" else "-D"
      output = daemons.enter_context((folder / f"{command[0]}.out").open("a"))
      process = subprocess.Popen([*command, stay], stdout=output, stderr=output)
      daemons.callback(process.wait, 30)
      daemons.callback(process.terminate)
      wait_until((folder / "munge.socket").exists)  # the others need it from the start
    wait_until(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout)
    yield slurm


def test_a_job_on_two_nodes_saves_on_sigterm_and_goes_back_into_the_queue(
  cluster, tmp_path, monkeypatch
):
  for name, text in {
    "PYTHON": sys.executable,
    "PYTHONPATH": str(shrunken.ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
  }.items():
    monkeypatch.setenv(name, text)
  workdir, log = tmp_path / "run", tmp_path / "log"
  small = {"network.width": 16, "network.depth": 1, "network.heads": 2, "run.steps": 10**6}
  words = [f"--config.{key}={value}" for key, value in small.items()]
  (job,) = re.findall(
    r"\d+",
    cluster(
      "sbatch",
      f"--output={log}",
      str(shrunken.ROOT / "launch/slurm.sbatch"),
      "--config=configs/synthetic.py:d1",
      "--config.run.log_every=1",
      f"--workdir={workdir}",
      *words,
    ),
  )
  try:
    wait_until((workdir / "metrics.jsonl").exists)
    assert "on 2 cpu devices" in log.read_text()
    cluster("scancel", "--signal=TERM", job)
    show = lambda: cluster("scontrol", "show", "job", job)
    wait_until(lambda: {"Restarts=1", "JobState=PENDING"} <= {*show().split()})
  finally:
    cluster("scancel", job)
  saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
  stopped = re.search(r"Stopping at step (\d+) on SIGTERM", log.read_text())
  assert saved == [int(stopped[1])]
