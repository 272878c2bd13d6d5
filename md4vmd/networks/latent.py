"""A denoiser with a latent, its recognition network and its prior (arXiv 2510.23606)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from md4vmd import latents
from md4vmd.interfaces import Prediction
from md4vmd.networks.reach import Cache
from md4vmd.networks.transformer import Reader, Transformer
from md4vmd.networks.unet import ImageReader, UNet

# An optimizer that moves all parameters alike would take long to move the logits of a table of
# hundreds, of which a batch shows few.
_TABLE_GAIN = 10.0


class LatentNetwork(nn.Module):
  """mu(z_t, t, z), q(z | x, z_t) and p(z | z_t).

  Attributes:
    denoiser: a transformer or a U-Net whose latent_width is the family's width.
    family: of the latent.
    recognition: reads what is known and what is to be revealed; None where the latent is
      enumerated.
    prior_reader: reads what is visible; None for a prior that is the same everywhere.

  A sequence has one latent, or one per block where the denoiser attends to blocks.
  """

  denoiser: Transformer | UNet
  family: latents.Family
  recognition: Reader | ImageReader | None
  prior_reader: Reader | ImageReader | None

  @property
  def classes(self) -> int:
    """Number of labels of a class-conditional model."""
    return self.denoiser.classes

  @property
  def attends(self) -> str:
    """What the denoiser's tokens see."""
    return self.denoiser.attends

  @property
  def block_size(self) -> int | None:
    """Tokens of a block, and of a latent; None where a sequence is one."""
    return self.denoiser.block_size

  @property
  def absolute_positions(self) -> bool:
    """Whether it knows positions up to the length that it was trained on alone."""
    return self.denoiser.absolute_positions

  def empty_cache(self, batch: int, length: int) -> Cache:
    """The denoiser's."""
    assert isinstance(self.denoiser, Transformer)
    return self.denoiser.empty_cache(batch, length)

  def _groups(self, tokens_BxL):
    return tokens_BxL.shape[1] // self.block_size if self.block_size else 1

  def __call__(
    self,
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None = None,
    *,
    label_B: jax.Array | None = None,
    latent_BxGxZ: jax.Array | None = None,
    deterministic: bool = True,
    **streams: Any,
  ) -> Prediction | tuple[Prediction, Cache]:
    """The denoiser; without a latent it is the network with its latent switched off."""
    if self.is_initializing():  # no role may lack its parameters
      self.prior(zt_BxL, label_B=label_B)
      if self.recognition is not None:
        self.encode(zt_BxL, zt_BxL, zt_BxL == 0, label_B=label_B)
    return self.denoiser(
      zt_BxL,
      t_BxG,
      label_B=label_B,
      latent_BxGxZ=latent_BxGxZ,
      deterministic=deterministic,
      **streams,
    )

  def encode(
    self,
    x_BxL: jax.Array,
    zt_BxL: jax.Array,
    where_BxL: jax.Array,
    *,
    label_B: jax.Array | None = None,
  ) -> latents.Distribution:
    """q(z | x_S, z_t): z_t and the clean tokens of the positions S, `where`."""
    assert self.recognition is not None
    tokens_BxL = jnp.where(where_BxL, x_BxL, zt_BxL)
    groups = self._groups(tokens_BxL)
    return self.family.make_posterior(self.recognition(tokens_BxL, where_BxL, groups, label_B))

  @nn.compact
  def prior(self, zt_BxL: jax.Array, *, label_B: jax.Array | None = None) -> latents.Distribution:
    """p(z | z_t), the same for every z_t unless there is a reader."""
    size, groups = self.family.prior_size, self._groups(zt_BxL)
    raw_BxGxS = jnp.zeros((zt_BxL.shape[0], groups, size))
    if self.family.prior != "standard":
      raw_S = self.param("prior_raw", self.family.initial_prior, (size,))
      raw_BxGxS += raw_S[None, None]
    if self.prior_reader is not None:
      raw_BxGxS += self.prior_reader(zt_BxL, jnp.zeros_like(zt_BxL), groups, label_B)
    if self.family.prior == "bayes":
      raw_BxGxS = _TABLE_GAIN * raw_BxGxS + self._log_likelihood(zt_BxL)[:, None]
    return self.family.make_prior(raw_BxGxS)

  def _log_likelihood(self, zt_BxL):
    """log p(what is visible | z) in one step from all masked, for every value of z: [B, J]."""
    vocab_size = self.denoiser.vocab_size
    support = self.family.make_prior(jnp.zeros((1, 1, self.family.prior_size))).support()
    assert support is not None  # or the family would have refused
    z_Jx1xZ = support.z_JxZ[:, None]
    masked_JxL = jnp.full((len(z_Jx1xZ), zt_BxL.shape[1]), vocab_size)
    prediction: Any = self.denoiser(masked_JxL, jnp.ones((len(z_Jx1xZ), 1)), latent_BxGxZ=z_Jx1xZ)
    log_mu_JxLxV = jax.nn.log_softmax(prediction.logits())
    is_visible_BxLxV = jax.nn.one_hot(zt_BxL, vocab_size)  # all zeros where masked
    return jnp.einsum("blv,jlv->bj", is_visible_BxLxV, log_mu_JxLxV)


def with_latent(
  denoiser: Transformer | UNet,
  family: latents.Family,
  *,
  depth: int | None = None,
  width: int | None = None,
  heads: int | None = None,
  tokens: int = 0,
  switched_off: bool = False,
) -> LatentNetwork | Transformer | UNet:
  """Gives a denoiser a latent.

  Args:
    denoiser: without a latent.
    family: of the latent.
    depth: blocks of the recognition network and of a conditional prior, on each side of a U-Net;
      the denoiser's if None.
    width: their features; the denoiser's if None.
    heads: their attention heads; the denoiser's if None.
    tokens: 0 lets the latent enter with the time, n > 0 as n more tokens.
    switched_off: the denoiser alone, with its latent at 0: the parameter-matched baseline.

  Raises:
    ValueError: a network that takes no latent; a conditional prior for blocks, whose reader would
      see later ones, or Bayes' rule for blocks or labels; tokens for a U-Net.
  """
  if not isinstance(denoiser, Transformer | UNet):
    raise ValueError(f"{type(denoiser).__name__} takes no latent; set latent.name=none")
  if denoiser.attends != "all" and family.prior == "conditional":
    raise ValueError(
      "latent.prior 'conditional' reads the whole sequence and blocks may see earlier ones alone; "
      "set latent.prior=learned"
    )
  if family.prior == "bayes" and (denoiser.attends != "all" or denoiser.classes):
    raise ValueError(
      "latent.prior 'bayes' has one table for all sequences, and no place for blocks or labels; "
      "set latent.prior=learned"
    )
  denoiser = denoiser.with_latent(family.width, tokens)
  if switched_off:
    return denoiser

  def reader(size: int) -> Reader | ImageReader:
    return denoiser.reader(size, depth=depth, width=width, heads=heads)

  return LatentNetwork(
    denoiser=denoiser,
    family=family,
    recognition=reader(family.posterior_size) if family.has_posterior else None,
    prior_reader=reader(family.prior_size) if family.prior == "conditional" else None,
  )
