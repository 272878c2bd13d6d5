"""Where a run looks for its other processes, and which part of the batch each reads."""

import signal
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from md4vmd import main, partitioning, processes

SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
VARIABLES = [*SLURM, "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
VARIABLES += ["TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"]


@pytest.fixture
def joined(monkeypatch):
  """What jax.distributed.initialize was called with, in an environment without clusters."""
  calls = []
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
  return calls


def test_a_run_by_itself_waits_for_nobody(joined):
  processes.start()
  assert joined == [] and processes.name() == ""


@pytest.mark.parametrize(
  "environment",
  [SLURM, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}],
)
def test_a_cluster_is_noticed(joined, monkeypatch, environment):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  processes.start()
  assert joined == [()]
  processes.start("none")
  assert joined == [()]


@pytest.mark.parametrize(
  "environment", [SLURM | {"SLURM_NTASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}]
)
def test_a_single_host_of_a_cluster_is_alone(joined, monkeypatch, environment):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  processes.start()
  assert joined == []


def test_flags_go_before_the_environment(joined, monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  monkeypatch.setenv("JAX_PROCESS_ID", "3")
  processes.start()
  processes.start("other:2", 2, 0)
  assert joined == [("host:1", 4, 3), ("other:2", 2, 0)]


@pytest.mark.parametrize(
  "arguments, words",
  [
    (("host", 2, 0), "must be HOST:PORT, 'auto' or 'none'"),
    (("host:99999", 2, 0), "must be HOST:PORT"),
    (("host:1", 2, 2), "--process=0 to N-1"),
    (("host:1", None, 0), "they are None and 0"),
    ((None, 2, 0), "need --coordinator=HOST:PORT"),
    (("auto", 2, None), "need --coordinator=HOST:PORT"),
  ],
)
def test_what_cannot_be_is_refused(joined, arguments, words):
  with pytest.raises(ValueError, match=words):
    processes.start(*arguments)
  assert joined == []


class Left(Exception):
  """Stands in for the end of a process."""


@pytest.mark.parametrize(
  "error, shows_where",
  [
    (ValueError("a rule"), False),
    (KeyboardInterrupt(), False),
    (TypeError("a bug"), True),
    (KeyError("bug"), True),
  ],
)
def test_a_process_of_several_leaves_on_any_error(monkeypatch, capsys, error, shows_where):
  def leave(error, line):
    raise Left(type(error).__name__)

  def fail(argv):
    raise error

  monkeypatch.setattr(processes, "name", lambda: "process 1 of 2")
  monkeypatch.setattr(processes, "leave", leave)
  monkeypatch.setattr(main, "main", fail)
  with pytest.raises(Left, match=type(error).__name__):
    main._run(["main"])
  assert ("Traceback" in capsys.readouterr().err) == shows_where


def test_an_interrupted_command_ends_with_one_line(monkeypatch, capsys):
  def interrupt(argv):
    raise KeyboardInterrupt

  monkeypatch.setattr(main, "main", interrupt)
  with pytest.raises(SystemExit, match="130"):
    main._run(["main"])
  assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("name, ends", [("", False), ("process 1 of 2", True)])
def test_sigterm_ends_the_jobs_of_a_pod_that_have_nothing_to_save(monkeypatch, name, ends):
  monkeypatch.setattr(processes, "name", lambda: name)
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  try:
    processes.end_on_term()
    assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == ends
  finally:
    signal.signal(signal.SIGTERM, before)


class Device(NamedTuple):
  id: int
  process_index: int


@pytest.mark.parametrize(
  "shape, hosts, shares",
  [
    ((8, 1, 1, 1), "00112233", [(4, (0,)), (4, (1,)), (4, (2,)), (4, (3,))]),
    ((2, 2, 2, 1), "00001111", [(2, (0,)), (2, (1,))]),
    ((2, 1, 4, 1), "00112233", [(2, (0,)), (2, (0,)), (2, (1,)), (2, (1,))]),
    ((1, 1, 4, 2), "00112233", [(1, (0,))] * 4),
    ((1, 4, 1, 2), "00000000", [(1, (0,))]),
    # Along the wires of a slice, as of v5e:4x4.
    ((8, 1, 1, 1), "00111100", [(4, (0, 3)), (4, (1, 2))]),
    ((8, 1, 1, 1), "01111000", [(8, (0, 5, 6, 7)), (8, (1, 2, 3, 4))]),
  ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch, shape, hosts, shares):
  rows = shape[0] * shape[1]
  devices = [Device(i, int(host)) for i, host in enumerate(hosts)]
  cut = {d: (slice(d.id * rows // 8, d.id * rows // 8 + 1),) for d in devices}
  sharding = types.SimpleNamespace(devices_indices_map=lambda shape: cut)
  monkeypatch.setattr(partitioning, "of_batch", lambda mesh: sharding)
  mesh = types.SimpleNamespace(shape=dict(zip(partitioning.AXES, shape, strict=True)))
  for process, share in enumerate(shares):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    found = partitioning.share(mesh)
    assert (found["parts"], found["own"]) == share


def test_the_share_of_one_process_is_everything():
  mesh = partitioning.make_mesh()
  assert isinstance(mesh, Mesh)
  assert partitioning.share(mesh) == {"parts": 1, "own": (0,)}


@pytest.mark.parametrize(
  "sizes, nearest",
  [((3, 1, 1, 1), (8, 1, 1, 1)), ((-1, 3, 1, 1), (2, 4, 1, 1)), ((1, 16, 1, 1), (1, 8, 1, 1))],
)
def test_the_meshes_that_are_proposed_fit_and_the_nearest_comes_first(sizes, nearest):
  found = partitioning._nearest(sizes, 8)
  assert found[0] == nearest
  assert all(np.prod(shape) == 8 for shape in found)
