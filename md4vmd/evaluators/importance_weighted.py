"""Likelihood of the T-step sampler by importance-weighted paths (arXiv 1509.00519)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import forward, metrics, networks, rngs
from md4vmd.build import Model, require_all, require_one_schedule
from md4vmd.evaluators import walk
from md4vmd.interfaces import Batch, ModelFns, Schedule
from md4vmd.samplers import Ancestral


class Latents(NamedTuple):
  """How a latent is drawn along a path.

  Attributes:
    refresh: "once" for the whole path, or at every "step".
    reads: what the posterior of a step reads beside the visible tokens: "revealed", those that the
      step reveals, or "clean", all that are masked.
  """

  refresh: str = "step"
  reads: str = "revealed"


EVERY_STEP = Latents()


class _Values(NamedTuple):
  """J values of a latent for every example, and the logs of what they weigh, which are added."""

  inputs: Mapping[str, jax.Array]
  log_weight_BxJ: jax.Array


def path_nats(
  fns: ModelFns,
  schedule: Schedule,
  times: jax.Array,
  batch: Batch,
  key_B: jax.Array,
  vocab_size: int,
  latents: Latents = EVERY_STEP,
) -> jax.Array:
  """-log w of a path of the T-step sampler that ends in x, drawn from the forward process.

  The path says in which step S each token is revealed. Its law is that of the sampler, so it
  cancels: w = prod_S p(x_S | x_t), and with a latent the latter is p(z | x_t) prod mu(x_t, z) /
  q(z | x_S, x_t) at z ~ q, or the sum over z where it can be listed. One latent for the whole path
  weighs p(z) / q(z | x) once. E[w] = p_T(x). Tokens that the schedule shows at t = 1, or never,
  cost log V.

  Args:
    fns: the network.
    schedule: masking schedule.
    times: [T + 1] decreasing times from 1 to 0.
    batch: sequences; clues are visible along the path.
    key_B: a key per example.
    vocab_size: V.
    latents: how a latent is drawn.

  Returns:
    nats_B, 0 where the example only fills the batch.
  """
  uniform_BxL = rngs.uniform_each(rngs.fold_each(key_B, 0), batch.x_BxL.shape[1:])
  start_BxL = batch.free_BxL & (uniform_BxL >= schedule.alpha(times[0]))
  sampler = Ancestral()
  zt_BxL = forward.mask_tokens(batch, start_BxL, vocab_size)
  reveals = sampler.init(rngs.fold_each(key_B, 1), zt_BxL, start_BxL, times, schedule)
  is_uniform_BxL = batch.free_BxL & (~start_BxL | (reveals.event_BxL < 0))
  held = None
  if latents.refresh == "once":
    clues_BxL = forward.mask_tokens(batch, batch.free_BxL, vocab_size)
    held = _values(fns, batch, clues_BxL, batch.free_BxL, rngs.fold_each(key_B, 2))

  def event(i, nats_BxJ):
    plan = sampler.plan(reveals, i)
    assert plan.reveal_BxL is not None
    is_masked_BxL = start_BxL & ((reveals.event_BxL >= i) | (reveals.event_BxL < 0))
    zt_BxL = forward.mask_tokens(batch, is_masked_BxL, vocab_size)
    reads_BxL = plan.reveal_BxL if latents.reads == "revealed" else is_masked_BxL
    keys = rngs.fold_each(rngs.fold_each(key_B, 3), i)
    values = _values(fns, batch, zt_BxL, reads_BxL, keys) if held is None else held
    step_BxJ = _decode(fns, batch, zt_BxL, plan.t_B, plan.reveal_BxL, values)
    if held is None:
      step_BxJ = -jax.nn.logsumexp(values.log_weight_BxJ - step_BxJ, axis=1, keepdims=True)
      step_BxJ *= plan.reveal_BxL.any(1, keepdims=True)
    return nats_BxJ + step_BxJ

  count = 1 if held is None else held.log_weight_BxJ.shape[1]
  events = reveals.event_BxL.max() + 1
  nats_BxJ = jax.lax.fori_loop(0, events, event, jnp.zeros((len(zt_BxL), count)))
  log_weight_BxJ = jnp.zeros_like(nats_BxJ) if held is None else held.log_weight_BxJ
  nats_B = -jax.nn.logsumexp(log_weight_BxJ - nats_BxJ, axis=1)
  nats_B += is_uniform_BxL.sum(-1) * math.log(vocab_size)
  return nats_B * batch.weight_B


def _values(fns, batch, zt_BxL, reads_BxL, key_B) -> _Values:
  """All values of z with p(z | x_t), or one draw from the posterior with p / q."""
  one_BxJ = jnp.zeros((len(zt_BxL), 1))
  if fns.prior is None:
    return _Values({}, one_BxJ)
  prior = fns.prior(zt_BxL, label_B=batch.label_B)
  if fns.encode is None:
    support = prior.support()
    assert support is not None
    z_RxZ = jnp.tile(support.z_JxZ, (len(zt_BxL), 1))
    return _Values({"latent_BxGxZ": z_RxZ[:, None]}, support.log_p_BxGxJ[:, 0])
  posterior = fns.encode(batch.x_BxL, zt_BxL, reads_BxL, label_B=batch.label_B)
  z_BxKxGxZ = posterior.sample(key_B, 1)
  ratio_BxKxG = prior.log_prob(z_BxKxGxZ) - posterior.log_prob(z_BxKxGxZ)
  return _Values({"latent_BxGxZ": z_BxKxGxZ[:, 0]}, ratio_BxKxG[:, :, 0])


def _decode(fns, batch, zt_BxL, t_B, reveal_BxL, values) -> jax.Array:
  """-log prod mu of the revealed tokens, for every value: [B, J]."""
  count = values.log_weight_BxJ.shape[1]
  repeat = lambda array: None if array is None else jnp.repeat(array, count, axis=0)
  prediction = fns.denoise(
    repeat(zt_BxL), repeat(t_B[:, None]), label_B=repeat(batch.label_B), **values.inputs
  )
  weight_BxL = reveal_BxL * batch.weight_B[:, None]
  _, nats_RxL = prediction.weighted_nll(repeat(batch.x_BxL), repeat(weight_BxL))
  return nats_RxL.sum(-1).reshape(-1, count)


class ImportanceWeighted:
  """-log of the mean weight of K paths per example: a bound on -log p_T(x), tighter the larger K.

  T and the grid are those of config.sampler. Beside it the mean of -log w, which is what a single
  path bounds.

  Args:
    model: what the config built.
    split: the split that is scored.
    paths: K, paths per example.
    limit: score only the first examples; None scores all.

  Raises:
    ValueError: a model that decodes in blocks or from left to right, or with a schedule for each
      token.
  """

  def __init__(self, model: Model, split: str = "valid", paths: int = 8, limit: int | None = None):
    if paths < 1:
      raise ValueError(f"evaluators.importance_weighted.paths is {paths}; it must be at least 1")
    require_all(model, "evaluators.importance_weighted")
    require_one_schedule(model, "evaluators.importance_weighted")
    if getattr(model.objective, "blocks", 1) > 1:
      raise ValueError(
        "evaluators.importance_weighted walks paths over whole sequences and objective.blocks is "
        f"{getattr(model.objective, 'blocks', 1)}; use evaluators.blocks and set run.evaluators "
        "to the others"
      )
    self.model, self.split, self.paths, self.limit = model, split, paths, limit
    self.source = model.dataset.split(split)
    bound = model.objective.bound(len(model.sampling.times) - 1, model.sampling.grid)
    reads = getattr(bound, "posterior_reads", "revealed")
    self.latents = Latents(model.objective.latent_refresh, reads)
    self._nats = jax.jit(self._of_path)

  def _of_path(self, params, batch, number):
    """nats_B of path `number` of each example, a function of (seed, index, number) alone."""
    key = rngs.stream(self.model.seed, 0, "importance_weighted")
    noise = rngs.example_noise(key, batch.index_B, number, self.paths)
    return path_nats(
      networks.bind(self.model.network, params),
      self.model.schedule,
      self.model.sampling.times,
      batch,
      noise.key_B,
      self.model.dataset.vocab_size,
      self.latents,
    )

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Both bounds of the split in nats and bits per token, with standard errors over examples."""
    del step

    def measure(batch):
      of_paths = [self._nats(params, batch, jnp.int32(k)) for k in range(self.paths)]
      return jnp.stack(of_paths, axis=-1), batch.tokens_B

    measured = walk.over(self.model, self.source, measure, limit=self.limit)
    nats_NxK, tokens_N = (array.astype(np.float64) for array in measured)
    report = functools.partial(metrics.ratio_report, unit=self.model.dataset.unit)
    figures: dict[str, Any] = {}
    bounds = {
      "one_path": nats_NxK.mean(1),
      "importance_weighted": metrics.importance_nats(nats_NxK),
    }
    for name, nats_N in bounds.items():
      figures |= report(f"{self.split}/{name}", nats_N, tokens_N)
    figures |= {
      f"{self.split}/tokens": float(tokens_N.sum()),
      f"{self.split}/examples": float(len(tokens_N)),
    }
    sampling = self.model.sampling
    convention = (
      f"-log p of the sampler with T={len(sampling.times) - 1} steps on the {sampling.grid} grid: "
      f"mean of -log w over K={self.paths} paths, and -log of the mean of their w"
    )
    if isinstance(self.model.network, networks.LatentNetwork):
      convention += f", a latent every {self.latents.refresh}".replace("every once", "per path")
    return figures | {
      "convention": f"{convention}; clues and padding are not scored",
      "paths": self.paths,
    }
