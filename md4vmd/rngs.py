"""Named streams of random keys, and the low-discrepancy noise of a batch.

No key is stored anywhere: a key is a function of (seed, step, name), so a resumed run draws what
the straight run would have drawn. Names are hashed with CRC-32, which is the same everywhere.
"""

from __future__ import annotations

import zlib

import flax.struct
import jax
import jax.numpy as jnp

_GOLDEN_RATIO_32 = 2654435769  # 2**32 / golden ratio: index * this mod 2**32 is well spread


def named(key: jax.Array, name: str) -> jax.Array:
  """The key of the stream `name` under `key`."""
  return jax.random.fold_in(key, _number(name))


def _number(name: str) -> int:
  return zlib.crc32(name.encode())


def stream(seed: int, step: jax.Array | int, name: str) -> jax.Array:
  """The key of stream `name` at a training step: a function of its arguments alone."""
  return jax.random.fold_in(named(jax.random.key(seed), name), step)


def fold_each(key_B: jax.Array, data: jax.Array | int) -> jax.Array:
  """One key per example under each of key_B."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, data)


def uniform_each(key_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """U[0, 1) of the given shape under each key: [B, *shape]."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape))(key_B)


@flax.struct.dataclass
class Noise:
  """Randomness of a batch: one key and one place on a low-discrepancy grid per example.

  Attributes:
    rotation_key: scalar key from which every grid draws its one uniform rotation.
    key_B: one key per example.
    place_B: the example's place in [0, 1) on the grid.
    spacing: distance to the next place, which the groups of one example share out.
  """

  rotation_key: jax.Array
  key_B: jax.Array
  place_B: jax.Array
  spacing: jax.Array

  def grid(self, name: str, groups: int) -> jax.Array:
    """u_BxG on a rotated grid over all B*G pairs; each u alone is exactly U[0, 1)."""
    rotation = jax.random.uniform(named(self.rotation_key, name))
    offset_G = jnp.arange(groups) * (self.spacing / groups)
    u_BxG = (self.place_B[:, None] + offset_G[None, :] + rotation) % 1.0
    return jnp.minimum(u_BxG, 1.0 - jnp.finfo(u_BxG.dtype).epsneg)

  def uniform(self, name: str, shape: tuple[int, ...]) -> jax.Array:
    """U[0, 1) of the given shape for every example: [B, *shape]."""
    return uniform_each(self.keys(name), shape)

  def keys(self, name: str) -> jax.Array:
    """key_B, one key per example."""
    return fold_each(self.key_B, _number(name))

  def beta(self, name: str, a_BxG: jax.Array, b_BxG: jax.Array) -> jax.Array:
    """Beta(a, b) draws, [B, G]."""
    draw = lambda key, a_G, b_G: jax.random.beta(named(key, name), a_G, b_G)
    return jax.vmap(draw)(self.key_B, a_BxG, b_BxG)


def batch_noise(key: jax.Array, batch_size: int) -> Noise:
  """Noise of a training step: example b sits at place b / B of the grid."""
  place_B = jnp.arange(batch_size) / batch_size
  return Noise(
    key,
    jax.random.split(named(key, "examples"), batch_size),
    place_B,
    jnp.float32(1.0 / batch_size),
  )


def example_noise(key: jax.Array, index_B: jax.Array, draw: jax.Array, draws: int) -> Noise:
  """Noise of an evaluation: a function of (key, index, draw), not of the batch it came in.

  Over the examples the places form a golden-ratio sequence; over the draws of one example they
  form an even grid.
  """
  place_key = lambda index: jax.random.fold_in(jax.random.fold_in(key, index), draw)
  spread_B = index_B.astype(jnp.uint32) * jnp.uint32(_GOLDEN_RATIO_32)
  place_B = (spread_B >> 8).astype(jnp.float32) / 2**24 + draw / draws
  return Noise(key, jax.vmap(place_key)(index_B), place_B % 1.0, jnp.float32(1.0 / draws))
