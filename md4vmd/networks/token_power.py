"""A denoiser beside the learned masking schedules of the tokens (GenMD4, arXiv 2406.04329)."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax

from md4vmd.interfaces import Prediction
from md4vmd.networks import layers


class TokenPowerNetwork(nn.Module):
  """mu(z_t, t) and w, the power of alpha(t) = 1 - t^w for each of V tokens.

  Attributes:
    denoiser: the network of mu.
    initial: w of every token at the start; w = softplus(raw) stays positive.
  """

  denoiser: nn.Module
  initial: float = 1.0

  @property
  def classes(self) -> int:
    """Number of labels of a class-conditional model."""
    return getattr(self.denoiser, "classes", 0)

  def __call__(
    self, zt_BxL: jax.Array, t_BxG: jax.Array | None = None, **inputs: Any
  ) -> Prediction:
    """The denoiser."""
    if self.is_initializing():  # no role may lack its parameters
      self.token_power()
    return self.denoiser(zt_BxL, t_BxG, **inputs)  # pyright: ignore[reportCallIssue]

  @nn.compact
  def token_power(self) -> jax.Array:
    """power_V."""
    start = nn.initializers.constant(math.log(math.expm1(self.initial)))
    size = self.denoiser.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    return nn.softplus(layers.parameter(self, "token_power_raw", start, (None,), (size,)))
