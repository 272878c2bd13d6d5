"""What one draw of time and mask costs with a latent z, in three ways of averaging over it.

Each returns (loss, nats_BxG, parts_BxG): the loss has a gradient, the bound and its parts do not.
`decode(z_BxKxGxZ)` gives the predictions, `charge_BxG` the weight of the divergence in the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from md4vmd import forward, rngs
from md4vmd.interfaces import Prediction

Score = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


class Terms(NamedTuple):
  """What is scored in one draw.

  Attributes:
    scored_BxL: the tokens S whose cross-entropies count.
    weight_BxG: of their sum.
    kl_weight_BxG: of the divergence of the posterior from the prior.
    seen_BxL: the tokens that the prior, and beside S the posterior, reads.
    read_BxL: the tokens S that the posterior reads.
  """

  scored_BxL: jax.Array
  weight_BxG: jax.Array
  kl_weight_BxG: jax.Array
  seen_BxL: jax.Array
  read_BxL: jax.Array


class Decoded(NamedTuple):
  """Predictions for K latents of every example, and the tokens that are scored; R = B*K."""

  prediction: Prediction
  x_RxL: jax.Array
  scored_RxL: jax.Array

  def nll(self, weight_BxKxG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(weighted sum with a gradient, nats_BxKxG without); groups of weight 0 may report 0 nats."""
    weight_RxG = weight_BxKxG.reshape(-1, weight_BxKxG.shape[2])
    weight_RxL = forward.group_to_token(weight_RxG, self.x_RxL.shape[1]) * self.scored_RxL
    total, nats_RxL = self.prediction.weighted_nll(self.x_RxL, weight_RxL)
    return total, forward.group_sums(nats_RxL, weight_RxG.shape[1]).reshape(weight_BxKxG.shape)

  def nats(self, shape: tuple[int, ...]) -> jax.Array:
    """nats_BxKxG of all, without a gradient."""
    constant = self._replace(prediction=jax.lax.stop_gradient(self.prediction))
    return constant.nll(jnp.ones(shape))[1]


Decode = Callable[[jax.Array | None], Decoded]


def of_one_draw(
  decoded: Decoded, terms: Terms, kl_BxG: jax.Array, charge_BxG: jax.Array, free_nats: float = 0.0
) -> Score:
  """One draw of z, with the divergence in a term of its own."""
  loss, nats_Bx1xG = decoded.nll(terms.weight_BxG[:, None])
  loss += jnp.sum(terms.kl_weight_BxG * charge_BxG * jnp.maximum(kl_BxG, free_nats))
  parts_BxG = {
    "diffusion": terms.weight_BxG * nats_Bx1xG[:, 0],
    "kl": terms.kl_weight_BxG * jax.lax.stop_gradient(kl_BxG),
  }
  return loss, parts_BxG["diffusion"] + parts_BxG["kl"], parts_BxG


def of_draws(
  decode: Decode, z_BxKxGxZ: jax.Array, ratio_BxKxG: jax.Array, terms: Terms, charge_BxG: jax.Array
) -> Score:
  """K draws of z from the posterior: -log sum_k w_k, w_k = p(z_k) / (K q(z_k)) prod mu(z_k).

  Its gradient is that of -log w_k averaged with the normalised w_k. They are constants, so the
  fused cross-entropy serves twice: for the values of w_k, and for the gradient.

  Args:
    decode: gives the predictions.
    z_BxKxGxZ: the draws.
    ratio_BxKxG: log p(z_k) - log q(z_k).
    terms: what is scored.
    charge_BxG: of the ratio.
  """
  decoded, samples = decode(z_BxKxGxZ), z_BxKxGxZ.shape[1]
  weight_BxG, charge_Bx1xG = terms.weight_BxG, charge_BxG[:, None]
  fixed_BxKxG = jax.lax.stop_gradient(ratio_BxKxG)
  nats_BxKxG = decoded.nats(fixed_BxKxG.shape)
  log_w = lambda charge: charge * fixed_BxKxG - nats_BxKxG
  bound_BxG = lambda charge: jnp.log(samples) - jax.nn.logsumexp(log_w(charge), axis=1)
  share_BxKxG = weight_BxG[:, None] * jax.nn.softmax(log_w(charge_Bx1xG), axis=1)
  slope = decoded.nll(share_BxKxG)[0] - jnp.sum(share_BxKxG * charge_Bx1xG * ratio_BxKxG)
  parts_BxG = {
    "diffusion": weight_BxG * nats_BxKxG.mean(1),
    "kl": -weight_BxG * fixed_BxKxG.mean(1),
  }
  value = jnp.sum(weight_BxG * bound_BxG(charge_Bx1xG))
  return _with_slope_of(slope, value), weight_BxG * bound_BxG(1.0), parts_BxG


