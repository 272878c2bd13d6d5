"""FLOPs of the matrix products of a training step, counted in its jaxpr: the same on all platforms.

Optimized programs hide products in libraries' calls and in kernels written by hand. A jaxpr shows
them all, once attention is XLA's, and without remat none is there twice. Loops count as often as
they run; those whose length the data decides, over chunks of masked rows, count once.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from md4vmd import build, partitioning, train, train_state
from md4vmd.interfaces import Batch


def batch_like(model: build.Model) -> Batch:
  """The shapes and shardings of a batch."""
  rows, length = model.run.batch_size, model.dataset.length
  array: Any = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=partitioning.of_batch(model.mesh)
  )
  return Batch(
    array((rows, length), jnp.int32),
    array((rows,), jnp.float32),
    array((rows,), jnp.int32),
    label_B=array((rows,), jnp.int32) if getattr(model.network, "classes", 0) else None,
  )


def of_step(config: Any, dataset: Any) -> float:
  """FLOPs of the products of one training step of a config, for its whole batch."""
  config = config.copy_and_resolve_references()
  for key, value in {"attention": "xla", "remat": "none"}.items():
    if key in config.network:
      config.network[key] = value
  config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1})
  model = build.model(config, stand_in=dataset, devices=jax.devices()[:1])
  with partitioning.use(model.mesh):
    step = train.compiled_step(model)
    return count(jax.make_jaxpr(step)(train_state.abstract(model), batch_like(model)).jaxpr)


def count(jaxpr: Any) -> float:
  """FLOPs of the products and convolutions of a jaxpr, those within it included."""
  total = 0.0
  for equation in jaxpr.eqns:
    parts = [count(each) for value in equation.params.values() for each in _jaxprs(value)]
    if equation.primitive.name == "cond":
      total += max(parts)
    elif parts:
      total += equation.params.get("length", 1) * sum(parts)
    else:
      total += _of_product(equation)
  return total


def _jaxprs(value):
  values = value if isinstance(value, tuple | list) else (value,)
  inner = (getattr(each, "jaxpr", each) for each in values)
  return [each for each in inner if hasattr(each, "eqns")]


def _of_product(equation):
  """2 x elements of the result x length of the sums."""
  name, params = equation.primitive.name, equation.params
  if name not in ("dot_general", "conv_general_dilated"):
    return 0.0
  left, right = (operand.aval.shape for operand in equation.invars[:2])
  if name == "dot_general":
    summed = [left[axis] for axis in params["dimension_numbers"][0][0]]
  else:
    features = params["dimension_numbers"].rhs_spec[0]
    summed = [size for axis, size in enumerate(right) if axis != features]
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(summed)
