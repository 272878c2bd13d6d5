"""Checkpoints on disk: saved in the background, verified when they are read.

A step folder holds the state and a record {meta, leaves, crc32}: the caller's meta, and for each
leaf of the state its shape, dtype and a sum of its bits. Orbax compares no checksum over array
data, so a flipped byte can come back as other weights; the sums are what notices it. The record
also tells damage (fall back to an earlier step) from a state of another shape (an error of the
user's, reported with the leaf).
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from md4vmd.fingerprints import DamagedError, by_name, describe, seal, unseal


class Restored(NamedTuple):
  """A checkpoint read back.

  Attributes:
    step: the step it was saved at.
    state: the state, or the part of it that was asked for.
    meta: the dict given to `save`.
  """

  step: int
  state: Any
  meta: dict[str, Any]


class Best(NamedTuple):
  """The step with the best figure so far, as best.json holds it."""

  step: int
  name: str
  value: float


class _Chosen(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps one step, whichever it is at the time."""

  def __init__(self, choose: Callable[[], int | None]):
    self._choose = choose

  def should_preserve(self, checkpoints, *, context):
    del context
    chosen = self._choose()
    return [checkpoint.step == chosen for checkpoint in checkpoints]


def has_any(folder: pathlib.Path) -> bool:
  """Whether a folder holds a checkpoint, damaged ones included and unfinished ones not."""
  names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  return any(re.fullmatch(r"\d+(\.damaged-\d+)?", name) for name in names)


def read_best(folder: str | pathlib.Path) -> Best | None:
  """The best step of a folder of checkpoints; None where none was rated.

  Raises:
    ValueError: best.json is damaged.
  """
  path = pathlib.Path(folder) / "best.json"
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    return Best(int(record["step"]), str(record["name"]), float(record["value"]))
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path} is damaged ({error}); delete it") from error


