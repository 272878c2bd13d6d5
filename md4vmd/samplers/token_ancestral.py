"""Ancestral sampling where every token has its own masking schedule (GenMD4)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from md4vmd import rngs
from md4vmd.interfaces import Plan, Prediction
from md4vmd.samplers import tokens
from md4vmd.schedules.poly import Poly


class Candidates(NamedTuple):
  """How likely a step may reveal a token at most.

  Attributes:
    key_B: a key per sequence.
    is_masked_BxL: what is masked at the start.
    bound_K: u* of each step.
    times: the grid.
  """

  key_B: jax.Array
  is_masked_BxL: jax.Array
  bound_K: jax.Array
  times: jax.Array


@dataclasses.dataclass(frozen=True)
class TokenAncestral:
  """A masked position stays with P = sum_j mu_j (1 - u_j) and becomes token j with P = mu_j u_j.

  u_j = 1 - (s/t)^w_j, w the array of powers of the schedule: the reverse process of GenMD4
  (arXiv 2406.04329). By thinning: a position is a candidate with
  probability u* = max_j u_j, which needs no prediction, draws j ~ mu and keeps it with
  probability u_j / u*. The vocabulary is walked at candidates alone, and a step in which no
  sequence of the batch has one costs no network call.

  Attributes:
    temperature: divides the logits; 0 takes the most probable token.
    top_p: keeps the most probable tokens of this mass. Other values than 1 for both leave the
      law that the bound speaks of.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  is_by_token = True

  def __post_init__(self):
    tokens.check(self.temperature, self.top_p)

  def init(
    self,
    key_B: jax.Array,
    zt_BxL: jax.Array,
    is_masked_BxL: jax.Array,
    times: jax.Array,
    schedule: Poly,
  ) -> Candidates:
    """The bound of every step."""
    del zt_BxL
    largest = lambda interval: jnp.max(reveal_probability(schedule, *interval))
    bound_K = jax.lax.map(largest, (times[:-1], times[1:]))
    return Candidates(key_B, is_masked_BxL, bound_K, times)

  def plan(self, state: Candidates, i: jax.Array) -> Plan:
    """The candidates of step i."""
    batch, length = state.is_masked_BxL.shape
    uniform_BxL = rngs.uniform_each(rngs.fold_each(state.key_B, i), (length,))
    at = lambda time: jnp.full(batch, time)
    is_candidate_BxL = state.is_masked_BxL & (uniform_BxL < state.bound_K[i])
    return Plan(at(state.times[i + 1]), at(state.times[i]), is_candidate_BxL)

  def fill(
    self,
    key_B: jax.Array,
    zt_BxL: jax.Array,
    is_masked_BxL: jax.Array,
    prediction: Prediction,
    plan: Plan,
    schedule: Poly,
  ) -> jax.Array:
    """Draws a token at every candidate and keeps it with probability u_j / u*."""
    del is_masked_BxL
    assert plan.reveal_BxL is not None
    u_V = reveal_probability(schedule, plan.t_B[0], plan.s_B[0])
    keep_V = u_V / jnp.max(u_V)

    def draw(logits_KxV, u_K):
      return tokens.draw(logits_KxV, u_K, temperature=self.temperature, top_p=self.top_p)

    noise_Bx2xL = rngs.uniform_each(key_B, (2, *zt_BxL.shape[1:]))
    drawn_BxL = prediction.map_rows(draw, plan.reveal_BxL, noise_Bx2xL[:, 0])
    is_kept_BxL = plan.reveal_BxL & (noise_Bx2xL[:, 1] < keep_V[drawn_BxL])
    return jnp.where(is_kept_BxL, drawn_BxL, zt_BxL)


def reveal_probability(schedule: Poly, t: jax.Array, s: jax.Array) -> jax.Array:
  """u_V = 1 - (s/t)^w, the probability that a masked token of each kind is revealed up to s."""
  return 1.0 - (s / t) ** schedule.power
