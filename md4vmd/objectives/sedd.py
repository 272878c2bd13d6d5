"""SEDD absorb: score entropy over the network of masked diffusion (arXiv 2310.16834)."""

from __future__ import annotations

import dataclasses

import jax

from md4vmd import row_losses
from md4vmd.objectives.md4 import MD4


@dataclasses.dataclass(frozen=True)
class SEDD(MD4):
  """Denoising score entropy of the score s_j = alpha / (1 - alpha) exp(logit_j) / V.

  Its integrand is MD4's plus, for every masked token, the same weight times c - 1 - log c,
  c = sum_j exp(logit_j) / V: the price of a score that does not add up to alpha / (1 - alpha). So
  the bound has two parts, and the first alone is the MD4 bound of the normalised prediction
  mu = softmax(logits), which is what sampling uses. Attributes are those of `MD4`; the score
  entropy is an integral over time, so there is no estimator `steps`.
  """

  row_loss = staticmethod(row_losses.score_entropy)

  def __post_init__(self):
    super().__post_init__()
    if self.estimator == "steps":
      raise ValueError("objective 'sedd' has no estimator 'steps'; take 'count' or 'time'")

  @property
  def convention(self) -> str:
    """What the bound and its parts are."""
    blocks = f" in blocks of {self.block_size}" if self.block_size else ""
    return (
      f"SEDD bound on -log p by score entropy{blocks}, estimator '{self.estimator}'; its part "
      "'normalised' is the MD4 bound of the normalised prediction"
    )

  def parts(self, nats_B: jax.Array, cross_entropy_B: jax.Array) -> dict[str, jax.Array]:
    """The MD4 bound of the normalised prediction, and the price of the normaliser."""
    return {"normalised": cross_entropy_B, "normaliser": nats_B - cross_entropy_B}
