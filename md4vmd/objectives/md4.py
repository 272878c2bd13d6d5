"""MD4: the weighted integral of cross-entropies of masked diffusion (arXiv 2406.04329)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from md4vmd import forward, row_losses
from md4vmd.interfaces import Batch, Draws, LossTerms, ModelFns, Schedule
from md4vmd.rngs import Noise

_COUNTING = ("count", "tilted")
ESTIMATORS = (*_COUNTING, "time", "steps")


@dataclasses.dataclass(frozen=True)
class MD4:
  """Bound on -log p(x) by masked cross-entropies, from one draw of time and mask per example.

  Estimators of the same bound; all put their draws on a grid over the global batch:

    count: exactly k tokens masked, k uniform on {1..N}, weight N / k (arXiv 2406.03736, eq. 3.9).
      The time follows r ~ Beta(k, N-k+1), alpha(t) = 1 - r, so it stays exact for a network that
      sees t. Its weights never exceed N.
    tilted: the same, but k = 1 + floor(N u^2), u uniform, so that few tokens are masked more often,
      and weight 1 / (k p(k)) = sqrt(N) (sqrt(k) + sqrt(k-1)) / k. For training on text, where few
      masked tokens make a gradient noisy: docs/maths/bound.md. The value of the bound is noisier
      than by `count`, which therefore evaluates it.
    time: t uniform, tokens masked independently, weight -alpha'(t) / (1 - alpha(t)) (MD4, eq. 5).
    steps: the bound of the sampler with T steps, i uniform on {1..T}, t = i/T, s = (i-1)/T,
      weight T (alpha(s) - alpha(t)) / (1 - alpha(t)) (MD4, eq. 4). With the linear schedule it is
      D3PM's absorbing diffusion (arXiv 2107.03006).

  A schedule that does not reach alpha(0) = 1 and alpha(1) = 0 pays for both ends in `time` and
  `steps`; `count` integrates over all masking rates and has no ends.

  Attributes:
    schedule: masking schedule.
    vocab_size: V.
    estimator: one of ESTIMATORS.
    steps: T, for the estimator `steps` alone.
    auxiliary: lambda of D3PM's auxiliary cross-entropy (arXiv 2107.03006, eq. 5) for the estimator
      `steps`: every step's cross-entropy counts this much more in the loss, never in the bound.
    block_size: tokens of a block, of block diffusion (BD3-LM, arXiv 2503.09573): blocks follow one
      another from left to right, each has its own time and bound, given the clean ones before it.
      None for one block.
  """

  schedule: Schedule
  vocab_size: int
  estimator: str = "count"
  steps: int | None = None
  auxiliary: float = 0.0
  block_size: int | None = None

  def __post_init__(self):
    if self.estimator not in ESTIMATORS:
      raise ValueError(
        f"objective estimator is '{self.estimator}'; it must be one of {', '.join(ESTIMATORS)}"
      )
    if (self.estimator == "steps") != (self.steps is not None):
      raise ValueError(
        f"objective has estimator '{self.estimator}' and steps {self.steps}; the "
        "estimator 'steps' needs a number of steps and the others take none"
      )
    if self.steps is not None and self.steps < 1:
      raise ValueError(f"objective steps is {self.steps}; it must be at least 1")
    if self.auxiliary < 0 or (self.auxiliary and self.estimator != "steps"):
      raise ValueError(
        f"objective auxiliary is {self.auxiliary}; it must be 0, or positive with estimator 'steps'"
      )
    if self.block_size is not None and self.block_size < 1:
      raise ValueError(f"objective block_size is {self.block_size}; it must be at least 1")

  @property
  def attends(self) -> str:
    """See `Objective.attends`."""
    return "all" if self.block_size is None else "blocks"

  latent_refresh = "once"  # there is none
  row_loss = staticmethod(row_losses.cross_entropy)

  def bound(self, steps: int, grid: str) -> MD4:
    """The bound that is trained, by the estimator with the least noise of its value."""
    del steps, grid
    return self if self.estimator != "tilted" else dataclasses.replace(self, estimator="count")

  @property
  def convention(self) -> str:
    """Which bound, of which sampler, by which estimator."""
    sampler = "continuous-time sampler"
    if self.steps:
      sampler = f"sampler with T={self.steps} steps on the uniform grid"
    blocks = f" in blocks of {self.block_size}" if self.block_size else ""
    return f"MD4 bound on -log p of the {sampler}{blocks}, estimator '{self.estimator}'"

  def draw(self, noise: Noise, batch: Batch) -> Draws:
    """Times, counts, weights and mask uniforms for the whole batch."""
    u_BxG = noise.grid("time", self._groups(batch.x_BxL.shape[1]))
    uniform_BxL = noise.uniform("mask", batch.x_BxL.shape[1:])
    if self.estimator in _COUNTING:
      size_BxG = forward.group_sizes(batch.free_BxL, u_BxG.shape[1])
      if self.estimator == "tilted":
        u_BxG = jnp.square(u_BxG)
      count_BxG = forward.count_from_uniform(u_BxG, size_BxG)
      positive_BxG = jnp.maximum(count_BxG, 1)  # groups without free tokens have weight 0
      weight_BxG = size_BxG / positive_BxG
      if self.estimator == "tilted":
        roots_BxG = jnp.sqrt(positive_BxG) + jnp.sqrt(positive_BxG - 1.0)
        weight_BxG = jnp.sqrt(size_BxG) * roots_BxG / positive_BxG
      rate_BxG = noise.beta("rate", 1.0 * positive_BxG, 1.0 + size_BxG - count_BxG)
      t_BxG = self.schedule.alpha_inverse(1.0 - rate_BxG)
      return Draws(t_BxG, weight_BxG, uniform_BxL, count_BxG)
    if self.estimator == "time":
      t_BxG = 1.0 - u_BxG
      return Draws(t_BxG, self.schedule.weight(t_BxG), uniform_BxL)
    assert self.steps is not None
    i_BxG = 1.0 + jnp.floor(u_BxG * self.steps)
    t_BxG = i_BxG / self.steps
    reveal_BxG = forward.reveal_probability(self.schedule, t_BxG, (i_BxG - 1) / self.steps)
    return Draws(t_BxG, self.steps * reveal_BxG, uniform_BxL)

  def _groups(self, length):
    if self.block_size is None:
      return 1
    if length % self.block_size:
      raise ValueError(
        f"objective block_size {self.block_size} does not divide {length} tokens; choose one that "
        "does"
      )
    return length // self.block_size

  def is_masked(self, batch: Batch, draws: Draws) -> jax.Array:
    """is_masked_BxL that the draws stand for."""
    if draws.count_BxG is not None:
      return forward.masked_by_count(draws.count_BxG, draws.uniform_BxL, batch.free_BxL)
    rate_BxG = 1.0 - self.schedule.alpha(draws.t_BxG)
    rate_BxL = forward.group_to_token(rate_BxG, batch.x_BxL.shape[1])
    return forward.masked_by_rate(rate_BxL, draws.uniform_BxL, batch.free_BxL)

  def loss(
    self,
    fns: ModelFns,
    batch: Batch,
    draws: Draws,
    *,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> LossTerms:
    """The bound at the drawn times and masks; see `interfaces.LossTerms`."""
    del step
    is_masked_BxL = self.is_masked(batch, draws)
    zt_BxL = forward.mask_tokens(batch, is_masked_BxL, self.vocab_size)
    clean = {} if self.block_size is None else {"clean_BxL": batch.x_BxL}
    prediction = fns.denoise(
      zt_BxL, draws.t_BxG, label_B=batch.label_B, dropout_key=dropout_key, **clean
    )
    counts_BxL = is_masked_BxL * batch.weight_B[:, None]
    weight_BxL = counts_BxL * forward.group_to_token(draws.weight_BxG, batch.x_BxL.shape[1])
    charged_BxL = weight_BxL + self.auxiliary * (self.steps or 0) * counts_BxL
    loss, nats_BxL, nll_BxL = prediction.weighted_loss(self.row_loss, batch.x_BxL, charged_BxL)
    parts = self.parts(*(jnp.sum(weight_BxL * each, axis=-1) for each in (nats_BxL, nll_BxL)))
    parts |= self.ends(batch)
    nelbo_B = sum(parts.values(), start=jnp.zeros_like(batch.weight_B))
    return LossTerms(loss, nelbo_B, batch.tokens_B, parts)

  def parts(self, nats_B: jax.Array, cross_entropy_B: jax.Array) -> dict[str, jax.Array]:
    """The weighted sums over masked tokens, as parts that add up to the bound."""
    del cross_entropy_B  # the same
    return {"diffusion": nats_B}

  def ends(self, batch: Batch) -> dict[str, jax.Array]:
    """Constants of a schedule with loose ends: visible tokens at t=1, masked ones at t=0."""
    if self.estimator in _COUNTING:
      return {}
    nats_B = batch.tokens_B * math.log(self.vocab_size)
    ends = {
      "prior": self.schedule.alpha(jnp.ones(())),
      "reconstruction": 1.0 - self.schedule.alpha(jnp.zeros(())),
    }
    return {name: nats_B * rate for name, rate in ends.items()}
