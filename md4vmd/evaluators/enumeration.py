"""Exact probabilities of the T-step sampler on spaces small enough to enumerate."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import forward
from md4vmd.interfaces import ModelFns, Schedule
from md4vmd.samplers.token_ancestral import reveal_probability
from md4vmd.schedules.poly import Poly

_LARGEST_LENGTH = 10


def subsets(length: int) -> np.ndarray:
  """is_masked_SxL: every subset of the positions, the empty one first and the full one last."""
  return (np.arange(2**length)[:, None] >> np.arange(length)) & 1 == 1


class Values(NamedTuple):
  """Values of a latent that stand for its prior.

  Attributes:
    inputs: `latent_BxGxZ` for the denoiser, all K values of a state in a row; empty without one.
    log_weight_UxK: log-weights, which sum to 1 over the values.
    is_exact: whether the weighted sum is the expectation itself and no estimate of it.
  """

  inputs: dict[str, Any]
  log_weight_UxK: jax.Array
  is_exact: bool


def latent_values(
  fns: ModelFns, zt_UxL: jax.Array, key_U: jax.Array | None = None, draws: int = 0
) -> Values:
  """Values of z under p(z | z_t): all of them where they can be listed, `draws` draws otherwise."""
  states = len(zt_UxL)
  if fns.prior is None:
    return Values({}, jnp.zeros((states, 1)), True)
  prior = fns.prior(jnp.asarray(zt_UxL))
  support = prior.support()
  if support is None:
    if key_U is None or not draws:
      raise ValueError("a latent that cannot be listed needs a key and a number of draws")
    z_UxKxGxZ = prior.sample(key_U, draws)
    inputs = {"latent_BxGxZ": z_UxKxGxZ.reshape(-1, *z_UxKxGxZ.shape[2:])}
    return Values(inputs, jnp.full((states, draws), -jnp.log(draws)), False)
  if support.log_p_BxGxJ.shape[1] != 1:
    raise ValueError("enumeration serves one latent per sequence")
  z_UJx1xZ = jnp.tile(support.z_JxZ, (states, 1))[:, None]
  return Values({"latent_BxGxZ": z_UJx1xZ}, support.log_p_BxGxJ[:, 0], True)


def exact_log_prob(
  fns: ModelFns,
  schedule: Schedule,
  times: jax.Array,
  x_NxL: jax.Array,
  vocab_size: int,
  *,
  latent_refresh: str = "step",
) -> jax.Array:
  """log p_T(x) in nats of ancestral sampling over the grid `times`, for each row of x.

  Dynamic programming over masked sets S: with u_j = (a_j(s) - a_j(t)) / (1 - a_j(t)), the same for
  all tokens j unless they have schedules of their own (GenMD4), and mu = mu(x outside S, t),
  P(S -> S') = prod_{n in S \\ S'} u_{x_n} mu_n(x_n) prod_{n in S'} sum_j mu_n(j) (1 - u_j). Tokens
  that are visible at t=1 or masked at t=0 are drawn uniformly.

  Args:
    fns: the network.
    schedule: masking schedule.
    times: [T + 1] decreasing times from 1 to 0.
    x_NxL: sequences.
    vocab_size: V.
    latent_refresh: a latent, whose values must be listable, is drawn at every "step", so that
      the product over n is averaged over z, or "once", so that p_T(x | z) is.

  Raises:
    ValueError: sequences longer than 10 tokens, whose 4^L transitions do not fit.
  """
  if fns.prior is not None and latent_refresh == "once":
    return _held_log_prob(fns, schedule, times, x_NxL, vocab_size)
  count, length = x_NxL.shape
  if length > _LARGEST_LENGTH:
    raise ValueError(
      f"exact probabilities walk 4^L transitions; L={length} is above "
      f"{_LARGEST_LENGTH}: use the likelihood evaluator"
    )
  if fns.token_power is not None:
    schedule = Poly(fns.token_power())
    revealed = functools.partial(reveal_probability, schedule)
  else:
    revealed = functools.partial(forward.reveal_probability, schedule)
  masks_SxL = subsets(length)
  sets = len(masks_SxL)
  z_RxL = jnp.where(masks_SxL[None], vocab_size, x_NxL[:, None, :]).reshape(-1, length)
  target_RxL = jnp.repeat(x_NxL, sets, axis=0)
  revealed_SxSxL = jnp.asarray(masks_SxL[:, None] & ~masks_SxL[None])
  is_subset_SxS = jnp.asarray(~(masks_SxL[None] & ~masks_SxL[:, None]).any(-1))
  left_S = masks_SxL.sum(-1)
  values = latent_values(fns, z_RxL)
  draws = values.log_weight_UxK.shape[1]

  def advance(log_f_NxS, interval):
    t, s = interval
    repeated_zt = jnp.repeat(z_RxL, draws, axis=0)
    logits = fns.denoise(repeated_zt, jnp.full((len(repeated_zt), 1), t), **values.inputs).logits()
    log_mu = jax.nn.log_softmax(logits).reshape(-1, draws, length, vocab_size)
    u_V = jnp.broadcast_to(revealed(t, s), (vocab_size,))
    # A zero probability stays finite in logs, so that 0 tokens of it cost 0.
    log_u_1x1x1xV = jnp.maximum(jnp.log(u_V), -1e30)[None, None, None, :]
    log_move = jnp.take_along_axis(log_mu + log_u_1x1x1xV, target_RxL[:, None, :, None], -1)[..., 0]
    stay = jnp.matmul(jnp.exp(log_mu), 1.0 - u_V, precision=jax.lax.Precision.HIGHEST)
    log_stay = jnp.log(stay)
    log_move, log_stay = (
      jnp.maximum(each, -1e30).reshape(count, sets, draws, length) for each in (log_move, log_stay)
    )
    jump_NxSxSxK = jnp.einsum("nskl,spl->nspk", log_move, 1.0 * revealed_SxSxL)
    jump_NxSxSxK += jnp.einsum("nskl,pl->nspk", log_stay, 1.0 * masks_SxL)
    log_weight_NxSx1xK = values.log_weight_UxK.reshape(count, sets, 1, draws)
    log_step_NxSxS = jax.nn.logsumexp(jump_NxSxSxK + log_weight_NxSx1xK, axis=-1)
    log_step_NxSxS = jnp.where(is_subset_SxS[None], log_step_NxSxS, -jnp.inf)
    return jax.nn.logsumexp(log_f_NxS[:, :, None] + log_step_NxSxS, axis=1), None

  early = jnp.max(schedule.alpha(times[0]))  # schedules of single tokens all start at 0
  xlogy = jax.scipy.special.xlogy
  start_S = xlogy(length - left_S, early / vocab_size) + xlogy(left_S, 1.0 - early)
  start_NxS = jnp.broadcast_to(start_S, (count, sets))
  log_f_NxS, _ = jax.lax.scan(advance, start_NxS, (times[:-1], times[1:]))
  return jax.nn.logsumexp(log_f_NxS - left_S[None, :] * jnp.log(vocab_size), axis=1)


def _held_log_prob(fns, schedule, times, x_NxL, vocab_size):
  """log sum_z p(z) p_T(x | z): one value of the latent for the whole trajectory."""
  values = latent_values(fns, jnp.full_like(x_NxL[:1], vocab_size))

  def given(z_1xGxZ):
    def denoise(zt_BxL, t_BxG, **inputs):
      latent_BxGxZ = jnp.repeat(z_1xGxZ, len(zt_BxL), axis=0)
      return fns.denoise(zt_BxL, t_BxG, latent_BxGxZ=latent_BxGxZ, **inputs)

    return exact_log_prob(ModelFns(denoise), schedule, times, x_NxL, vocab_size)

  log_p_KxN = jax.lax.map(given, values.inputs["latent_BxGxZ"][:, None])
  return jax.nn.logsumexp(values.log_weight_UxK[0][:, None] + log_p_KxN, axis=0)
