"""The plain formulations that the library is measured against.

They share the network, its parameters, the draws and the optimizer with the library, and do the
rest as the public MD4 implementation does: logits of every row, log-softmax against one-hot
targets, masks and weights applied afterwards, gradients by `jax.grad` of the whole, no donation;
and in sampling a categorical draw over the vocabulary and the mask at every position of every step.
Decoding from left to right has no cache there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from md4vmd import forward, networks, rngs, row_losses
from md4vmd.interfaces import Batch, Draws, ModelFns, Schedule
from md4vmd.objectives import MD4, GenMD4
from md4vmd.optim import Optimizer
from md4vmd.steps import TrainState


def logits(network: nn.Module, params: Any, zt_BxL: jax.Array, t_BxG: jax.Array) -> jax.Array:
  """logits_BxLxV of every position."""
  prediction: Any = network.apply({"params": params}, zt_BxL, t_BxG)
  return prediction.hidden_BxLxD @ prediction.kernel_DxP[:, : prediction.vocab_size]


def loss(
  params: Any, batch: Batch, draws: Draws, *, network: nn.Module, objective: MD4, public: bool
) -> jax.Array:
  """Sum over the batch of the weighted cross-entropies of masked tokens, in nats.

  `public` also selects by the one-hot targets, as the public implementation does to be safe from
  0 * inf; it is one more pass over [B, L, V] forward and backward.
  """
  is_masked_BxL = objective.is_masked(batch, draws)
  zt_BxL = forward.mask_tokens(batch, is_masked_BxL, objective.vocab_size)
  logits_BxLxV = logits(network, params, zt_BxL, draws.t_BxG)
  one_hot_BxLxV = jax.nn.one_hot(batch.x_BxL, objective.vocab_size)
  # The sign stays outside: a negated one-hot array costs XLA one more [B, L, V] temporary.
  product_BxLxV = one_hot_BxLxV * jax.nn.log_softmax(logits_BxLxV)
  if public:
    product_BxLxV = jnp.where(one_hot_BxLxV, product_BxLxV, 0.0)
  nats_BxL = -jnp.sum(product_BxLxV, axis=-1)
  weight_BxL = forward.group_to_token(draws.weight_BxG, batch.x_BxL.shape[1])
  return jnp.sum(batch.weight_B[:, None] * weight_BxL * is_masked_BxL * nats_BxL)


class HeldLogits(NamedTuple):
  """A prediction that holds all logits, for the loss of GenMD4."""

  logits_BxLxV: jax.Array

  def weighted_loss(self, row_loss, x_BxL, weight_BxL, power_V):
    """See `md4vmd.interfaces.Prediction.weighted_loss`, for `power_weighted`."""
    assert row_loss is row_losses.power_weighted
    log_mu_BxLxV = jax.nn.log_softmax(self.logits_BxLxV)
    power_1x1xV = power_V[None, None, :]
    one_hot_BxLxV = jax.nn.one_hot(x_BxL, power_V.shape[0])
    nats_BxL = -jnp.sum(one_hot_BxLxV * power_1x1xV * log_mu_BxLxV, axis=-1)
    nats_BxL += jnp.sum((jnp.exp(log_mu_BxLxV) - one_hot_BxLxV) * power_1x1xV, axis=-1)
    nats_BxL = jnp.where(weight_BxL != 0, nats_BxL, 0.0)
    constant = jax.lax.stop_gradient(nats_BxL)
    return jnp.sum(weight_BxL * nats_BxL), constant, constant


def genmd4_loss(
  params: Any, batch: Batch, draws: Draws, *, network: nn.Module, objective: GenMD4
) -> jax.Array:
  """GenMD4's loss from the logits of every position of both masked sets, [2B, L, V]."""
  bound = networks.bind(network, params)

  def denoise(zt_BxL, t_BxG, **_):
    return HeldLogits(logits(network, params, zt_BxL, t_BxG))

  fns = ModelFns(denoise, token_power=bound.token_power)  # pyright: ignore[reportArgumentType]
  return objective.loss(fns, batch, draws, step=jnp.zeros((), jnp.int32)).loss


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  network: nn.Module,
  objective: MD4 | GenMD4,
  optimizer: Optimizer,
  seed: int,
  public: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """What `md4vmd.steps.train_step` computes for MD4 and GenMD4."""
  noise = rngs.batch_noise(rngs.stream(seed, state.step, "draws"), batch.x_BxL.shape[0])
  draws = objective.draw(noise, batch)
  tokens = batch.tokens_B.sum()

  def mean_loss(params):
    if isinstance(objective, GenMD4):
      total = genmd4_loss(params, batch, draws, network=network, objective=objective)
    else:
      total = loss(params, batch, draws, network=network, objective=objective, public=public)
    return total / tokens

  value, grads = jax.value_and_grad(mean_loss)(state.params)
  metrics = {"loss_nats": value * tokens, "gradient_norm": optax.global_norm(grads)}
  updates, optimizer_state = optimizer.transform().update(
    grads, state.optimizer_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  ema = optimizer.average(state.ema, params, state.step)
  return TrainState(state.step + 1, params, ema, optimizer_state), metrics


def ancestral(
  key: jax.Array,
  params: Any,
  times: jax.Array,
  *,
  network: nn.Module,
  schedule: Schedule,
  vocab_size: int,
  batch: int,
  length: int,
  steps: int | None = None,
) -> jax.Array:
  """x_BxL by ancestral sampling from all masks; `steps` cuts the loop short, for timing alone."""
  alphas = schedule.alpha(times).at[0].set(0.0)

  def body(i, zt_BxL):
    logits_BxLxV = logits(network, params, zt_BxL, jnp.full((batch, 1), times[i]))
    reveal = (alphas[i + 1] - alphas[i]) / (1.0 - alphas[i])
    mu_BxLxV = jax.nn.softmax(logits_BxLxV)
    stay_BxLx1 = jnp.full((batch, length, 1), 1.0 - reveal)
    probabilities = jnp.concatenate([reveal * mu_BxLxV, stay_BxLx1], axis=-1)
    zs_BxL = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(probabilities))
    return jnp.where(zt_BxL == vocab_size, zs_BxL, zt_BxL)

  z1_BxL = jnp.full((batch, length), vocab_size, jnp.int32)
  return jax.lax.fori_loop(0, times.shape[0] - 1 if steps is None else steps, body, z1_BxL)


@flax.struct.dataclass
class Prefix:
  """What takes the place of a cache: the tokens read so far, `length` of them."""

  tokens_BxL: jax.Array
  length: jax.Array


def without_cache(fns: ModelFns) -> ModelFns:
  """The same predictions behind a prefix, each from the whole sequence computed anew."""

  def denoise(tokens_BxK, t_BxG, *, cache, **inputs):
    read_BxL = jax.lax.dynamic_update_slice_in_dim(
      cache.tokens_BxL, tokens_BxK, cache.length, axis=1
    )
    clean = {} if fns.block_size is None else {"clean_BxL": cache.tokens_BxL}
    prediction = fns.denoise(read_BxL, t_BxG, **clean, **inputs)
    count = tokens_BxK.shape[1]
    hidden_BxKxD = jax.lax.dynamic_slice_in_dim(
      prediction.hidden_BxLxD, cache.length, count, axis=1
    )
    here = dataclasses.replace(prediction, hidden_BxLxD=hidden_BxKxD)
    return here, Prefix(read_BxL, cache.length + count)

  def init_cache(batch, length):
    return Prefix(jnp.zeros((batch, length), jnp.int32), jnp.zeros((), jnp.int32))

  return fns._replace(denoise=denoise, init_cache=init_cache)
