"""Confidence orders: the positions that the network is surest of come first."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from md4vmd import forward, rngs
from md4vmd.interfaces import Plan, Prediction, Schedule
from md4vmd.samplers import tokens


def _margin(logits_KxV):
  first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits_KxV), 2)[0], -1, 0)
  return first - second


def _negative_entropy(logits_KxV):
  log_mu = jax.nn.log_softmax(logits_KxV)
  return jnp.sum(jnp.where(log_mu > -jnp.inf, jnp.exp(log_mu) * log_mu, 0.0), axis=-1)


SCORES = {
  "top_prob": lambda logits_KxV: jax.nn.softmax(logits_KxV).max(-1),
  "margin": _margin,  # arXiv 2502.06768
  "entropy": _negative_entropy,
}


@dataclasses.dataclass(frozen=True)
class Confidence:
  """Reveals round(masked * u) positions a step, at least one, by descending score of mu.

  u = (alpha_s - alpha_t) / (1 - alpha_t). This is not the law that the bound speaks of, so no
  likelihood belongs to its samples.

  Attributes:
    score: "top_prob" (largest probability), "margin" (largest minus second) or "entropy".
    temperature: divides the logits of the draw; 0 takes the most probable token.
    top_p: keeps the most probable tokens of this mass.
  """

  score: str
  temperature: float = 0.0
  top_p: float = 1.0

  is_by_token = False

  def __post_init__(self):
    tokens.check(self.temperature, self.top_p)

  def init(
    self,
    key_B: jax.Array,
    zt_BxL: jax.Array,
    is_masked_BxL: jax.Array,
    times: jax.Array,
    schedule: Schedule,
  ) -> tuple[jax.Array, int]:
    """The grid and the batch size; nothing can be drawn before a prediction exists."""
    del key_B, is_masked_BxL, schedule
    return times, zt_BxL.shape[0]

  def plan(self, state: tuple[jax.Array, int], i: jax.Array) -> Plan:
    """The times of step i; the positions are left to `fill`."""
    times, batch = state
    return Plan(jnp.full(batch, times[i + 1]), jnp.full(batch, times[i]), None)

  def fill(
    self,
    key_B: jax.Array,
    zt_BxL: jax.Array,
    is_masked_BxL: jax.Array,
    prediction: Prediction,
    plan: Plan,
    schedule: Schedule,
  ) -> jax.Array:
    """Scores the masked positions and reveals the surest."""

    def look(logits_KxV, u_K):
      token_K = tokens.draw(logits_KxV, u_K, temperature=self.temperature, top_p=self.top_p)
      return SCORES[self.score](logits_KxV), token_K

    uniform_BxL = rngs.uniform_each(key_B, zt_BxL.shape[1:])
    score_BxL, token_BxL = prediction.map_rows(look, is_masked_BxL, uniform_BxL)
    reveal_B = forward.reveal_probability(schedule, plan.t_B, plan.s_B)
    share_B = jnp.where(plan.s_B == 0, 1.0, reveal_B)
    masked_B = is_masked_BxL.sum(-1)
    count_B = jnp.maximum(jnp.round(masked_B * share_B), 1)
    order_BxL = jnp.argsort(jnp.where(is_masked_BxL, -score_BxL, jnp.inf), axis=-1)
    rank_BxL = jnp.argsort(order_BxL, axis=-1)
    return jnp.where((rank_BxL < count_B[:, None]) & is_masked_BxL, token_BxL, zt_BxL)
