"""The forward process q(z_t | x): what is masked, and from which times and counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from md4vmd.interfaces import Batch, Schedule


def group_to_token(values_BxG: jax.Array, length: int) -> jax.Array:
  """Repeats a value per group for its consecutive tokens: [B, L]."""
  batch, groups = values_BxG.shape
  per_group = length // groups
  repeated = jnp.broadcast_to(values_BxG[:, :, None], (batch, groups, per_group))
  return repeated.reshape(batch, length)


def group_sums(values_BxL: jax.Array, groups: int) -> jax.Array:
  """Sum over the tokens of each group: [B, G]."""
  return values_BxL.reshape(values_BxL.shape[0], groups, -1).sum(-1)


def group_sizes(free_BxL: jax.Array, groups: int) -> jax.Array:
  """Number of free tokens of each group: [B, G]."""
  return group_sums(free_BxL, groups)


def masked_by_rate(rate_BxL: jax.Array, uniform_BxL: jax.Array, free_BxL: jax.Array) -> jax.Array:
  """is_masked_BxL: every free token independently with probability `rate`."""
  return (uniform_BxL < rate_BxL) & free_BxL


def masked_by_count(count_BxG: jax.Array, uniform_BxL: jax.Array, free_BxL: jax.Array) -> jax.Array:
  """is_masked_BxL: exactly `count` free tokens of each group, a uniformly drawn subset."""
  batch, groups = count_BxG.shape
  order = jnp.where(free_BxL, uniform_BxL, 2.0).reshape(batch, groups, -1)  # clues sort last
  rank = jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)
  is_masked_BxL = (rank < count_BxG[:, :, None]).reshape(free_BxL.shape)
  return is_masked_BxL & free_BxL


def count_from_uniform(u_BxG: jax.Array, size_BxG: jax.Array) -> jax.Array:
  """k = 1 + floor(size * u), uniform on {1..size}; 0 where a group has no free token."""
  k_BxG = 1 + jnp.floor(u_BxG * size_BxG).astype(jnp.int32)
  return jnp.minimum(k_BxG, size_BxG)  # rounding can carry size * u up to size


def reveal_probability(schedule: Schedule, t: jax.Array, s: jax.Array) -> jax.Array:
  """(alpha(s) - alpha(t)) / (1 - alpha(t)): a token masked at t is visible at the earlier time s.

  By the masked shares, because alpha itself rounds to 1 near t = 0.
  """
  return 1.0 - schedule.masked(s) / schedule.masked(t)


def mask_tokens(batch: Batch, is_masked_BxL: jax.Array, mask_id: int) -> jax.Array:
  """zt_BxL: the clean tokens with the chosen ones replaced by the mask."""
  return jnp.where(is_masked_BxL, mask_id, batch.x_BxL)
