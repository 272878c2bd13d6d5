"""Which tokens attention sees, and the keys and values of those that were read before."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

ATTENDS = ("all", "left", "blocks")


@flax.struct.dataclass
class Cache:
  """Keys and values of the tokens read so far: J layers, M places, H heads of E features.

  Attributes:
    key_JxBxMxHxE: keys, turned to their positions; places from `length` on are empty.
    value_JxBxMxHxE: values.
    length: number of tokens read.
  """

  key_JxBxMxHxE: jax.Array
  value_JxBxMxHxE: jax.Array
  length: jax.Array

  def extended(self, key_JxBxKxHxE: jax.Array, value_JxBxKxHxE: jax.Array) -> Cache:
    """The cache with K more tokens; it must have room for them."""
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis=2)
    return Cache(
      put(self.key_JxBxMxHxE, key_JxBxKxHxE),
      put(self.value_JxBxMxHxE, value_JxBxKxHxE),
      self.length + key_JxBxKxHxE.shape[2],
    )


class Reach(NamedTuple):
  """What the N tokens of one call see.

  Attributes:
    position_N: where each token stands in its sequence; None for 0, 1, ..., N-1.
    is_visible_NxM: whether token n sees place m; None leaves it to the layer.
    start: place of the first token in the cache; None without a cache.
  """

  position_N: Any = None
  is_visible_NxM: Any = None
  start: Any = None


def two_streams(length: int, block_size: int) -> Reach:
  """Noisy tokens followed by the clean ones, at the same positions (arXiv 2503.09573, section 3).

  A noisy block sees itself and the clean blocks before it, a clean block itself and the clean
  blocks before it. So no prediction depends on the clean tokens of its own block or of later
  ones, and what a clean block computes depends on clean tokens alone.

  Raises:
    ValueError: blocks that do not divide the length.
  """
  if length % block_size:
    raise ValueError(
      f"blocks of {block_size} do not divide {length} tokens; choose an objective.block_size "
      "that divides the length"
    )
  position_N = np.tile(np.arange(length), 2)
  block_N, is_clean_N = position_N // block_size, np.repeat([False, True], length)
  is_own_NxN = block_N[:, None] == block_N[None, :]
  is_own_NxN &= is_clean_N[:, None] == is_clean_N[None, :]
  is_earlier_NxN = block_N[:, None] > block_N[None, :]
  return Reach(position_N, is_own_NxN | (is_earlier_NxN & is_clean_N[None, :]))


def behind(cache: Cache, count: int, *, is_causal: bool) -> Reach:
  """`count` tokens behind those of a cache: they see them, and each other or those to the left."""
  position_N = cache.length + np.arange(count, dtype=np.int32)
  last_N = position_N if is_causal else jnp.full_like(position_N, position_N[-1])
  place_M = np.arange(cache.key_JxBxMxHxE.shape[2], dtype=np.int32)
  return Reach(position_N, place_M[None, :] <= last_N[:, None], cache.length)
