"""Exact probabilities of the T-step sampler on spaces small enough to enumerate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd.interfaces import ModelFns, Schedule

_LARGEST_LENGTH = 10


def subsets(length: int) -> np.ndarray:
  """is_masked_SxL: every subset of the positions, the empty one first and the full one last."""
  return (np.arange(2**length)[:, None] >> np.arange(length)) & 1 == 1


def exact_log_prob(
  fns: ModelFns, schedule: Schedule, times: jax.Array, x_NxL: jax.Array, vocab_size: int
) -> jax.Array:
  """log p_T(x) in nats of ancestral sampling over the grid `times`, for each row of x.

  Dynamic programming over masked sets S: with u = (a_s - a_t) / (1 - a_t),
  P(S -> S') = u^|S \\ S'| (1 - u)^|S'| prod_{n in S \\ S'} mu_n(x_n | x outside S, t). Tokens that
  are visible at t=1 or masked at t=0 are drawn uniformly.

  Args:
    fns: the network.
    schedule: masking schedule.
    times: [T + 1] decreasing times from 1 to 0.
    x_NxL: sequences.
    vocab_size: V.

  Raises:
    ValueError: sequences longer than 10 tokens, whose 4^L transitions do not fit.
  """
  count, length = x_NxL.shape
  if length > _LARGEST_LENGTH:
    raise ValueError(
      f"exact probabilities walk 4^L transitions; L={length} is above "
      f"{_LARGEST_LENGTH}: use the likelihood evaluator"
    )
  masks_SxL = subsets(length)
  sets = len(masks_SxL)
  z_RxL = jnp.where(masks_SxL[None], vocab_size, x_NxL[:, None, :]).reshape(-1, length)
  target_RxL = jnp.repeat(x_NxL, sets, axis=0)
  revealed_SxSxL = jnp.asarray(masks_SxL[:, None] & ~masks_SxL[None])
  is_subset_SxS = jnp.asarray(~(masks_SxL[None] & ~masks_SxL[:, None]).any(-1))
  left_S = masks_SxL.sum(-1)

  def advance(log_f_NxS, interval):
    t, s = interval
    logits_RxLxV = fns.denoise(z_RxL, jnp.full((z_RxL.shape[0], 1), t)).logits()
    log_mu_RxLxV = jax.nn.log_softmax(logits_RxLxV)
    log_mu_RxL = jnp.take_along_axis(log_mu_RxLxV, target_RxL[..., None], -1)[..., 0]
    # A zero probability stays finite in logs, so that 0 tokens of it cost 0.
    log_mu_NxSxL = jnp.maximum(log_mu_RxL, -1e30).reshape(count, sets, length)
    alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
    u = (alpha_s - alpha_t) / (1.0 - alpha_t)
    jump_NxSxS = jnp.einsum("nsl,spl->nsp", log_mu_NxSxL, revealed_SxSxL.astype(log_mu_RxL.dtype))
    # 0 log 0 = 0 where no token stays (u = 1) or none moves (u = 0).
    stay_S = jax.scipy.special.xlogy(left_S, 1.0 - u)
    move_SxS = jax.scipy.special.xlogy(revealed_SxSxL.sum(-1), u)
    log_step_NxSxS = jump_NxSxS + (move_SxS + stay_S[None, :])[None]
    log_step_NxSxS = jnp.where(is_subset_SxS[None], log_step_NxSxS, -jnp.inf)
    return jax.nn.logsumexp(log_f_NxS[:, :, None] + log_step_NxSxS, axis=1), None

  early = schedule.alpha(times[0])
  xlogy = jax.scipy.special.xlogy
  start_S = xlogy(length - left_S, early / vocab_size) + xlogy(left_S, 1.0 - early)
  start_NxS = jnp.broadcast_to(start_S, (count, sets))
  log_f_NxS, _ = jax.lax.scan(advance, start_NxS, (times[:-1], times[1:]))
  return jax.nn.logsumexp(log_f_NxS - left_S[None, :] * jnp.log(vocab_size), axis=1)
