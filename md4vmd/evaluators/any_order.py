"""Likelihood of decoding one token per call in a random order (arXiv 2406.03736)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import forward, metrics, networks, rngs
from md4vmd.build import Model, require_all, require_one_schedule
from md4vmd.evaluators import walk
from md4vmd.interfaces import Batch, ModelFns, Schedule


def order_nats(
  fns: ModelFns,
  schedule: Schedule,
  batch: Batch,
  uniform_BxL: jax.Array,
  vocab_size: int,
) -> jax.Array:
  """-log p(x | order) of every example in nats, the sum of -log mu(x_n | the tokens before n).

  The order is that of the uniforms over the free tokens; clues stand before all of them and padding
  is not scored. Call k predicts the one token at place k, at the time t with alpha(t) equal to the
  share of free tokens before it. There are as many calls as the longest row has free tokens; the
  others end earlier.

  Args:
    fns: a network without a latent.
    schedule: masking schedule, which turns shares into times.
    batch: sequences.
    uniform_BxL: distinct numbers in [0, 1).
    vocab_size: V.

  Returns:
    nats_B, 0 where the example only fills the batch.
  """
  free_BxL = batch.free_BxL
  order_BxL = jnp.where(free_BxL, uniform_BxL, 2.0)  # what is not free sorts last
  place_BxL = jnp.argsort(jnp.argsort(order_BxL, axis=-1), axis=-1)
  size_Bx1 = free_BxL.sum(-1, keepdims=True)

  def call(k, nats_B):
    zt_BxL = forward.mask_tokens(batch, free_BxL & (place_BxL >= k), vocab_size)
    visible_Bx1 = jnp.minimum(k / jnp.maximum(size_Bx1, 1), 1.0)
    t_Bx1 = schedule.alpha_inverse(visible_Bx1)
    prediction = fns.denoise(zt_BxL, t_Bx1, label_B=batch.label_B)
    weight_BxL = (free_BxL & (place_BxL == k)) * batch.weight_B[:, None]
    _, nats_BxL = prediction.weighted_nll(batch.x_BxL, weight_BxL)
    return nats_B + nats_BxL.sum(-1)

  return jax.lax.fori_loop(0, size_Bx1.max(), call, jnp.zeros(batch.weight_B.shape))


class AnyOrder:
  """Two bounds on -log p(x) of the model that draws an order and decodes one token per call.

  With K orders per example: the mean of -log p(x | order), which is MD4's continuous-time bound if
  the network ignores t, and -log of the mean of p(x | order), which is tighter the larger K.

  Args:
    model: what the config built; its network has no latent.
    split: the split that is scored.
    orders: K, orders per example, each drawn uniformly.
    limit: score only the first examples; None scores all.
  """

  def __init__(self, model: Model, split: str = "valid", orders: int = 8, limit: int | None = None):
    if orders < 1:
      raise ValueError(f"evaluators.any_order.orders is {orders}; it must be at least 1")
    if isinstance(model.network, networks.LatentNetwork):
      raise ValueError(
        "evaluators.any_order multiplies the predictions of single tokens, and with a latent "
        "p(x | order) is an integral over it; set run.evaluators to the others and read likelihood"
      )
    require_all(model, "evaluators.any_order")
    require_one_schedule(model, "evaluators.any_order")
    self.model, self.split, self.orders, self.limit = model, split, orders, limit
    self.source = model.dataset.split(split)
    self._nats = jax.jit(self._of_order)

  def _of_order(self, params, batch, number):
    """nats_B in order `number` of each example, a function of (seed, index, number) alone."""
    key = rngs.stream(self.model.seed, 0, "any_order")
    noise = rngs.example_noise(key, batch.index_B, number, self.orders)
    return order_nats(
      networks.bind(self.model.network, params),
      self.model.schedule,
      batch,
      noise.uniform("order", batch.x_BxL.shape[1:]),
      self.model.dataset.vocab_size,
    )

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Both bounds of the split in nats and bits per token, with standard errors over examples."""
    del step

    def measure(batch):
      of_orders = [self._nats(params, batch, jnp.int32(k)) for k in range(self.orders)]
      return jnp.stack(of_orders, axis=-1), batch.tokens_B

    measured = walk.over(self.model, self.source, measure, limit=self.limit)
    nats_NxK, tokens_N = (array.astype(np.float64) for array in measured)
    figures: dict[str, Any] = {}
    bounds = {"nelbo": nats_NxK.mean(1), "importance": metrics.importance_nats(nats_NxK)}
    for name, nats_N in bounds.items():
      unit = self.model.dataset.unit
      figures |= metrics.ratio_report(f"{self.split}/any_order_{name}", nats_N, tokens_N, unit=unit)
    figures |= {
      f"{self.split}/tokens": float(tokens_N.sum()),
      f"{self.split}/examples": float(len(tokens_N)),
    }
    convention = (
      "-log p of decoding one token per call in a uniform order, at alpha(t) = share visible: "
      f"mean over K={self.orders} orders, and -log of the mean probability of the K; clues and "
      "padding are not scored"
    )
    if getattr(self.model.network, "time_conditioning", False):
      convention += "; the network sees t, so both bound this decoding and no other sampler"
    return figures | {"convention": convention, "orders": self.orders}
