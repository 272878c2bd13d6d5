"""Categorical latents: codes of classes, drawn or enumerated, and their family."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from md4vmd.latents.base import PRIORS, Support, check_prior, draw

_MOST_ENUMERATED = 1024  # unless asked for
_LARGEST_TABLE = 65_536


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
    noise_BxKxGxM = draw(key_B, count, (groups, products), gumbel(0))
    chosen_BxKxG = jnp.argmax(self.log_weight_BxGxM[:, None] + noise_BxKxGxM, axis=-1)
    log_p_BxKxGxCxA = jnp.take_along_axis(
      self.log_p_BxGxMxCxA[:, None], chosen_BxKxG[..., None, None, None], axis=3
    )[:, :, :, 0]
    score = log_p_BxKxGxCxA + draw(key_B, count, (groups, codes, classes), gumbel(1))
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
    gumbel_BxKxGxJ = draw(key_B, count, self.logits_BxGxJ.shape[1:], jax.random.gumbel)
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
    check_prior(self.prior, "categorical", PRIORS[1:])
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
