"""The sampling loop: plan, predict, fill, until nothing is masked."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from md4vmd import rngs
from md4vmd.interfaces import ModelFns, SamplerStep, Schedule
from md4vmd.schedules.poly import Poly

REFRESHES = ("once", "block", "step")


@flax.struct.dataclass
class Samples:
  """Finished sequences and how they came about.

  Attributes:
    x_BxL: the sequences; the mask id remains at positions that were not to be filled.
    call_BxL: number of the network call (NFE, from 0) that filled the position; -1 at positions
      that were not to be filled.
    calls_B: network calls that the sequence needed.
  """

  x_BxL: jax.Array
  call_BxL: jax.Array
  calls_B: jax.Array


def sequence_keys(key: jax.Array, batch: int, index_B: jax.Array | None) -> jax.Array:
  """A key per sequence from its number, its place in the batch by default."""
  index_B = jnp.arange(batch) if index_B is None else index_B
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)


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
  index_B: jax.Array | None = None,
  latent_refresh: str = "once",
) -> Samples:
  """Fills the free positions of `tokens_BxL`, given all others, which never change.

  Args:
    key: with `index_B` the only source of randomness: a sequence's draws depend on nothing else
      of its batch.
    fns: the network.
    schedule: masking schedule, read at the grid's times.
    step: the rule of unmasking.
    times: [K + 1] decreasing times from 1 to 0; at most K network calls are made.
    tokens_BxL: given tokens; the mask id V at positions that stay unknown; free positions are
      ignored.
    free_BxL: True at the positions to fill.
    vocab_size: V.
    label_B: classes, for class-conditional networks.
    index_B: number of each sequence; its place in the batch by default.
    latent_refresh: "once" draws the latent of a network that has one from p(z | given tokens) and
      holds it, which "block" does in every block; "step" draws it anew at every call, from
      p(z | visible tokens).

  A schedule with loose ends pays for them as its bound assumes: tokens that are visible at t=1
  already, and those still masked at t=0, are drawn uniformly.

  Raises:
    ValueError: a network whose tokens do not see all others, or a rule for models with a schedule
      for each token on a model without, or the other way round.
  """
  _check(fns, step)
  if fns.token_power is not None:
    schedule = Poly(fns.token_power())
  batch, _ = tokens_BxL.shape
  key_B = sequence_keys(key, batch, index_B)
  key_ends_B, key_plan_B, key_steps_B, key_latent_B = (
    rngs.fold_each(key_B, part) for part in range(4)
  )
  is_early_BxL, token_BxL = _ends(key_ends_B, free_BxL, schedule.alpha(times[0]), vocab_size)
  zt_BxL = jnp.where(free_BxL, vocab_size, tokens_BxL).astype(jnp.int32)
  zt_BxL = jnp.where(is_early_BxL, token_BxL, zt_BxL)
  state = step.init(key_plan_B, zt_BxL, free_BxL & ~is_early_BxL, times, schedule)
  latent = _latent(key_latent_B, fns, zt_BxL, label_B, latent_refresh)

  def is_masked(zt_BxL):
    return free_BxL & (zt_BxL == vocab_size)

  def unfinished(carry):
    i, zt_BxL, *_ = carry
    return (i < times.shape[0] - 1) & is_masked(zt_BxL).any()

  def advance(carry):
    i, zt_BxL, call_BxL, calls_B = carry
    plan = step.plan(state, i)
    is_masked_BxL = is_masked(zt_BxL)

    def call(zt_BxL):
      prediction = fns.denoise(zt_BxL, plan.t_B[:, None], label_B=label_B, **latent(zt_BxL, i))
      key_i_B = rngs.fold_each(key_steps_B, i)
      return step.fill(key_i_B, zt_BxL, is_masked_BxL, prediction, plan, schedule)

    if plan.reveal_BxL is None:
      needs_call_B = is_masked_BxL.any(-1)
      zs_BxL = call(zt_BxL)
    else:
      reveal_BxL = plan.reveal_BxL & is_masked_BxL
      plan, needs_call_B = plan._replace(reveal_BxL=reveal_BxL), reveal_BxL.any(-1)
      zs_BxL = jax.lax.cond(needs_call_B.any(), call, lambda zt_BxL: zt_BxL, zt_BxL)
    call_BxL = jnp.where(zs_BxL != zt_BxL, calls_B[:, None], call_BxL)
    return i + 1, zs_BxL, call_BxL, calls_B + needs_call_B

  start = (
    jnp.zeros((), jnp.int32),
    zt_BxL,
    jnp.full(zt_BxL.shape, -1, jnp.int32),
    jnp.zeros(batch, jnp.int32),
  )
  _, x_BxL, call_BxL, calls_B = jax.lax.while_loop(unfinished, advance, start)
  is_late_BxL = is_masked(x_BxL)
  call_BxL = jnp.where(is_early_BxL, 0, call_BxL)
  call_BxL = jnp.where(is_late_BxL, calls_B[:, None] - 1, call_BxL)
  return Samples(jnp.where(is_late_BxL, token_BxL, x_BxL), call_BxL, calls_B)


def _check(fns: ModelFns, step: SamplerStep) -> None:
  """Refuses networks that the loop does not serve, and rules that do not serve the network."""
  if fns.init_cache is not None:
    raise ValueError(
      "this network decodes from left to right; use samplers.sample_tokens or sample_blocks"
    )
  if (fns.token_power is not None) != step.is_by_token:
    raise ValueError(
      "a model with a schedule for each token is sampled by 'token_ancestral', and no other is"
    )


def _ends(key_B, free_BxL, alpha, vocab_size):
  """(free positions that loose ends leave visible at t=1, a uniform token for every position)."""
  early_BxL, token_BxL = jnp.moveaxis(rngs.uniform_each(key_B, (2, free_BxL.shape[1])), 1, 0)
  # One number: schedules of single tokens all start at 0.
  is_early_BxL = free_BxL & (early_BxL < jnp.max(alpha))
  return is_early_BxL, jnp.floor(token_BxL * vocab_size).astype(jnp.int32)


def _latent(key_B, fns, z1_BxL, label_B, refresh):
  """(sequences, number of the call) -> the denoiser's input of latents, none without a prior."""
  if fns.prior is None:
    return lambda zt_BxL, i: {}

  def drawn(zt_BxL, i):
    prior = fns.prior(zt_BxL, label_B=label_B)
    return {"latent_BxGxZ": prior.sample(rngs.fold_each(key_B, i), 1)[:, 0]}

  if refresh == "step":
    return drawn
  held = drawn(z1_BxL, 0)
  return lambda zt_BxL, i: held
