"""The state of a model on its mesh: made anew, or its averaged parameters from a checkpoint."""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import flax.linen as nn
import jax

from md4vmd import build, config_record, partitioning, steps, weights
from md4vmd.checkpoints import Checkpoints, Restored, read_best
from md4vmd.fingerprints import by_name

Step = int | str  # of a checkpoint: a number, "latest" or "best"


def abstract(model: build.Model) -> steps.TrainState:
  """Shapes, dtypes and shardings of the train state."""
  return partitioning.placed(model.mesh, _initializer(model))


def shardings(model: build.Model) -> steps.TrainState:
  """Shardings of the train state's leaves."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract(model))


def initial(model: build.Model) -> steps.TrainState:
  """The state at step 0, laid out on the mesh; its parameters are those of `run.initial` if set.

  Raises:
    ValueError: that file does not hold the parameters of this network.
  """
  init = _initializer(model)
  state = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings(model))()
  if not model.run.initial:
    return state
  _, params = _of_file(model, state.params)
  put = lambda tree: partitioning.put_like(params, tree)
  return state.replace(params=put(state.params), ema=put(state.ema))


def _of_file(model: build.Model, template: Any) -> tuple[dict[str, Any], Any]:
  """(header, parameters as numpy arrays) of `run.initial`."""
  path = pathlib.Path(model.run.initial)
  header = weights.read_header(path)
  config_record.check_network(model.config, header.get("config", {}), path)
  return header, weights.read(path, template, true_shapes(model))


def load_average(model: build.Model, workdir: pathlib.Path, step: Step = "latest") -> Restored:
  """`{"ema": params}` of a checkpoint, or of `run.initial` where the workdir has none.

  Args:
    model: what the config built.
    workdir: of the run.
    step: "latest", the newest undamaged one; "best", that which `run.best` chose; or a number.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it was made with another network.
  """
  folder = workdir / "checkpoints"
  template = abstract(model).ema
  if step == "latest" and model.run.initial and not folder.is_dir():
    header, params = _of_file(model, template)
    meta = {"config_hash": header.get("trained_config_hash"), "config": header.get("config", {})}
    return Restored(header.get("step", 0), {"ema": partitioning.put_like(params, template)}, meta)
  chosen = read_best(folder) if step == "best" else None
  if step == "best" and chosen is None:
    raise FileNotFoundError(
      f"no best checkpoint in {folder}: train with run.best and run.evaluate_every"
    )
  number = chosen.step if chosen else None if step == "latest" else int(step)
  checkpoints = Checkpoints(folder, read_only=True)
  try:
    restored = checkpoints.restore_part({"ema": template}, number)
  finally:
    checkpoints.close()
  config_record.check_network(
    model.config, restored.meta["config"], f"the checkpoint of step {restored.step}"
  )
  return restored


def true_shapes(model: build.Model) -> dict[str, tuple[int, ...]]:
  """Shape of every parameter by name, without the rows and columns that pad the vocabulary."""
  boxed = jax.eval_shape(_initializer(model)).params
  shapes = {}
  # Embeddings have a row for the mask too; heads, whose second axis is the vocabulary, have none.
  sizes = (model.dataset.vocab_size + 1, model.dataset.vocab_size)
  names = by_name(nn.get_partition_spec(boxed))
  for name, leaf in by_name(jax.eval_shape(nn.unbox, boxed)).items():
    axes = (*names[name], *[None] * leaf.ndim)
    shapes[name] = tuple(
      sizes[axis] if axes[axis] == "vocab" else size for axis, size in enumerate(leaf.shape)
    )
  return shapes


def count_parameters(params: Any) -> int:
  """Number of elements of all arrays of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _initializer(model):
  return functools.partial(
    steps.init_state, model.network, model.optimizer, model.seed, model.dataset.length
  )
