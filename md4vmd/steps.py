"""One step of training, evaluation and sampling: pure functions of arrays and built objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from md4vmd import networks, rngs, samplers
from md4vmd.interfaces import Batch, Objective, SamplerStep, Schedule
from md4vmd.optim import Optimizer


@flax.struct.dataclass
class TrainState:
  """All that training carries from one step to the next; random keys are derived from `step`.

  Attributes:
    step: number of steps taken.
    params: parameters that are optimized.
    ema: their moving average, which evaluation and sampling use.
    optimizer_state: of the optax transformation.
  """

  step: jax.Array
  params: Any
  ema: Any
  optimizer_state: Any


def init_state(network: nn.Module, optimizer: Optimizer, seed: int, length: int) -> TrainState:
  """The state at step 0; parameters are still boxed with their logical names."""
  zt_BxL = jnp.zeros((1, length), jnp.int32)
  label_B = jnp.zeros((1,), jnp.int32) if getattr(network, "classes", 0) else None
  key = rngs.stream(seed, 0, "init")
  params = network.init(key, zt_BxL, jnp.ones((1, 1)), label_B=label_B)["params"]
  return TrainState(
    jnp.zeros((), jnp.int32),
    params,
    jax.tree.map(jnp.copy, params),
    optimizer.transform().init(params),
  )


def accumulate(
  function: Callable[[Any, Any, jax.Array], Any], params: Any, inputs: Any, microbatches: int
) -> Any:
  """Sum over microbatches of `function(params, slice of inputs, number of the slice)`.

  Axis 0 of every input is cut into strided slices, so that each device keeps its own rows.
  """
  if microbatches == 1:
    return function(params, inputs, jnp.zeros((), jnp.int32))
  slices = jax.tree.map(
    lambda x: x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1),
    inputs,
  )

  def body(total, numbered):
    number, inputs_m = numbered
    return jax.tree.map(jnp.add, total, function(params, inputs_m, number)), None

  first = jax.eval_shape(
    function, params, jax.tree.map(lambda x: x[0], slices), jax.ShapeDtypeStruct((), jnp.int32)
  )
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  total, _ = jax.lax.scan(body, zeros, (jnp.arange(microbatches), slices))
  return total


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  network: nn.Module,
  objective: Objective,
  optimizer: Optimizer,
  microbatches: int,
  seed: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step of optimization on a global batch.

  Noise is drawn for the whole batch and then cut, so the number of microbatches does not change
  the estimate. Gradients are sums, divided once by the scored tokens of the global batch.

  Returns:
    (next state, metrics as sums: loss and bound in nats, tokens, norms of the mean gradient and of
    the new parameters).
  """
  noise = rngs.batch_noise(rngs.stream(seed, state.step, "draws"), batch.x_BxL.shape[0])
  draws = objective.draw(noise, batch)
  dropout_key = rngs.stream(seed, state.step, "dropout")

  def gradient(params, inputs, number):
    batch_m, draws_m = inputs

    def loss(params):
      terms = objective.loss(
        networks.bind(network, params),
        batch_m,
        draws_m,
        step=state.step,
        dropout_key=jax.random.fold_in(dropout_key, number),
      )
      sums = {"loss_nats": terms.loss}
      if terms.nelbo_B is not None:
        sums["nelbo_nats"] = jnp.sum(terms.nelbo_B)
      for name, part_B in terms.parts.items():
        sums[f"part_{name}_nats"] = jnp.sum(part_B)
      return terms.loss, sums

    grads, sums = jax.grad(loss, has_aux=True)(params)
    return grads, sums

  grads, metrics = accumulate(gradient, state.params, (batch, draws), microbatches)
  tokens = batch.tokens_B.sum()
  grads = optax.tree.scale(1.0 / jnp.maximum(tokens, 1.0), grads)
  metrics |= {"tokens": tokens, "gradient_norm": optax.global_norm(grads)}
  updates, optimizer_state = optimizer.transform().update(
    grads, state.optimizer_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  metrics["parameter_norm"] = optax.global_norm(params)  # what is saved, so it is watched too
  ema = optimizer.average(state.ema, params, state.step)
  return TrainState(state.step + 1, params, ema, optimizer_state), metrics


def bound_step(
  params: Any,
  batch: Batch,
  draw: jax.Array,
  *,
  network: nn.Module,
  objective: Objective,
  draws: int,
  seed: int,
) -> dict[str, jax.Array]:
  """The bound "nelbo" and its parts in nats, [B], for one of `draws` draws of every example.

  The noise depends on (seed, index of the example, draw) alone.
  """
  noise = rngs.example_noise(rngs.stream(seed, 0, "evaluation"), batch.index_B, draw, draws)
  terms = objective.loss(
    networks.bind(network, params),
    batch,
    objective.draw(noise, batch),
    step=jnp.zeros((), jnp.int32),
  )
  if terms.nelbo_B is None:
    raise ValueError(
      f"{type(objective).__name__} as configured is no bound on -log p(x); "
      "evaluate it with an objective that is one"
    )
  return {"nelbo": terms.nelbo_B, **terms.parts}


def sample_step(
  params: Any,
  batch: Batch,
  key: jax.Array,
  *,
  network: nn.Module,
  schedule: Schedule,
  sampler: SamplerStep,
  times: jax.Array,
  vocab_size: int,
  latent_refresh: str = "once",
) -> samplers.Samples:
  """Fills the free positions of a batch, in the order that the network is made for.

  Draws depend on (key, index of the example) alone.
  """
  fns = networks.bind(network, params)
  given = {
    "tokens_BxL": batch.x_BxL,
    "free_BxL": batch.free_BxL,
    "vocab_size": vocab_size,
    "label_B": batch.label_B,
    "index_B": batch.index_B,
  }
  if fns.init_cache is not None and fns.block_size is None:
    return samplers.sample_tokens(key, fns, schedule, sampler, **given)
  fill = samplers.sample if fns.init_cache is None else samplers.sample_blocks
  return fill(key, fns, schedule, sampler, times, latent_refresh=latent_refresh, **given)
