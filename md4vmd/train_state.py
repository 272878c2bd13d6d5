"""The state of a model on its mesh: made anew, or its averaged parameters from a checkpoint."""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import flax.linen as nn
import jax

from md4vmd import build, partitioning, steps
from md4vmd.checkpoints import Checkpoints, Restored


def abstract(model: build.Model) -> steps.TrainState:
  """Shapes, dtypes and shardings of the train state."""
  return partitioning.placed(model.mesh, _initializer(model))


def shardings(model: build.Model) -> steps.TrainState:
  """Shardings of the train state's leaves."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract(model))


def initial(model: build.Model) -> steps.TrainState:
  """The state at step 0, laid out on the mesh."""
  init = _initializer(model)
  return jax.jit(lambda: nn.unbox(init()), out_shardings=shardings(model))()


def load_average(model: build.Model, workdir: pathlib.Path) -> Restored:
  """`{"ema": params}` of the newest undamaged checkpoint.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it was made with another network.
  """
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.restore_part({"ema": abstract(model).ema})
  finally:
    checkpoints.close()


def count_parameters(params: Any) -> int:
  """Number of elements of all arrays of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _initializer(model):
  return functools.partial(
    steps.init_state, model.network, model.optimizer, model.seed, model.dataset.length
  )
