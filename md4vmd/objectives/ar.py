"""AR: the exact likelihood of a network that reads from left to right."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from md4vmd.interfaces import Batch, Draws, LossTerms, ModelFns
from md4vmd.rngs import Noise


@dataclasses.dataclass(frozen=True)
class AR:
  """-log p(x) = sum_n -log mu(x_n | x_1 ... x_{n-1}), exact.

  The network reads the sequence one place to the right, behind the mask as the first token, and
  predicts at each place the token that stands there. Clues and padding are read and not scored.

  Attributes:
    vocab_size: V.
  """

  vocab_size: int

  attends = "left"
  block_size = None
  latent_refresh = "once"  # there is none
  convention = "exact -log p(x), left to right"

  def bound(self, steps: int, grid: str) -> AR:
    """Itself: nothing depends on the sampler."""
    del steps, grid
    return self

  def draw(self, noise: Noise, batch: Batch) -> Draws:
    """Nothing is random: all tokens are scored once."""
    del noise
    ones_Bx1 = jnp.ones((batch.x_BxL.shape[0], 1))
    return Draws(ones_Bx1, ones_Bx1, jnp.zeros(batch.x_BxL.shape))

  def loss(
    self,
    fns: ModelFns,
    batch: Batch,
    draws: Draws,
    *,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> LossTerms:
    """The negative log-likelihood; see `interfaces.LossTerms`."""
    del draws, step
    read_BxL = jnp.roll(batch.x_BxL, 1, axis=1).at[:, 0].set(self.vocab_size)
    prediction = fns.denoise(read_BxL, None, label_B=batch.label_B, dropout_key=dropout_key)
    weight_BxL = batch.free_BxL * batch.weight_B[:, None]
    loss, nats_BxL = prediction.weighted_nll(batch.x_BxL, weight_BxL)
    nll_B = jnp.sum(weight_BxL * nats_BxL, axis=-1)
    return LossTerms(loss, nll_B, batch.tokens_B, {"autoregression": nll_B})
