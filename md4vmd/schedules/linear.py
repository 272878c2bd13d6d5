"""Linear schedule."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Linear:
  """alpha(t) = 1 - t, so the bound's weight is 1 / t (MD4, arXiv 2406.04329, table 4)."""

  def alpha(self, t: jax.Array) -> jax.Array:
    """Probability that a token is visible at time t."""
    return 1.0 - t

  def masked(self, t: jax.Array) -> jax.Array:
    """1 - alpha."""
    return t

  def dalpha(self, t: jax.Array) -> jax.Array:
    """Derivative of alpha: -1."""
    return -jnp.ones_like(t)

  def alpha_inverse(self, a: jax.Array) -> jax.Array:
    """The time at which alpha = a."""
    return 1.0 - a

  def weight(self, t: jax.Array) -> jax.Array:
    """-alpha' / (1 - alpha)."""
    return 1.0 / t
