"""Training commands as processes of their own, forked from one that has imported everything.

Importing takes longer than a shrunken run. A child has what `python -m md4vmd.main` would have: it
is a process with its own device backend, which the one that it is forked from never starts.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import shrunken

_SERVER = """
import json, os, signal, sys
import jax
from md4vmd import main, evaluate, export, processes, sample, train
from tests import commands

outputs = {}

def reap(*_):
  while outputs:
    try:
      pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
      return
    if not pid:
      return
    with open(outputs[pid] + ".partial", "w") as file:
      file.write(str(os.waitstatus_to_exitcode(status)))
    os.rename(outputs[pid] + ".partial", outputs[pid] + ".status")

signal.signal(signal.SIGCHLD, reap)
for line in sys.stdin:
  job = json.loads(line)
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
  pid = os.fork()
  if pid:
    outputs[pid] = job["output"]
  else:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
  if not pid:
    commands.run_job(job)
  print(pid, flush=True)
"""


def run_job(job):
  """In the child: the command, or a function of a test module, and then the end."""
  import importlib

  import jax

  from md4vmd import main

  for number, ending in ((0, None), (1, "out"), (2, "err")):
    path = os.devnull if ending is None else f"{job['output']}.{ending}"
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
  for name, value in job["settings"].items():
    jax.config.update(name, value)
  jax.config.update("jax_numpy_rank_promotion", "raise")
  if "function" in job:
    module, _, name = job["function"].rpartition(".")
    getattr(importlib.import_module(module), name)(*job["arguments"])
  else:
    sys.argv = ["md4vmd", *job["arguments"]]
    main.entry()
  sys.exit(0)


class Command:
  """A process that runs; `output` is its stdout in a file `.out` and its stderr in `.err`."""

  def __init__(self, pid: int, output: str):
    self.pid, self.output = pid, pathlib.Path(output)

  def status(self) -> int | None:
    """Its exit status; None while it runs."""
    path = pathlib.Path(f"{self.output}.status")
    return int(path.read_text()) if path.exists() else None

  def finish(self, timeout: float = 300) -> tuple[int, str, str]:
    """(status, stdout, stderr) at its end."""
    end = time.monotonic() + timeout
    while (status := self.status()) is None:
      if time.monotonic() > end:
        self.kill()
        pytest.fail(f"a command did not end within {timeout} s: {self._read('err')}")
      time.sleep(0.02)
    return status, self._read("out"), self._read("err")

  def succeed(self) -> str:
    """Its stdout, once it has ended well."""
    status, out, err = self.finish()
    assert status == 0, err
    return out

  def send_signal(self, number: int) -> None:
    os.kill(self.pid, number)

  def kill(self) -> None:
    """kill -9."""
    self.send_signal(signal.SIGKILL)

  def wait_until(self, condition) -> None:
    """Returns at the first moment at which the condition holds; the command must still run."""
    while not condition():
      if self.status() is not None:
        pytest.fail(f"the run ended too early: {self.finish()}")
      time.sleep(0.002)

  def stop_when(self, condition) -> None:
    """Halts the process at a moment at which the condition holds; it can still be continued."""
    while self.status() is None:
      if condition():
        self.send_signal(signal.SIGSTOP)
        if condition():
          return
        self.send_signal(signal.SIGCONT)
      time.sleep(0.0003)
    pytest.fail(f"the run ended before it could be stopped: {self.finish()}")

  def _read(self, ending: str) -> str:
    return pathlib.Path(f"{self.output}.{ending}").read_text()


class Commands:
  """The process that commands are forked from; each program is compiled once for all of them."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.count = folder, 0
    self.server = subprocess.Popen(
      [sys.executable, "-c", _SERVER],
      cwd=shrunken.ROOT,
      env=os.environ | {"PYTHONPATH": str(shrunken.ROOT), "JAX_PLATFORMS": "cpu"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def start(self, arguments, devices: int = 1, **job) -> Command:
    """Starts `python -m md4vmd.main` with these arguments, or `function=` of a test module."""
    output = str(self.folder / f"command-{self.count}")
    self.count += 1
    settings = shrunken.QUICK | {
      "jax_compilation_cache_dir": str(self.folder / "cache"),
      "jax_num_cpu_devices": devices,
    }
    job |= {"arguments": list(arguments), "output": output, "settings": settings}
    self.server.stdin.write(json.dumps(job) + "\n")
    self.server.stdin.flush()
    return Command(int(self.server.stdout.readline()), output)

  def close(self) -> None:
    """Ends the server and what it has started and is still running."""
    self.server.stdin.close()
    self.server.wait(timeout=60)
