"""Which tokens attention sees, and the keys and values of those that were read before."""

from __future__ import annotations

from typing import Any

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


@flax.struct.dataclass
class Reach:
  """What the N tokens of one call see.

  Attributes:
    position_N: where each token stands in its sequence; None for 0, 1, ..., N-1.
    start: place of the first token in the cache; None without a cache.
    is_visible_NxM: behind a cache, whether token n sees place m; None without a cache.
    attends: without a cache, what a token sees, one of ATTENDS. "blocks" is of two streams.
    block_size: tokens of a block, for "blocks" alone.
  """

  position_N: Any = None
  start: Any = None
  is_visible_NxM: Any = None
  # Known while a program is made, for kernels whose own program depends on it.
  attends: str = flax.struct.field(pytree_node=False, default="all")
  block_size: int | None = flax.struct.field(pytree_node=False, default=None)

  def mask(self, count: int) -> Any:
    """Whether each of the `count` tokens sees each; None for "all" and "left"."""
    if self.block_size is None:
      return self.is_visible_NxM
    return is_visible_between_streams(count // 2, self.block_size)


def two_streams(length: int, block_size: int) -> Reach:
  """Noisy tokens followed by the clean ones, at the same positions (arXiv 2503.09573, section 3).

  Raises:
    ValueError: blocks that do not divide the length.
  """
  if length % block_size:
    raise ValueError(
      f"blocks of {block_size} do not divide {length} tokens; choose an objective.block_size "
      "that divides the length"
    )
  return Reach(np.tile(np.arange(length), 2), attends="blocks", block_size=block_size)


def is_visible_between_streams(length: int, block_size: int) -> np.ndarray:
  """is_visible_NxN of two streams of `length` tokens each, the noisy ones first.

  A noisy block sees itself and the clean blocks before it, a clean block itself and the clean
  blocks before it. So no prediction depends on the clean tokens of its own block or of later
  ones, and what a clean block computes depends on clean tokens alone.
  """
  block_N = np.tile(np.arange(length), 2) // block_size
  is_clean_N = np.repeat([False, True], length)
  is_own_NxN = block_N[:, None] == block_N[None, :]
  is_own_NxN &= is_clean_N[:, None] == is_clean_N[None, :]
  is_earlier_NxN = block_N[:, None] > block_N[None, :]
  return is_own_NxN | (is_earlier_NxN & is_clean_N[None, :])


def behind(cache: Cache, count: int, *, is_causal: bool) -> Reach:
  """`count` tokens behind those of a cache: they see them, and each other or those to the left."""
  position_N = cache.length + np.arange(count, dtype=np.int32)
  last_N = position_N if is_causal else jnp.full_like(position_N, position_N[-1])
  place_M = np.arange(cache.key_JxBxMxHxE.shape[2], dtype=np.int32)
  return Reach(position_N, cache.length, place_M[None, :] <= last_N[:, None])
