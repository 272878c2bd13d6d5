"""Cosine schedule."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Cosine:
  """alpha(t) = 1 - cos(pi/2 (1 - t)) (MD4, arXiv 2406.04329, table 4)."""

  def alpha(self, t: jax.Array) -> jax.Array:
    """Probability that a token is visible at time t."""
    return 1.0 - self.masked(t)

  def masked(self, t: jax.Array) -> jax.Array:
    """1 - alpha, with all its digits near t = 0."""
    return jnp.sin(jnp.pi / 2 * t)  # cos(pi/2 (1 - t)), but exactly 0 at t = 0

  def dalpha(self, t: jax.Array) -> jax.Array:
    """Derivative of alpha."""
    return -jnp.pi / 2 * jnp.sin(jnp.pi / 2 * (1.0 - t))  # exactly 0 at t = 1

  def alpha_inverse(self, a: jax.Array) -> jax.Array:
    """The time at which alpha = a."""
    return 2 / jnp.pi * jnp.arcsin(1.0 - a)

  def weight(self, t: jax.Array) -> jax.Array:
    """-alpha' / (1 - alpha)."""
    return -self.dalpha(t) / self.masked(t)
