"""The bound on -log p over a whole split, with its standard error."""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import data, metrics, partitioning, steps
from md4vmd.build import Model


class Likelihood:
  """Mean bound per token, with fixed draws: the same figures from any batch size or mesh.

  Args:
    model: what the config built; the objective decides which bound is reported, and where it
      depends on the sampler it is that of config.sampler.
    split: the split that is scored.
    draws: draws of time and mask per example, spread evenly over the estimator's grid.
    limit: score only the first examples; None scores all.
  """

  def __init__(self, model: Model, split: str = "valid", draws: int = 1, limit: int | None = None):
    if draws < 1:
      raise ValueError(f"evaluators.likelihood.draws is {draws}; it must be at least 1")
    self.model, self.split, self.draws, self.limit = model, split, draws, limit
    self.source = model.dataset.split(split)
    sampling = model.sampling
    self.objective = model.objective.bound(len(sampling.times) - 1, sampling.grid)
    self._bound = jax.jit(
      functools.partial(
        steps.bound_step,
        network=model.network,
        objective=self.objective,
        draws=draws,
        seed=model.seed,
      )
    )

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Figures of the split: bits per token with standard error, perplexity, tokens scored."""
    del step
    nats, tokens, parts = [], [], collections.Counter()
    for arrays in data.evaluation_batches(
      self.source,
      batch_size=self.model.run.batch_size,
      limit=self.limit,
      **partitioning.share(self.model.mesh),
    ):
      batch = partitioning.put_batch(self.model.mesh, arrays)
      drawn = [self._bound(params, batch, jnp.int32(i)) for i in range(self.draws)]
      means = jax.tree.map(lambda *each_B: sum(each_B) / self.draws, *drawn)
      means, tokens_B, weight_B = partitioning.to_host((means, batch.tokens_B, batch.weight_B))
      nats.append(means.pop("nelbo")[weight_B > 0])
      parts.update({name: float(part_B[weight_B > 0].sum()) for name, part_B in means.items()})
      tokens.append(tokens_B[weight_B > 0])
    figures = metrics.likelihood_report(
      self.split,
      np.concatenate(nats).astype(np.float64),
      np.concatenate(tokens).astype(np.float64),
      unit=self.model.dataset.unit,
    )
    if len(parts) > 1:
      for name, part_nats in parts.items():
        scored = figures[f"{self.split}/tokens"]
        figures |= metrics.report(self.split, f"part_{name}", part_nats, scored)
    entropy_nats = self.model.dataset.entropy_nats(self.split)
    if entropy_nats is None:
      for name, bits in self.model.dataset.references_bits.items():
        figures[f"train/{name.replace(' ', '_')}_bits_per_token"] = bits
    elif self.limit is None:
      examples, tokens = (figures[f"{self.split}/{unit}"] for unit in ("examples", "tokens"))
      figures |= metrics.report(self.split, "exact_entropy", entropy_nats * examples, tokens)
    convention = f"{self.objective.convention}; clues and padding are not scored"
    return figures | {"convention": convention, "draws": self.draws}
