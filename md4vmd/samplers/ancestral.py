"""Ancestral sampling of the reverse process, with all reveal times drawn first."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from md4vmd import rngs
from md4vmd.interfaces import Plan, Prediction, Schedule
from md4vmd.samplers import tokens

_ROWS_AT_ONCE = 8  # few tokens change in one step, and only they need logits


class Reveals(NamedTuple):
  """When everything happens.

  Attributes:
    event_BxL: number of the event at which the token is revealed; -1 for never.
    step_BxK: grid step of each event of a sequence, in order.
    times: the grid.
  """

  event_BxL: jax.Array
  step_BxK: jax.Array
  times: jax.Array


@dataclasses.dataclass(frozen=True)
class Ancestral:
  """Each masked token is revealed from t to s with probability (a_s - a_t) / (1 - a_t).

  (MD4, arXiv 2406.04329, section 3.) Which step reveals a token does not depend on any
  prediction: with u ~ U[alpha(1), 1) it is the first step with u < alpha(s). Steps that would
  reveal nothing are left out, sequence by sequence, so the network runs as often as the sequence
  with the most events needs. The law is that of the plain loop over the grid.

  Attributes:
    temperature: divides the logits; 0 takes the most probable token.
    top_p: keeps the most probable tokens of this mass. Other values than 1 for both leave the
      law that the bound speaks of.
  """

  temperature: float = 1.0
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
  ) -> Reveals:
    """Draws the step of every reveal and numbers the steps in use, per sequence."""
    batch, steps = zt_BxL.shape[0], times.shape[0] - 1
    first = schedule.alpha(times[0])
    u_BxL = first + (1.0 - first) * rngs.uniform_each(key_B, zt_BxL.shape[1:])
    step_BxL = jnp.searchsorted(schedule.alpha(times[1:]), u_BxL, side="right")
    step_BxL = jnp.where(is_masked_BxL, step_BxL, steps)  # `steps` stands for never
    is_used_BxK = jnp.zeros((batch, steps + 1), bool)
    is_used_BxK = is_used_BxK.at[jnp.arange(batch)[:, None], step_BxL].set(True)[:, :steps]
    event_BxK = jnp.cumsum(is_used_BxK, axis=1) - 1
    event_BxL = jnp.take_along_axis(event_BxK, jnp.minimum(step_BxL, steps - 1), axis=1)
    event_BxL = jnp.where(step_BxL < steps, event_BxL, -1)
    used_first = lambda is_used_K: jnp.nonzero(is_used_K, size=steps, fill_value=steps - 1)[0]
    return Reveals(event_BxL, jax.vmap(used_first)(is_used_BxK), times)

  def plan(self, state: Reveals, i: jax.Array) -> Plan:
    """Event i of every sequence, each at its own times."""
    step_B = state.step_BxK[:, i]
    return Plan(state.times[step_B + 1], state.times[step_B], state.event_BxL == i)

  def fill(
    self,
    key_B: jax.Array,
    zt_BxL: jax.Array,
    is_masked_BxL: jax.Array,
    prediction: Prediction,
    plan: Plan,
    schedule: Schedule,
  ) -> jax.Array:
    """Draws the planned tokens from mu."""
    del is_masked_BxL, schedule
    assert plan.reveal_BxL is not None

    def draw(logits_KxV, u_K):
      return tokens.draw(logits_KxV, u_K, temperature=self.temperature, top_p=self.top_p)

    drawn_BxL = prediction.map_rows(
      draw, plan.reveal_BxL, rngs.uniform_each(key_B, zt_BxL.shape[1:]), rows_at_once=_ROWS_AT_ONCE
    )
    return jnp.where(plan.reveal_BxL, drawn_BxL, zt_BxL)