class Checkpoints:
  """The checkpoints of one run, on a disk that all processes see.

  Every process calls every method, in the same order.

  Args:
    folder: where the step folders live; created unless `read_only`.
    keep: number of newest steps kept.
    keep_every: steps divisible by it are kept as well.
    keep_best: the step that was `rate`d best is kept as well, and best.json names it.
    read_only: neither saves, deletes nor moves anything; for jobs beside a training run.

  Raises:
    FileNotFoundError: `read_only` and the folder does not exist.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    keep: int = 3,
    keep_every: int | None = None,
    keep_best: bool = False,
    read_only: bool = False,
  ):
    self.folder = pathlib.Path(folder).absolute()
    self._read_only = read_only
    self._best = read_best(self.folder) if keep_best else None
    if read_only and not self.folder.is_dir():
      raise self._nothing_here()
    policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
    if keep_every is not None:
      policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    if keep_best:
      policies.append(_Chosen(lambda: self._best.step if self._best else None))
    options = ocp.CheckpointManagerOptions(
      save_interval_steps=0 if read_only else 1,
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      create=not read_only,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # orbax warns that a read-only folder is read-only
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    logging.set_verbosity(verbosity)

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Copies `state` off the devices and writes it in the background.

    Args:
      step: larger than every step saved so far.
      state: pytree of arrays; it may be donated as soon as this returns.
      meta: a small JSON dict.

    Raises:
      ValueError: a leaf is no plain array, or the step is not larger than the latest one.
      RuntimeError: `read_only`.
    """
    if self._read_only:
      raise RuntimeError(f"checkpoints in {self.folder} were opened with read_only=True")
    record = {"meta": meta, "leaves": describe(state)}
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(seal(record))
    )
    if not self._manager.save(step, args=args):
      raise ValueError(
        f"cannot save step {step}: {self.folder} already holds step {self.latest_step()}; resume "
        "from it or use another --workdir"
      )

  def restore_latest(self, template: Any) -> Restored | None:
    """Reads the newest undamaged step, or None where nothing was saved yet.

    Damaged steps newer than it are reported and renamed to `<step>.damaged-<n>`, so that training
    can save those steps again.

    Args:
      template: the state, or `jax.ShapeDtypeStruct`s of it; the result takes its shardings.

    Raises:
      ValueError: the saved state has other leaves than the template.
      DamagedError: there are steps, and all are damaged; none is moved.
    """
    damaged = []
    for step in self.steps():
      try:
        restored = self._read(step, template, whole=True)
      except DamagedError as error:
        logging.warning("Skipping the checkpoint of step %d: %s", step, error)
        damaged.append(step)
        continue
      self._move_aside(damaged)
      return restored
    if damaged:
      raise self._all_damaged()
    return None

  def restore_part(self, template: dict[str, Any], step: int | None = None) -> Restored:
    """Reads only the fields of the state named by the template, such as `{"ema": params}`.

    Args:
      template: mapping from field of the saved state to what it holds.
      step: the step to read; None takes the newest undamaged one.

    Raises:
      FileNotFoundError: no such step.
      ValueError: a field was saved with other leaves.
      DamagedError: the step asked for, or every step, is damaged.
    """
    steps = self.steps()
    if not steps:
      raise self._nothing_here()
    if step is not None:
      if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}; it has {steps}")
      return self._read(step, template, whole=False)
    for candidate in steps:
      try:
        return self._read(candidate, template, whole=False)
      except DamagedError as error:
        logging.warning("Skipping the checkpoint of step %d: %s", candidate, error)
    raise self._all_damaged()

  def rate(self, step: int, name: str, value: float, *, is_loss: bool) -> bool:
    """Takes the figure of a step that is saved; True, and best.json names it, if it is the best.

    A best step of another figure, or of one that is no longer there, counts for nothing.

    Args:
      step: the step.
      name: what the figure is called.
      value: the figure, the same on every process.
      is_loss: whether smaller is better.
    """
    best = self._best
    if best and best.name == name and (self.folder / str(best.step)).is_dir():
      is_better = value < best.value if is_loss else value > best.value
      if not is_better:
        return False
    self._best = Best(step, name, value)
    if jax.process_index() == 0:
      text = json.dumps(self._best._asdict(), indent=2)
      partial = self.folder / "best.json.partial"
      partial.write_text(text + "\n", encoding="utf-8")
      partial.replace(self.folder / "best.json")
    return True

  def steps(self) -> list[int]:
    """Every step, the newest first, once everything saved is on the disk."""
    self.wait()
    self._manager.reload()
    return sorted(self._manager.all_steps(), reverse=True)

  def latest_step(self) -> int | None:
    """The newest step, one that is still being written included; None where there is none."""
    return self._manager.latest_step()

  def reached_preemption(self, step: int) -> bool:
    """True on every process at the same step, once the scheduler has asked one to stop."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Returns when everything saved is on the disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and ends the background threads."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _read(self, step: int, template: Any, *, whole: bool) -> Restored:
    path = self.folder / str(step)
    record = _agree(lambda: unseal((path / "meta" / "metadata").read_text()))
    abstract = jax.tree.map(_abstract, template)
    self._check_match(step, record["leaves"], abstract, whole=whole)
    args = ocp.args.PyTreeRestore(
      abstract,
      restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
      partial_restore=True,
    )
    # The handler and not the manager, whose restore ends in a barrier: a process that could read
    # its shards would wait there for one that could not.
    handler = ocp.PyTreeCheckpointHandler()
    state = _agree(lambda: handler.restore(epath.Path(path / "state"), args=args))
    for name, leaf in _agree(lambda: describe(state)).items():
      if leaf != record["leaves"][name]:
        raise DamagedError(f"the bits of {name} are not those that were saved")
    return Restored(step, state, record["meta"])

  def _check_match(self, step: int, saved: dict, abstract: Any, *, whole: bool) -> None:
    """Raises ValueError at the first leaf in which the saved state and the template differ."""
    wanted = {name: [list(x.shape), x.dtype.name] for name, x in by_name(abstract).items()}
    extra = (name for name in saved if whole or name.split("/")[0] in abstract)
    for name in dict.fromkeys([*wanted, *extra]):
      found, expected = saved.get(name, [])[:2], wanted.get(name, [])
      if found != expected:
        raise ValueError(
          f"the checkpoint of step {step} in {self.folder} was made with another config: {name} "
          f"was saved as {_show(found)}, expected {_show(expected)}; use the config this run was "
          f"made with, {self.folder.parent / 'config.json'}, or another --workdir"
        )

  def _move_aside(self, steps: list[int]) -> None:
    if self._read_only or not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        taken = len(list(self.folder.glob(f"{step}.damaged-*")))
        (self.folder / str(step)).rename(self.folder / f"{step}.damaged-{taken}")
    multihost_utils.sync_global_devices("md4vmd: damaged checkpoints are moved")
    self._manager.reload()

  def _nothing_here(self) -> FileNotFoundError:
    return FileNotFoundError(
      f"no checkpoint in {self.folder}: train first, or point --workdir at the run"
    )

  def _all_damaged(self) -> DamagedError:
    return DamagedError(
      f"every checkpoint in {self.folder} is damaged (see the warnings above); restore the folder "
      "from a copy, or rename it to start from step 0"
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  # A sharding always comes from here: the one that orbax stores names devices that may be gone.
  sharding = getattr(leaf, "sharding", None)
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _agree(read: Callable[[], Any]) -> Any:
  """`read()`, or DamagedError on every process if the step was damaged on any."""
  result, reason = None, ""
  try:
    result = read()
  except Exception as error:
    reason = _damage(error)
    if not reason:
      raise
  if jax.process_count() > 1:
    is_damaged_K = multihost_utils.process_allgather(np.asarray(bool(reason)))
    if is_damaged_K.any():
      reason = reason or f"process {int(is_damaged_K.argmax())} cannot read it"
  if reason:
    raise DamagedError(reason)
  return result


def _damage(error: BaseException) -> str:
  """What is wrong with the step, or "" where memory ran out or the disk is away instead."""
  while error.__cause__ is not None:  # orbax wraps what went wrong in a plain Exception
    error = error.__cause__
  is_missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
  if isinstance(error, MemoryError | OSError | jax.errors.JaxRuntimeError) and not is_missing:
    return ""
  first_line = (str(error).splitlines() or [""])[0][:200]
  return f"{type(error).__name__}: {first_line}"


def _show(leaf: list) -> str:
  return f"{leaf[1]}{leaf[0]}" if leaf else "absent"
