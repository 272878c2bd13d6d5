"""What distributions of a latent and the families that a config names promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

PRIORS = ("standard", "learned", "conditional", "bayes")


class Support(NamedTuple):
  """Every value of a discrete latent: z_JxZ, and its log-probabilities log_p_BxGxJ."""

  z_JxZ: jax.Array
  log_p_BxGxJ: jax.Array


class Distribution(Protocol):
  """A distribution of the latents of a batch."""

  def sample(self, key_B: jax.Array, count: int) -> jax.Array:
    """z_BxKxGxZ, `count` draws under each key, differentiable in the distribution."""
    ...

  def log_prob(self, z_BxKxGxZ: jax.Array) -> jax.Array:
    """log p(z) in nats: [B, K, G]."""
    ...

  def expectation(self) -> jax.Array:
    """E z: [B, G, Z]."""
    ...

  def kl(self, other: Any) -> jax.Array | None:
    """KL(self || other) in nats, [B, G]; None where it has no closed form."""
    ...

  def support(self) -> Support | None:
    """Every value and its probability; None where they cannot be listed."""
    ...


class Family(Protocol):
  """What a config's `latent` section builds.

  Attributes:
    width: Z, the width of z as the denoiser sees it.
    prior: one of PRIORS.
    has_posterior: False where the latent is enumerated and needs no recognition network.
    posterior_size: raw outputs per group of the recognition network.
    prior_size: raw numbers per group of a learned or conditional prior.
  """

  @property
  def width(self) -> int: ...  # noqa: D102
  @property
  def prior(self) -> str: ...  # noqa: D102
  @property
  def has_posterior(self) -> bool: ...  # noqa: D102
  @property
  def posterior_size(self) -> int: ...  # noqa: D102
  @property
  def prior_size(self) -> int: ...  # noqa: D102

  def make_posterior(self, raw_BxGxS: jax.Array) -> Distribution:
    """q(z | x, x_t) from raw outputs; zeros give the standard prior."""
    ...

  def make_prior(self, raw_BxGxS: jax.Array) -> Distribution:
    """p(z) or p(z | x_t) from raw numbers; zeros give the standard prior."""
    ...

  def initial_prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Raw numbers from which a prior starts to learn."""
    ...


def draw(key_B: jax.Array, count: int, shape: tuple[int, ...], draw: Callable[..., Any]):
  """[B, K, *shape] of independent draws."""
  return jax.vmap(lambda key: draw(key, (count, *shape)))(key_B)


def check_prior(prior: str, family: str, allowed: tuple[str, ...]) -> None:
  """Raises ValueError where a family has no such prior."""
  if prior not in allowed:
    raise ValueError(f"latent prior '{prior}' of a {family} must be one of {', '.join(allowed)}")
