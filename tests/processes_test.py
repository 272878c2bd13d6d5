"""Where a run looks for its other processes, and which part of the batch each reads."""

import types
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from md4vmd import partitioning, processes

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


class Device(NamedTuple):
  id: int
  process_index: int


@pytest.mark.parametrize(
  "shape, per_process, shares",
  [
    ((8, 1, 1, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((2, 2, 2, 1), 4, [(0, 2), (1, 2)]),
    ((2, 1, 4, 1), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ((1, 1, 4, 2), 2, [(0, 1)] * 4),
    ((1, 4, 1, 2), 8, [(0, 1)]),
  ],
)
def test_processes_that_hold_the_same_rows_read_the_same_part(
  monkeypatch, shape, per_process, shares
):
  rows = shape[0] * shape[1]
  devices = [Device(i, i // per_process) for i in range(8)]
  cut = {d: (slice(d.id * rows // 8, d.id * rows // 8 + 1),) for d in devices}
  sharding = types.SimpleNamespace(devices_indices_map=lambda shape: cut)
  monkeypatch.setattr(partitioning, "of_batch", lambda mesh: sharding)
  mesh = types.SimpleNamespace(shape=dict(zip(partitioning.AXES, shape, strict=True)))
  for process, share in enumerate(shares):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    found = partitioning.share(mesh)
    assert (found["process_index"], found["process_count"]) == share


def test_the_share_of_one_process_is_everything():
  mesh = partitioning.make_mesh()
  assert isinstance(mesh, Mesh)
  assert partitioning.share(mesh) == {"process_index": 0, "process_count": 1}


@pytest.mark.parametrize(
  "sizes, nearest",
  [((3, 1, 1, 1), (8, 1, 1, 1)), ((-1, 3, 1, 1), (2, 4, 1, 1)), ((1, 16, 1, 1), (1, 8, 1, 1))],
)
def test_the_meshes_that_are_proposed_fit_and_the_nearest_comes_first(sizes, nearest):
  found = partitioning._nearest(sizes, 8)
  assert found[0] == nearest
  assert all(np.prod(shape) == 8 for shape in found)