def of_all_values(
  decode: Decode, prior: Any, terms: Terms, key_B: Any, charge_BxG: jax.Array
) -> Score:
  """All values of z: -log sum_z p(z) prod mu(z).

  Its gradient in the denoiser is that of -log prod mu(z), averaged over the exact posterior of
  z; one draw of it spares the backward pass of all other values and has the same mean. A charge
  below 1 takes (J p(z))^charge / J for p(z), J the number of values: no value is given up before
  the denoiser has found a use for it.
  """
  z_JxZ, log_p_BxGxJ = prior.support()
  log_p_BxJxG, weight_BxG = jnp.swapaxes(log_p_BxGxJ, 1, 2), terms.weight_BxG
  z_JxGxZ = jnp.broadcast_to(z_JxZ[:, None], (*log_p_BxJxG.shape[1:], z_JxZ.shape[1]))
  every_BxJxGxZ = jnp.broadcast_to(z_JxGxZ[None], (len(log_p_BxJxG), *z_JxGxZ.shape))
  nats_BxJxG = decode(every_BxJxGxZ).nats(log_p_BxJxG.shape)
  fixed_BxJxG = jax.lax.stop_gradient(log_p_BxJxG)
  log_count, charge_Bx1xG = jnp.log(log_p_BxJxG.shape[1]), charge_BxG[:, None]
  log_w = lambda charge: charge * (fixed_BxJxG + log_count) - log_count - nats_BxJxG
  charged_BxJxG, exact_BxJxG = log_w(charge_Bx1xG), log_w(1.0)
  pick = lambda key, log_JxG: jax.random.categorical(key, log_JxG, axis=0)
  chosen_BxG = jax.vmap(pick)(rngs.fold_each(key_B, 2), charged_BxJxG)
  slope, _ = decode(z_JxZ[chosen_BxG][:, None]).nll(weight_BxG[:, None])
  share_BxJxG = weight_BxG[:, None] * jax.nn.softmax(charged_BxJxG, axis=1)
  slope -= jnp.sum(share_BxJxG * charge_Bx1xG * log_p_BxJxG)
  value = -jnp.sum(weight_BxG * jax.nn.logsumexp(charged_BxJxG, axis=1))
  log_posterior_BxJxG = jax.nn.log_softmax(exact_BxJxG, axis=1)
  posterior_BxJxG = jnp.exp(log_posterior_BxJxG)
  parts_BxG = {
    "diffusion": weight_BxG * jnp.sum(posterior_BxJxG * nats_BxJxG, axis=1),
    "kl": weight_BxG * jnp.sum(posterior_BxJxG * (log_posterior_BxJxG - fixed_BxJxG), axis=1),
  }
  nelbo_BxG = -weight_BxG * jax.nn.logsumexp(exact_BxJxG, axis=1)
  return _with_slope_of(slope, value), nelbo_BxG, parts_BxG


def _with_slope_of(slope: jax.Array, value: jax.Array) -> jax.Array:
  """`value`, with the gradient of `slope`."""
  return slope + jax.lax.stop_gradient(value - slope)
