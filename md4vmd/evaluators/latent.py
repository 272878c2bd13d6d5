"""What a latent carries: the figures that tell a latent in use from a collapsed one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import data, forward, networks, partitioning, rngs
from md4vmd.build import Model, require_all
from md4vmd.interfaces import Batch, ModelFns

_ACTIVE = 0.01  # variance of a posterior mean above which a unit counts as active


class LatentUse:
  """Use of the latent where all free tokens are masked, on the first examples of a split.

  kl_nats: KL(q || p) per example. mutual_information_nats: of x and z under q, at most the log of
  the number of examples. active_units: latent dimensions whose posterior mean varies over the
  examples by more than .01 (arXiv 1509.00519); for an enumerated latent the exponential of the
  entropy of its codes. The nats of all tokens decoded in one step: with z of the posterior, of the
  prior (`prior_gap` is what that costs more), and of another example's posterior (`shuffle_gap`).

  Args:
    model: what the config built.
    split: the split.
    limit: examples.
    draws: of z per example.
  """

  def __init__(self, model: Model, split: str = "valid", limit: int = 256, draws: int = 16):
    require_all(model, "evaluators.latent")
    if not isinstance(model.network, networks.LatentNetwork):
      raise ValueError("evaluators.latent needs a latent; set run.evaluators to the others")
    if limit < 2 or draws < 1:
      raise ValueError(f"evaluators.latent: limit {limit} must be at least 2 and draws {draws} 1")
    self.model, self.split, self.limit, self.draws = model, split, limit, draws
    self.source = model.dataset.split(split)
    self._measure = jax.jit(self._measured)

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Figures per example, in nats, as split/latent_<name>."""
    del step
    size = partitioning.round_up(self.model.mesh, min(self.limit, len(self.source)))
    arrays = next(
      iter(
        data.evaluation_batches(
          self.source,
          batch_size=size,
          limit=self.limit,
          **partitioning.share(self.model.mesh),
        )
      )
    )
    batch = partitioning.put_batch(self.model.mesh, arrays)
    measured = partitioning.to_host(self._measure(params, batch))
    figures = {
      f"{self.split}/latent_{name}": float(np.asarray(value)) for name, value in measured.items()
    }
    return figures | {"convention": "all free tokens masked, one step; z from q(z | x)"}

  def _measured(self, params, batch: Batch):
    fns = networks.bind(self.model.network, params)
    measure = enumerated_use if fns.encode is None else sampled_use
    return measure(
      fns, batch, vocab_size=self.model.dataset.vocab_size, draws=self.draws, seed=self.model.seed
    )


def _nats(fns: ModelFns, batch: Batch, zt_BxL: jax.Array, z_BxKxGxZ: jax.Array) -> jax.Array:
  """-log prod mu(x_n | z) over the free tokens: [B, K]."""
  batch_size, count = z_BxKxGxZ.shape[:2]
  repeat = lambda array: jnp.repeat(array, count, axis=0)
  prediction = fns.denoise(
    repeat(zt_BxL),
    jnp.ones((batch_size * count, 1)),
    label_B=None if batch.label_B is None else repeat(batch.label_B),
    latent_BxGxZ=z_BxKxGxZ.reshape(-1, *z_BxKxGxZ.shape[2:]),
  )
  _, nats_RxL = prediction.weighted_nll(repeat(batch.x_BxL), 1.0 * repeat(batch.free_BxL))
  return nats_RxL.sum(-1).reshape(batch_size, count)


def _mean(values_B: jax.Array, weight_B: jax.Array) -> jax.Array:
  return jnp.sum(values_B * weight_B) / jnp.sum(weight_B)


