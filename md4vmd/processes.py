"""The processes of a run: how they find each other, and how one leaves when another is gone.

A run on one machine is one process and none of this happens. In a pod every host runs the same
command, and jax's coordination service, which process 0 starts, introduces them to each other.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import jax

# A process that is silent for so long is taken for dead. The heartbeats come from threads of their
# own, so that neither compilation nor a long step delays them.
_HEARTBEAT_TIMEOUT_SECONDS = 30


def start(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
  """Joins the other processes of the run, if there are any; returns when all are there.

  Call it once, before anything uses a device. Without arguments the environment decides: SLURM
  with several tasks, the hosts of a TPU slice on GKE, or JAX_COORDINATOR_ADDRESS; with neither,
  this process is the only one, and nothing is waited for.

  Args:
    coordinator: HOST:PORT that process 0 opens and all can reach; "auto" lets jax find out all
      three, as on a Cloud TPU VM; "none" ignores the environment; None looks at it.
    processes: number of processes, for HOST:PORT alone.
    process: number of this process, from 0.

  Raises:
    ValueError: an incomplete or impossible combination.
  """
  if coordinator is None and (processes, process) == (None, None):
    coordinator = _of_environment()
  if coordinator in (None, "none", "auto") and (processes, process) != (None, None):
    raise ValueError(
      f"--processes={processes} and --process={process} need --coordinator=HOST:PORT, the address "
      "that process 0 opens"
    )
  if coordinator in (None, "none"):
    return
  if coordinator == "auto":
    jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS)
    return
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, 'auto' or 'none'")
  processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
  process = _number("JAX_PROCESS_ID") if process is None else process
  if processes is None or process is None or not 0 <= process < processes:
    raise ValueError(
      f"--coordinator={coordinator} needs --processes=N and --process=0 to N-1, a number for each; "
      f"they are {processes} and {process}"
    )
  jax.distributed.initialize(
    coordinator,
    processes,
    process,
    cluster_detection_method="deactivate",
    heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
  )


def _of_environment() -> str | None:
  """What `coordinator` is where the command line does not say."""
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address:
    return address
  is_step_of_slurm = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= os.environ.keys()
  if is_step_of_slurm and (_number("SLURM_NTASKS") or 1) > 1:
    return "auto"
  hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
  return "auto" if "," in hosts else None


def _number(name: str) -> int | None:
  """An environment variable as a number; None where it is not set."""
  text = os.environ.get(name, "")
  if text and not text.isdigit():
    raise ValueError(f"the environment has {name}={text}; it must be a number")
  return int(text) if text else None


def name() -> str:
  """Which process this is, as in "process 1 of 4"; "" where there is only one."""
  if not jax.distributed.is_initialized():
    return ""
  return f"process {jax.process_index()} of {jax.process_count()}"


def end_on_term() -> None:
  """From now on SIGTERM ends this process, for jobs that have nothing to save.

  In a pod jax's service takes the signal, for training to ask about, and nothing else would end.
  """
  if name():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave(error: BaseException, line: str) -> NoReturn:
  """Prints one line and ends this process of several at once, with status 1.

  An orderly end would wait for the others at a barrier, and they may be gone or wait for this one;
  their own connections notice at once that this one has left.
  """
  if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in line:
    line = (
      f"lost another process of the run, or a device failed ({line[:200]}); give the same command "
      "to all again: they continue from the newest checkpoint"
    )
  print(f"error: {name()}: {line}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(1)
