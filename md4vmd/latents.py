"""Latent variables: distributions over z, and the families that a config names.

A distribution is of the latents of a batch, one per group: z_BxKxGxZ are K draws of each. A family
turns the raw outputs of networks into distributions. A new family is one class and one line of
TABLE.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

PRIORS = ("standard", "learned", "conditional", "bayes")
_LARGEST_LOG_SCALE = 5.0
_MOST_ENUMERATED = 1024  # unless asked for
_LARGEST_TABLE = 65_536


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


def _draw(key_B: jax.Array, count: int, shape: tuple[int, ...], draw: Callable[..., Any]):
  """[B, K, *shape] of independent draws."""
  return jax.vmap(lambda key: draw(key, (count, *shape)))(key_B)


def _log_normal(z: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
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
    noise_BxKxGxZ = _draw(key_B, count, self.mean_BxGxZ.shape[1:], jax.random.normal)
    return self.mean_BxGxZ[:, None] + jnp.exp(self.log_scale_BxGxZ)[:, None] * noise_BxKxGxZ

  def log_prob(self, z_BxKxGxZ: jax.Array) -> jax.Array:
    """See `Distribution.log_prob`."""
    return _log_normal(z_BxKxGxZ, self.mean_BxGxZ[:, None], self.log_scale_BxGxZ[:, None])

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


@flax.struct.dataclass
class Mixture:
  """A mixture of M diagonal Gaussians: logits_BxGxM, mean_BxGxMxZ, log_scale_BxGxMxZ."""

  logits_BxGxM: jax.Array
  mean_BxGxMxZ: jax.Array
  log_scale_BxGxMxZ: jax.Array

  def sample(self, key_B: jax.Array, count: int) -> jax.Array:
    """See `Distribution.sample`; not differentiable in the logits."""
    groups, components, width = self.mean_BxGxMxZ.shape[1:]
    noise_BxKxGxZ = _draw(key_B, count, (groups, width), jax.random.normal)
    gumbel = lambda key, shape: jax.random.gumbel(jax.random.fold_in(key, 1), shape)
    gumbel_BxKxGxM = _draw(key_B, count, (groups, components), gumbel)
    chosen_BxKxG = jnp.argmax(self.logits_BxGxM[:, None] + gumbel_BxKxGxM, axis=-1)
    pick = lambda x_BxGxMxZ: jnp.take_along_axis(
      x_BxGxMxZ[:, None], chosen_BxKxG[..., None, None], axis=3
    )[..., 0, :]
    return pick(self.mean_BxGxMxZ) + jnp.exp(pick(self.log_scale_BxGxMxZ)) * noise_BxKxGxZ

  def log_prob(self, z_BxKxGxZ: jax.Array) -> jax.Array:
    """See `Distribution.log_prob`."""
    log_p_BxKxGxM = _log_normal(
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


@flax.struct.dataclass
class Codes:
  """C codes of A classes each, as one-hot vectors times `scale`: Z = C * A.

  A mixture of M products: log_weight_BxGxM and log_p_BxGxMxCxA. M = 1 is a product of codes; a
  posterior is one. Draws are straight-through: forward a code, backward its Gumbel-softmax.

  Attributes:
    log_weight_BxGxM: normalised log-weights of the products.
    log_p_BxGxMxCxA: normalised log-probabilities of every code.
    scale: of the one-hot vectors.
    temperature: of the Gumbel-softmax.
  """

  log_weight_BxGxM: jax.Array
  log_p_BxGxMxCxA: jax.Array
  scale: float = flax.struct.field(pytree_node=False, default=1.0)
  temperature: float = flax.struct.field(pytree_node=False, default=1.0)

  def sample(self, key_B: jax.Array, count: int) -> jax.Array:
    """See `Distribution.sample`; not differentiable in the weights of a mixture."""
    groups, products, codes, classes = self.log_p_BxGxMxCxA.shape[1:]
    gumbel = lambda stream: (
      lambda key, shape: jax.random.gumbel(jax.random.fold_in(key, stream), shape)
    )
    noise_BxKxGxM = _draw(key_B, count, (groups, products), gumbel(0))
    chosen_BxKxG = jnp.argmax(self.log_weight_BxGxM[:, None] + noise_BxKxGxM, axis=-1)
    log_p_BxKxGxCxA = jnp.take_along_axis(
      self.log_p_BxGxMxCxA[:, None], chosen_BxKxG[..., None, None, None], axis=3
    )[:, :, :, 0]
    score = log_p_BxKxGxCxA + _draw(key_B, count, (groups, codes, classes), gumbel(1))
    hard = jax.nn.one_hot(jnp.argmax(score, axis=-1), classes)
    soft = jax.nn.softmax(score / self.temperature)
    through = jax.lax.stop_gradient(hard - soft) + soft
    return self.scale * through.reshape(*through.shape[:-2], codes * classes)

  def log_prob(self, z_BxKxGxZ: jax.Array) -> jax.Array:
    """See `Distribution.log_prob`; its gradient in z reaches straight-through draws."""
    codes, classes = self.log_p_BxGxMxCxA.shape[-2:]
    one_hot = (z_BxKxGxZ / self.scale).reshape(*z_BxKxGxZ.shape[:-1], codes, classes)
    log_p_BxKxGxM = jnp.einsum("bkgca,bgmca->bkgm", one_hot, self.log_p_BxGxMxCxA)
    return jax.nn.logsumexp(self.log_weight_BxGxM[:, None] + log_p_BxKxGxM, axis=-1)

  def expectation(self) -> jax.Array:
    """See `Distribution.expectation`."""
    weight_BxGxM, p_BxGxMxCxA = jnp.exp(self.log_weight_BxGxM), jnp.exp(self.log_p_BxGxMxCxA)
    mean_BxGxCxA = jnp.einsum("bgm,bgmca->bgca", weight_BxGxM, p_BxGxMxCxA)
    return self.scale * mean_BxGxCxA.reshape(*mean_BxGxCxA.shape[:2], -1)

  def kl(self, other: Any) -> jax.Array | None:
    """See `Distribution.kl`: closed between products of codes."""
    if self.log_p_BxGxMxCxA.shape[2] > 1 or other.log_p_BxGxMxCxA.shape[2] > 1:
      return None
    log_q, log_p = self.log_p_BxGxMxCxA[:, :, 0], other.log_p_BxGxMxCxA[:, :, 0]
    return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=(-2, -1))

  def support(self) -> Support | None:
    """See `Distribution.support`: too many to list, or they would be a `Table`."""
    return None


@flax.struct.dataclass
class Table:
  """C codes of A classes each under one joint table: logits_BxGxJ over all J = A^C values.

  Attributes:
    logits_BxGxJ: of the values, the last code varying fastest.
    codes: C.
    classes: A.
    scale: of the one-hot vectors.
  """

  logits_BxGxJ: jax.Array
  codes: int = flax.struct.field(pytree_node=False)
  classes: int = flax.struct.field(pytree_node=False)
  scale: float = flax.struct.field(pytree_node=False)

  def sample(self, key_B: jax.Array, count: int) -> jax.Array:
    """See `Distribution.sample`; not differentiable."""
    gumbel_BxKxGxJ = _draw(key_B, count, self.logits_BxGxJ.shape[1:], jax.random.gumbel)
    chosen_BxKxG = jnp.argmax(self.logits_BxGxJ[:, None] + gumbel_BxKxGxJ, axis=-1)
    return self.support().z_JxZ[chosen_BxKxG]

  def log_prob(self, z_BxKxGxZ: jax.Array) -> jax.Array:
    """See `Distribution.log_prob`."""
    value_BxKxGxC = z_BxKxGxZ.reshape(*z_BxKxGxZ.shape[:-1], self.codes, -1).argmax(-1)
    number_BxKxG = value_BxKxGxC @ (self.classes ** np.arange(self.codes)[::-1])
    log_p_BxGxJ = jax.nn.log_softmax(self.logits_BxGxJ)
    return jnp.take_along_axis(log_p_BxGxJ[:, None], number_BxKxG[..., None], axis=-1)[..., 0]

  def expectation(self) -> jax.Array:
    """See `Distribution.expectation`."""
    return jax.nn.softmax(self.logits_BxGxJ) @ self.support().z_JxZ

  def kl(self, other: Any) -> jax.Array | None:
    """See `Distribution.kl`."""
    return None

  def support(self) -> Support:
    """See `Distribution.support`."""
    value_CxJ = np.indices((self.classes,) * self.codes).reshape(self.codes, -1)
    one_hot_JxCxA = self.scale * jax.nn.one_hot(value_CxJ.T, self.classes)
    z_JxZ = one_hot_JxCxA.reshape(-1, self.codes * self.classes)
    return Support(z_JxZ, jax.nn.log_softmax(self.logits_BxGxJ))


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


def _check_prior(prior: str, family: str, allowed: tuple[str, ...]) -> None:
  if prior not in allowed:
    raise ValueError(f"latent prior '{prior}' of a {family} must be one of {', '.join(allowed)}")


def _gaussian(raw_BxGxS: jax.Array) -> Gaussian:
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
    _check_prior(self.prior, "gaussian", PRIORS[:3])
    if self.width < 1:
      raise ValueError(f"latent width is {self.width}; it must be at least 1")

  @property
  def posterior_size(self) -> int:
    """Means and log-scales."""
    return 2 * self.width

  prior_size = posterior_size

  def make_posterior(self, raw_BxGxS: jax.Array) -> Gaussian:
    """See `Family.make_posterior`."""
    return _gaussian(raw_BxGxS)

  make_prior = make_posterior

  def initial_prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """N(0, I)."""
    del key
    return jnp.zeros(shape)


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
    _check_prior(self.prior, "mixture", PRIORS[1:3])
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
    return _gaussian(raw_BxGxS)

  def make_prior(self, raw_BxGxS: jax.Array) -> Mixture:
    """See `Family.make_prior`."""
    logits_BxGxM, rest = jnp.split(raw_BxGxS, [self.components], axis=-1)
    rest = rest.reshape(*rest.shape[:-1], self.components, 2 * self.width)
    each = _gaussian(rest)
    return Mixture(logits_BxGxM, each.mean_BxGxZ, each.log_scale_BxGxZ)

  def initial_prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Equal weights, means drawn from N(0, I), scales of 1."""
    mean_MxZ = jax.random.normal(key, (self.components, self.width))
    rest_MxS = jnp.concatenate([mean_MxZ, jnp.zeros_like(mean_MxZ)], axis=-1)
    return jnp.concatenate([jnp.zeros(self.components), rest_MxS.ravel()]).reshape(shape)


