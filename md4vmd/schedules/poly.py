"""Polynomial schedule."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Poly:
  """alpha(t) = 1 - t^power (MD4, arXiv 2406.04329, table 4).

  Attributes:
    power: positive; a scalar, or an array that broadcasts against the times.
  """

  power: Any = 2.0

  def __post_init__(self):
    if isinstance(self.power, int | float) and not self.power > 0:
      raise ValueError(f"schedule power is {self.power}; it must be positive, for example 2.0")

  def alpha(self, t: jax.Array) -> jax.Array:
    """Probability that a token is visible at time t."""
    return 1.0 - t**self.power

  def masked(self, t: jax.Array) -> jax.Array:
    """1 - alpha, with all its digits near t = 0."""
    return t**self.power

  def dalpha(self, t: jax.Array) -> jax.Array:
    """Derivative of alpha."""
    return -self.power * t ** (self.power - 1.0)

  def alpha_inverse(self, a: jax.Array) -> jax.Array:
    """The time at which alpha = a."""
    return (1.0 - a) ** (1.0 / self.power)

  def weight(self, t: jax.Array) -> jax.Array:
    """-alpha' / (1 - alpha)."""
    return self.power / t * jnp.ones_like(t)
