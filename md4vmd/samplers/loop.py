"""The sampling loop: plan, predict, fill, until nothing is masked."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from md4vmd.interfaces import ModelFns, SamplerStep, Schedule


@flax.struct.dataclass
class Samples:
  """Finished sequences and how they came about.

  Attributes:
    x_BxL: the sequences; the mask id remains at positions that were not to be filled.
    call_BxL: number of the network call (NFE, from 0) that filled the position; -1 elsewhere.
    calls_B: network calls that the sequence needed.
  """

  x_BxL: jax.Array
  call_BxL: jax.Array
  calls_B: jax.Array


def sample(
  key: jax.Array,
  fns: ModelFns,
  schedule: Schedule,
  step: SamplerStep,
  times: jax.Array,
  *,
  tokens_BxL: jax.Array,
  free_BxL: jax.Array,
  vocab_size: int,
  label_B: jax.Array | None = None,
) -> Samples:
  """Fills the free positions of `tokens_BxL`, given all others, which never change.

  Args:
    key: the only source of randomness.
    fns: the network.
    schedule: masking schedule, read at the grid's times.
    step: the rule of unmasking.
    times: [K + 1] decreasing times from 1 to 0; at most K network calls are made.
    tokens_BxL: given tokens; the mask id V at positions that stay unknown; free positions are
      ignored.
    free_BxL: True at the positions to fill.
    vocab_size: V.
    label_B: classes, for class-conditional networks.

  A schedule that leaves tokens masked at t=0 has them drawn uniformly, as its bound assumes.
  """
  key_plan, key_steps, key_rest = jax.random.split(key, 3)
  zt_BxL = jnp.where(free_BxL, vocab_size, tokens_BxL).astype(jnp.int32)
  state = step.init(key_plan, zt_BxL, free_BxL, times, schedule)

  def is_masked(zt_BxL):
    return free_BxL & (zt_BxL == vocab_size)

  def unfinished(carry):
    i, zt_BxL, _ = carry
    return (i < times.shape[0] - 1) & is_masked(zt_BxL).any()

  def advance(carry):
    i, zt_BxL, call_BxL = carry
    plan = step.plan(state, i)

    def call(zt_BxL):
      prediction = fns.denoise(zt_BxL, plan.t_B[:, None], label_B=label_B)
      return step.fill(
        jax.random.fold_in(key_steps, i), zt_BxL, is_masked(zt_BxL), prediction, plan, schedule
      )

    if plan.reveal_BxL is None:
      zs_BxL = call(zt_BxL)
    else:
      zs_BxL = jax.lax.cond(plan.reveal_BxL.any(), call, lambda zt_BxL: zt_BxL, zt_BxL)
    return i + 1, zs_BxL, jnp.where(zs_BxL != zt_BxL, i, call_BxL)

  start = (jnp.zeros((), jnp.int32), zt_BxL, jnp.full(zt_BxL.shape, -1, jnp.int32))
  _, x_BxL, call_BxL = jax.lax.while_loop(unfinished, advance, start)
  uniform_BxL = jax.random.randint(key_rest, x_BxL.shape, 0, vocab_size)
  x_BxL = jnp.where(is_masked(x_BxL), uniform_BxL, x_BxL)
  return Samples(x_BxL, call_BxL, call_BxL.max(-1) + 1)