@dataclasses.dataclass(frozen=True)
class CategoricalFamily:
  """Codes with a joint prior.

  Few codes have one table of probabilities and are enumerated: the likelihood is an exact sum and
  there is no recognition network. More are drawn straight-through, under a mixture of products.

  Attributes:
    codes: C.
    classes: A, of each code.
    scale: of the one-hot vectors that the denoiser sees.
    components: products of codes whose mixture is the prior where there is no table.
    temperature: of the straight-through gradient.
    enumerated: None enumerates up to 1024 values.
    prior: "learned"; "conditional" on the visible tokens, by a network; or "bayes", p(z | x_t) in
      proportion to a learned p(z) times the probability that one step from all masked gives what
      is visible in x_t, for enumerated codes.
  """

  codes: int = 1
  classes: int = 32
  scale: float = 4.0
  components: int = 1
  temperature: float = 1.0
  enumerated: bool | None = None
  prior: str = "learned"

  def __post_init__(self):
    _check_prior(self.prior, "categorical", PRIORS[1:])
    least = {"codes": 1, "classes": 2, "components": 1}
    for name, smallest in least.items():
      if getattr(self, name) < smallest:
        raise ValueError(f"latent {name} is {getattr(self, name)}; it must be at least {smallest}")
    if self.enumerated and self.classes**self.codes > _LARGEST_TABLE:
      raise ValueError(
        f"latent codes {self.codes} of {self.classes} classes have {self.classes**self.codes:,} "
        f"values; at most {_LARGEST_TABLE:,} are enumerated: leave latent.enumerated out"
      )
    if self.prior == "bayes" and self.has_posterior:
      raise ValueError(
        f"latent prior 'bayes' goes through all values and these {self.classes**self.codes:,} are "
        "not enumerated; set latent.enumerated=True or fewer codes or classes"
      )
    if self.scale <= 0 or self.temperature <= 0:
      raise ValueError(
        f"latent scale {self.scale} and temperature {self.temperature} must be positive"
      )

  @property
  def width(self) -> int:
    """Z = C * A."""
    return self.codes * self.classes

  @property
  def has_posterior(self) -> bool:
    """True where the codes are not enumerated."""
    if self.enumerated is None:
      return self.classes**self.codes > _MOST_ENUMERATED
    return not self.enumerated

  @property
  def posterior_size(self) -> int:
    """A logit per class of every code."""
    return self.width

  @property
  def prior_size(self) -> int:
    """Logits of the table, or of the components and of their classes."""
    if not self.has_posterior:
      return self.classes**self.codes
    return self.components * (1 + self.width)

  def make_posterior(self, raw_BxGxS: jax.Array) -> Codes:
    """See `Family.make_posterior`."""
    return self._mixture(jnp.zeros((*raw_BxGxS.shape[:-1], 1)), raw_BxGxS)

  def make_prior(self, raw_BxGxS: jax.Array) -> Codes | Table:
    """See `Family.make_prior`."""
    if not self.has_posterior:
      return Table(raw_BxGxS, self.codes, self.classes, self.scale)
    logits_BxGxM, rest = jnp.split(raw_BxGxS, [self.components], axis=-1)
    return self._mixture(logits_BxGxM, rest)

  def initial_prior(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Equal probabilities, but for what tells the products of a mixture apart."""
    return jax.random.normal(key, shape) if self.components > 1 else jnp.zeros(shape)

  def _mixture(self, logits_BxGxM, raw_BxGxS):
    shape = (*logits_BxGxM.shape, self.codes, self.classes)
    return Codes(
      jax.nn.log_softmax(logits_BxGxM),
      jax.nn.log_softmax(raw_BxGxS.reshape(shape)),
      self.scale,
      self.temperature,
    )


TABLE = {
  "gaussian": GaussianFamily,
  "mixture": MixtureFamily,
  "categorical": CategoricalFamily,
}