def sampled_use(
  fns: ModelFns, batch: Batch, *, vocab_size: int, draws: int, seed: int
) -> dict[str, jax.Array]:
  """The figures of `LatentUse` from draws of a recognition network."""
  assert fns.encode is not None and fns.prior is not None
  zt_BxL = forward.mask_tokens(batch, batch.free_BxL, vocab_size)
  q = fns.encode(batch.x_BxL, zt_BxL, batch.free_BxL, label_B=batch.label_B)
  p = fns.prior(zt_BxL, label_B=batch.label_B)
  key_B = jax.vmap(lambda i: jax.random.fold_in(rngs.stream(seed, 0, "latent"), i))(batch.index_B)
  z_BxKxGxZ = q.sample(key_B, draws)
  prior_BxKxGxZ = p.sample(rngs.fold_each(key_B, 1), draws)
  weight_B = batch.weight_B
  log_q_BxK = q.log_prob(z_BxKxGxZ).sum(-1)
  kl_BxG = q.kl(p)
  kl_B = (log_q_BxK - p.log_prob(z_BxKxGxZ).sum(-1)).mean(1) if kl_BxG is None else kl_BxG.sum(-1)
  # log q(z_b | x_c) for every pair of examples, one draw each
  every_CxBxGxZ = jnp.broadcast_to(z_BxKxGxZ[None, :, 0], (len(weight_B), *z_BxKxGxZ[:, 0].shape))
  log_q_CxB = q.log_prob(every_CxBxGxZ).sum(-1) + jnp.log(weight_B)[:, None]
  log_marginal_B = jax.nn.logsumexp(log_q_CxB, axis=0) - jnp.log(weight_B.sum())
  mean_BxS = q.expectation().reshape(len(weight_B), -1)
  share_Bx1 = weight_B[:, None] / weight_B.sum()
  center_1xS = jnp.sum(mean_BxS * share_Bx1, axis=0, keepdims=True)
  variance_S = jnp.sum(jnp.square(mean_BxS - center_1xS) * share_Bx1, axis=0)
  nats_B = _nats(fns, batch, zt_BxL, z_BxKxGxZ).mean(1)
  swapped_B = _nats(fns, batch, zt_BxL, jnp.roll(z_BxKxGxZ, 1, axis=0)).mean(1)
  prior_B = _nats(fns, batch, zt_BxL, prior_BxKxGxZ).mean(1)
  return {
    "kl_nats": _mean(kl_B, weight_B),
    "kl_nats_per_token": jnp.sum(kl_B * weight_B) / batch.tokens_B.sum(),
    "mutual_information_nats": _mean(log_q_BxK[:, 0] - log_marginal_B, weight_B),
    "active_units": jnp.sum(variance_S > _ACTIVE),
    "posterior_nats": _mean(nats_B, weight_B),
    "prior_gap_nats": _mean(prior_B - nats_B, weight_B),
    "shuffle_gap_nats": _mean(swapped_B - nats_B, weight_B),
  }


def enumerated_use(
  fns: ModelFns, batch: Batch, *, vocab_size: int, draws: int, seed: int
) -> dict[str, jax.Array]:
  """The figures of `LatentUse` as exact sums over the values of one enumerated latent."""
  del draws, seed
  assert fns.prior is not None
  zt_BxL = forward.mask_tokens(batch, batch.free_BxL, vocab_size)
  support = fns.prior(zt_BxL, label_B=batch.label_B).support()
  log_p_BxJ = support.log_p_BxGxJ[:, 0]
  z_BxJxGxZ = jnp.broadcast_to(
    support.z_JxZ[None, :, None], (*log_p_BxJ.shape, 1, support.z_JxZ.shape[1])
  )
  nats_BxJ = _nats(fns, batch, zt_BxL, z_BxJxGxZ)
  log_r_BxJ = jax.nn.log_softmax(log_p_BxJ - nats_BxJ)
  r_BxJ, weight_B = jnp.exp(log_r_BxJ), batch.weight_B
  kl_B = jnp.sum(r_BxJ * (log_r_BxJ - log_p_BxJ), axis=-1)
  marginal_J = jnp.sum(r_BxJ * weight_B[:, None], axis=0) / weight_B.sum()
  entropy = jnp.sum(jax.scipy.special.entr(marginal_J))
  own_B = jnp.sum(jax.scipy.special.entr(r_BxJ), axis=-1)
  nats_B = jnp.sum(r_BxJ * nats_BxJ, axis=-1)
  swapped_B = jnp.sum(jnp.roll(r_BxJ, 1, axis=0) * nats_BxJ, axis=-1)
  prior_B = jnp.sum(jnp.exp(log_p_BxJ) * nats_BxJ, axis=-1)
  return {
    "kl_nats": _mean(kl_B, weight_B),
    "kl_nats_per_token": jnp.sum(kl_B * weight_B) / batch.tokens_B.sum(),
    "mutual_information_nats": entropy - _mean(own_B, weight_B),
    "active_units": jnp.exp(entropy),
    "posterior_nats": _mean(nats_B, weight_B),
    "prior_gap_nats": _mean(prior_B - nats_B, weight_B),
    "shuffle_gap_nats": _mean(swapped_B - nats_B, weight_B),
  }
