"""Gaussian latents: a diagonal Gaussian, and the family whose posterior and prior it is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from md4vmd.latents.base import PRIORS, Support, check_prior, draw

_LARGEST_LOG_SCALE = 5.0


def log_normal(z: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
  """Log-density of a diagonal Gaussian, summed over the last axis."""
  standard = (z - mean) * jnp.exp(-log_scale)
  return jnp.sum(-0.5 * jnp.square(standard) - log_scale - 0.5 * math.log(2 * math.pi), axis=-1)


@flax.struct.dataclass
class Gaussian:
  """A diagonal Gaussian: mean_BxGxZ, log_scale_BxGxZ."""

  mean_BxGxZ: jax.Array
  log_scale_BxGxZ: jax.Array

  def sample(self, key_B: jax.Array, count: int) -> jax.Array:
    """See `Distribution.sample`."""
    noise_BxKxGxZ = draw(key_B, count, self.mean_BxGxZ.shape[1:], jax.random.normal)
    return self.mean_BxGxZ[:, None] + jnp.exp(self.log_scale_BxGxZ)[:, None] * noise_BxKxGxZ

  def log_prob(self, z_BxKxGxZ: jax.Array) -> jax.Array:
    """See `Distribution.log_prob`."""
    return log_normal(z_BxKxGxZ, self.mean_BxGxZ[:, None], self.log_scale_BxGxZ[:, None])

  def expectation(self) -> jax.Array:
    """See `Distribution.expectation`."""
    return self.mean_BxGxZ

  def kl(self, other: Any) -> jax.Array | None:
    """See `Distribution.kl`."""
    if not isinstance(other, Gaussian):
      return None
    log_ratio = self.log_scale_BxGxZ - other.log_scale_BxGxZ
    shift = (self.mean_BxGxZ - other.mean_BxGxZ) * jnp.exp(-other.log_scale_BxGxZ)
    return 0.5 * jnp.sum(jnp.exp(2 * log_ratio) + jnp.square(shift) - 1 - 2 * log_ratio, axis=-1)

  def support(self) -> Support | None:
    """See `Distribution.support`."""
    return None


def from_raw(raw_BxGxS: jax.Array) -> Gaussian:
  """The Gaussian of raw means and log-scales, S = 2Z; zeros give N(0, I)."""
  mean_BxGxZ, log_scale_BxGxZ = jnp.split(raw_BxGxS, 2, axis=-1)
  return Gaussian(mean_BxGxZ, jnp.clip(log_scale_BxGxZ, -_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE))


@dataclasses.dataclass(frozen=True)
class GaussianFamily:
  """A diagonal Gaussian posterior and prior (arXiv 2510.23606).

  Attributes:
    width: Z.
    prior: "standard" for N(0, I), "learned" for one Gaussian, "conditional" for a network of
      the visible tokens.
  """

  width: int = 8
  prior: str = "standard"
  has_posterior = True

  def __post_init__(self):
    check_prior(self.prior, "gaussian", PRIORS[:3])
    if self.width < 1:
      raise ValueError(f"latent width is {self.width}; it must be at least 1")

  @property
  def posterior_size(self) -> int:
    """Means and log-scales."""
    return 2 * self.width

  prior_size = posterior_size

  def make_posterior(self, raw_BxGxS: jax.Array) -> Gaussian:
    """See `Family.make_posterior`."""
    return from_raw(raw_BxGxS)

  make_prior = make_posterior

  def initial_prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """N(0, I)."""
    del key
    return jnp.zeros(shape)
