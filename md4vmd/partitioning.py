"""The mesh and where arrays live on it. No other module builds a mesh or a sharding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from md4vmd.interfaces import Batch

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("layers", None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """The mesh over all devices; one axis may be -1 and takes what is left.

  Raises:
    ValueError: the sizes do not multiply to the number of devices; the message says what fits.
  """
  devices = jax.device_count()
  sizes = [data, fsdp, tensor]
  asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
  fixed = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"mesh {asked} needs positive sizes and at most one -1")
  if devices % fixed or (-1 not in sizes and fixed != devices):
    raise ValueError(
      f"mesh {asked} does not fit {devices} devices; set one axis to -1, for "
      f"example data=-1, fsdp=1, tensor=1"
    )
  shape = [devices // fixed if size == -1 else size for size in sizes]
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
  """Within it, logical names of parameters and activations refer to this mesh."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def placed(mesh: Mesh, init: Callable[[], Any]) -> Any:
  """`jax.ShapeDtypeStruct`s with shardings of the tree that `init` returns.

  Args:
    mesh: the mesh in use.
    init: makes a tree whose leaves carry logical names in flax boxes; the boxes are removed.
  """
  boxed = jax.eval_shape(init)
  specs = nn.get_partition_spec(boxed)
  shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
  abstract = jax.eval_shape(nn.unbox, boxed)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=_divisible(leaf, sharding)
    ),
    abstract,
    shardings,
  )


def _divisible(leaf: Any, sharding: NamedSharding) -> NamedSharding:
  """Drops mesh axes that do not divide the array's axis."""
  mesh, spec = sharding.mesh, []
  for size, axis in zip(leaf.shape, (*sharding.spec, *(None,) * leaf.ndim), strict=False):
    names = (axis,) if isinstance(axis, str) else axis or ()
    spec.append(axis if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*spec))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int) -> None:
  """Refuses a batch, or microbatch, that the mesh cannot share out.

  Raises:
    ValueError: it does not divide over data x fsdp.
  """
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % rows:
    raise ValueError(
      f"{batch_size} examples (run.batch_size / run.microbatches) do not divide over data x fsdp "
      f"= {rows} devices; make it a multiple of {rows}"
    )


def round_up(mesh: Mesh, batch_size: int) -> int:
  """The smallest size that is no less and divides over the mesh and over the processes."""
  rows = math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())
  return -(-batch_size // rows) * rows


def put_batch(mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> Batch:
  """The global Batch on the mesh, from the rows that this process read."""
  sharding = NamedSharding(mesh, BATCH)
  return Batch(
    **{
      name: jax.make_array_from_process_local_data(sharding, array)
      for name, array in arrays.items()
    }
  )


def to_host(tree: Any) -> Any:
  """Numpy copies of global arrays, the same on every process."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, tree)
  return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
