"""A Gaussian latent under a prior of several Gaussians."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from md4vmd.latents.base import PRIORS, Support, check_prior, draw
from md4vmd.latents.gaussian import Gaussian, from_raw, log_normal


@flax.struct.dataclass
class Mixture:
  """A mixture of M diagonal Gaussians: logits_BxGxM, mean_BxGxMxZ, log_scale_BxGxMxZ."""

  logits_BxGxM: jax.Array
  mean_BxGxMxZ: jax.Array
  log_scale_BxGxMxZ: jax.Array

  def sample(self, key_B: jax.Array, count: int) -> jax.Array:
    """See `Distribution.sample`; not differentiable in the logits."""
    groups, components, width = self.mean_BxGxMxZ.shape[1:]
    noise_BxKxGxZ = draw(key_B, count, (groups, width), jax.random.normal)
    gumbel = lambda key, shape: jax.random.gumbel(jax.random.fold_in(key, 1), shape)
    gumbel_BxKxGxM = draw(key_B, count, (groups, components), gumbel)
    chosen_BxKxG = jnp.argmax(self.logits_BxGxM[:, None] + gumbel_BxKxGxM, axis=-1)
    pick = lambda x_BxGxMxZ: jnp.take_along_axis(
      x_BxGxMxZ[:, None], chosen_BxKxG[..., None, None], axis=3
    )[..., 0, :]
    return pick(self.mean_BxGxMxZ) + jnp.exp(pick(self.log_scale_BxGxMxZ)) * noise_BxKxGxZ

  def log_prob(self, z_BxKxGxZ: jax.Array) -> jax.Array:
    """See `Distribution.log_prob`."""
    log_p_BxKxGxM = log_normal(
      z_BxKxGxZ[..., None, :], self.mean_BxGxMxZ[:, None], self.log_scale_BxGxMxZ[:, None]
    )
    weight_BxGxM = jax.nn.log_softmax(self.logits_BxGxM)
    return jax.nn.logsumexp(weight_BxGxM[:, None] + log_p_BxKxGxM, axis=-1)

  def expectation(self) -> jax.Array:
    """See `Distribution.expectation`."""
    return jnp.einsum("bgm,bgmz->bgz", jax.nn.softmax(self.logits_BxGxM), self.mean_BxGxMxZ)

  def kl(self, other: Any) -> jax.Array | None:
    """See `Distribution.kl`."""
    return None

  def support(self) -> Support | None:
    """See `Distribution.support`."""
    return None


@dataclasses.dataclass(frozen=True)
class MixtureFamily:
  """A Gaussian posterior under a prior of several Gaussians.

  Attributes:
    width: Z.
    components: Gaussians of the prior.
    prior: "learned" or "conditional".
  """

  width: int = 8
  components: int = 16
  prior: str = "learned"
  has_posterior = True

  def __post_init__(self):
    check_prior(self.prior, "mixture", PRIORS[1:3])
    if self.width < 1 or self.components < 1:
      raise ValueError(
        f"latent width {self.width} and components {self.components} must be at least 1"
      )

  @property
  def posterior_size(self) -> int:
    """Means and log-scales."""
    return 2 * self.width

  @property
  def prior_size(self) -> int:
    """A logit, means and log-scales of every component."""
    return self.components * (1 + 2 * self.width)

  def make_posterior(self, raw_BxGxS: jax.Array) -> Gaussian:
    """See `Family.make_posterior`."""
    return from_raw(raw_BxGxS)

  def make_prior(self, raw_BxGxS: jax.Array) -> Mixture:
    """See `Family.make_prior`."""
    logits_BxGxM, rest = jnp.split(raw_BxGxS, [self.components], axis=-1)
    rest = rest.reshape(*rest.shape[:-1], self.components, 2 * self.width)
    each = from_raw(rest)
    return Mixture(logits_BxGxM, each.mean_BxGxZ, each.log_scale_BxGxZ)

  def initial_prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Equal weights, means drawn from N(0, I), scales of 1."""
    mean_MxZ = jax.random.normal(key, (self.components, self.width))
    rest_MxS = jnp.concatenate([mean_MxZ, jnp.zeros_like(mean_MxZ)], axis=-1)
    return jnp.concatenate([jnp.zeros(self.components), rest_MxS.ravel()]).reshape(shape)
