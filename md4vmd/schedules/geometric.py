"""Geometric schedule."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Geometric:
  """alpha(t) = exp(-b(t)), b(t) = beta_min^(1-t) beta_max^t (MD4, arXiv 2406.04329, table 4).

  It does not reach 1 and 0: a token is masked at t = 0 with probability 1 - exp(-beta_min) and
  visible at t = 1 with probability exp(-beta_max). The objective adds both end terms.
  """

  beta_min: float = 1e-5
  beta_max: float = 20.0

  def __post_init__(self):
    if not 0 < self.beta_min < self.beta_max:
      raise ValueError(
        f"geometric schedule has beta_min {self.beta_min} and beta_max {self.beta_max}; "
        "it needs 0 < beta_min < beta_max, for example 1e-5 and 20"
      )

  def _beta(self, t):
    return self.beta_min ** (1.0 - t) * self.beta_max**t

  @property
  def _log_ratio(self):
    return math.log(self.beta_max / self.beta_min)

  def alpha(self, t: jax.Array) -> jax.Array:
    """Probability that a token is visible at time t."""
    return jnp.exp(-self._beta(t))

  def masked(self, t: jax.Array) -> jax.Array:
    """1 - alpha, with all its digits near t = 0."""
    return -jnp.expm1(-self._beta(t))

  def dalpha(self, t: jax.Array) -> jax.Array:
    """Derivative of alpha."""
    return -self.alpha(t) * self._beta(t) * self._log_ratio

  def alpha_inverse(self, a: jax.Array) -> jax.Array:
    """The time at which alpha = a, clipped to [0, 1] where alpha does not reach a."""
    return jnp.clip(jnp.log(-jnp.log(a) / self.beta_min) / self._log_ratio, 0.0, 1.0)

  def weight(self, t: jax.Array) -> jax.Array:
    """-alpha' / (1 - alpha)."""
    beta = self._beta(t)
    return beta * self._log_ratio / jnp.expm1(beta)
