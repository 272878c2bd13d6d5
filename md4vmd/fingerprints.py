"""What tells a damaged file from another one: sums of the bits of arrays, and sealed records."""

from __future__ import annotations

import functools
import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

_WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class DamagedError(ValueError):
  """What was written cannot be read back as it was."""


def by_name(tree: Any) -> dict[str, Any]:
  """Leaves of a tree by their path, such as `params/layers/kernel`, in the order of the tree."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


@jax.jit
def sum_bits(x: jax.Array) -> jax.Array:
  """A uint32 that changes with any single word of `x`, the same on any sharding.

  Every word is salted with its position and goes through the murmur3 finaliser, a bijection;
  their sum modulo 2^32 needs no order, so a sharded array is never gathered.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  word = jax.lax.bitcast_convert_type(x, _WORD[x.dtype.itemsize]).astype(jnp.uint32)
  position = jnp.zeros(word.shape, jnp.uint32)
  for axis in range(word.ndim):
    stride = math.prod(word.shape[axis + 1 :]) % 2**32
    index = jax.lax.broadcasted_iota(jnp.uint32, word.shape, axis)
    position += index * jnp.uint32(stride)
  word ^= position * jnp.uint32(0x9E3779B9)
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return (word ^ (word >> 16)).sum(dtype=jnp.uint32)


# One program: many small ones in flight, each with a collective, deadlock on CPU meshes.
_sums = jax.jit(functools.partial(jax.tree.map, sum_bits))


def describe(state: Any) -> dict[str, list]:
  """[shape, dtype, sum of the bits] of every leaf by path.

  Raises:
    ValueError: a leaf is no plain array.
  """
  leaves = by_name(state)
  for name, leaf in leaves.items():
    kind = getattr(leaf, "dtype", None)
    if kind is None or not (jnp.issubdtype(kind, jnp.number) or kind == jnp.bool_):
      raise ValueError(f"{name} is a {type(leaf).__name__} of {kind}; a state holds plain arrays")
  sums = jax.device_get(_sums(leaves))
  return {name: [list(x.shape), x.dtype.name, int(sums[name])] for name, x in leaves.items()}


def _checksum(record: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True, allow_nan=False).encode())


def seal(record: dict[str, Any]) -> dict[str, Any]:
  """The record as JSON gives it back, with its CRC-32 under "crc32"."""
  record = json.loads(json.dumps(record))  # keys become strings and tuples lists, as on disk
  return {**record, "crc32": _checksum(record)}


def unseal(text: str) -> dict[str, Any]:
  """The record that was sealed.

  Raises:
    DamagedError: it does not match its checksum.
  """
  record = json.loads(text)
  if record.pop("crc32") != _checksum(record):
    raise DamagedError("its record does not match its checksum")
  return record
