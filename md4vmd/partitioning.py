"""The mesh and where arrays live on it. No other module builds a mesh or a sharding."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from md4vmd import numerics
from md4vmd.interfaces import Batch

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = PartitionSpec(("data", "fsdp"))
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", "sequence"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", ("fsdp", "tensor")),  # the embedding; the head's other axis has taken fsdp
  ("vocab", "tensor"),
  ("layers", None),
)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  sequence: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """The mesh over all devices; one axis may be -1 and takes what is left.

  Args:
    data: copies of the parameters, each with its own rows of the batch.
    fsdp: parts that parameters and rows are both cut into.
    tensor: parts of heads, of MLP features and of the vocabulary.
    sequence: parts of a sequence, for inputs whose activations are too long for one device.
    devices: those of the mesh; None for all that the processes have.

  Raises:
    ValueError: the sizes do not multiply to the number of devices; the message says what fits.
  """
  devices = jax.devices() if devices is None else devices
  sizes = (data, fsdp, tensor, sequence)
  fixed = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f"mesh {_show(sizes)} needs positive sizes and at most one -1")
  if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
    fitting = "; ".join(map(_show, _nearest(sizes, len(devices))))
    raise ValueError(
      f"mesh {_show(sizes)} does not fit {len(devices)} devices; the nearest that do: {fitting}; "
      "or set one axis to -1, which takes what is left"
    )
  shape = [len(devices) // fixed if size == -1 else size for size in sizes]
  # Splitting a physical axis of a slice costs bandwidth, and refusing fsdp=8 on 4x4 chips more.
  grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _show(sizes: Sequence[int]) -> str:
  return ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))


def _nearest(sizes: Sequence[int], devices: int, count: int = 3) -> list[tuple[int, ...]]:
  """Meshes of that many devices, those that change the sizes asked for by the least factors."""
  divisors = [size for size in range(1, devices + 1) if devices % size == 0]
  fitting = (
    shape for shape in itertools.product(divisors, repeat=len(sizes)) if math.prod(shape) == devices
  )

  def distance(shape):
    pairs = zip(shape, sizes, strict=True)
    change = sum(abs(math.log(size / asked)) for size, asked in pairs if asked != -1)
    return round(change, 9), shape[::-1]

  return sorted(fitting, key=distance)[:count]


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
      leaf.shape,
      leaf.dtype,
      sharding=NamedSharding(mesh, numerics.fitting(mesh, leaf.shape, sharding.spec)),
    ),
    abstract,
    shardings,
  )


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


def check_length(mesh: Mesh, length: int) -> None:
  """Refuses sequences that the mesh cannot cut.

  Raises:
    ValueError: the axis `sequence` does not divide the length.
  """
  if length % mesh.shape["sequence"]:
    raise ValueError(
      f"mesh.sequence {mesh.shape['sequence']} does not divide sequences of {length} tokens; "
      "choose a divisor of data.length"
    )


def round_up(mesh: Mesh, batch_size: int) -> int:
  """The smallest size that is no less and divides over the mesh."""
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  return -(-batch_size // rows) * rows


class Share(TypedDict):
  """Which rows of a batch a process reads, as the arguments of `data.loader`.

  Attributes:
    parts: number of equal parts of the rows.
    own: those that the process reads, in ascending order.
  """

  parts: int
  own: tuple[int, ...]


def share(mesh: Mesh) -> Share:
  """The rows of a batch that this process reads, which are those that its devices hold.

  They need not follow each other: the mesh of a slice goes along its wires and not from host to
  host. Processes whose devices hold the same rows, as where `tensor` spans several, read the same.

  Raises:
    ValueError: a process would need a part of another's rows.
  """
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  held: dict[int, set[int]] = {}
  for device, (index,) in of_batch(mesh).devices_indices_map((rows,)).items():
    held.setdefault(device.process_index, set()).update(range(rows)[index])
  shares = {tuple(sorted(part)) for part in held.values()}
  if sum(map(len, shares)) != rows:
    raise ValueError(
      f"mesh {_show(tuple(mesh.shape.values()))} cuts rows across the devices of a process; let "
      "tensor x sequence divide the devices of one process, or be a multiple of them"
    )
  own = sorted(held[jax.process_index()])
  size = max(size for size in range(1, len(own) + 1) if _is_cut(own, rows, size))
  return {"parts": rows // size, "own": tuple(row // size for row in own[::size])}


def _is_cut(own: Sequence[int], rows: int, size: int) -> bool:
  """Whether the rows of a process are whole parts of that size."""
  whole = {part * size + i for part in {row // size for row in own} for i in range(size)}
  return rows % size == 0 and whole == set(own)


def of_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose rows are those of a batch."""
  return NamedSharding(mesh, BATCH)


def put_batch(mesh: Mesh, arrays: Mapping[str, np.ndarray]) -> Batch:
  """The global Batch on the mesh, from the rows that this process read."""
  sharding = of_batch(mesh)
  return Batch(
    **{
      name: jax.make_array_from_process_local_data(sharding, array)
      for name, array in arrays.items()
    }
  )


def put_like(tree: Any, template: Any) -> Any:
  """Global arrays of a tree of numpy arrays that every process has whole, laid out as another."""
  return jax.tree.map(
    lambda x, like: jax.make_array_from_callback(like.shape, like.sharding, lambda cut: x[cut]),
    tree,
    template,
  )


def to_host(tree: Any) -> Any:
  """Numpy copies of global arrays, the same on every process."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, tree)
  return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
