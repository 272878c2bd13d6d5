"""The bound on -log p over a whole split, with its standard error."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import data, metrics, steps
from md4vmd.build import Model
from md4vmd.evaluators import walk


class Bounds(NamedTuple):
  """Bounds of N examples in float64: "nelbo" and its parts in nats by draw, and tokens scored."""

  nats_NxK: dict[str, np.ndarray]
  tokens_N: np.ndarray


class Scorer:
  """The bound that a model reports, for any examples: one program for all evaluators.

  Draws are fixed: the same figures from any batch size or mesh.

  Args:
    model: what the config built; the objective decides which bound is reported, and where it
      depends on the sampler it is that of config.sampler.
    draws: K, draws of time and mask per example, spread evenly over the estimator's grid.

  Raises:
    ValueError: draws is below 1.
  """

  def __init__(self, model: Model, draws: int):
    if draws < 1:
      raise ValueError(f"evaluators: draws is {draws}; it must be at least 1")
    self.model, self.draws = model, draws
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

  def score(self, params: Any, source: data.Source, limit: int | None = None) -> Bounds:
    """The bounds of a source, or of its first `limit` examples."""

    def measure(batch):
      drawn = [self._bound(params, batch, jnp.int32(i)) for i in range(self.draws)]
      return jax.tree.map(lambda *each_B: jnp.stack(each_B, axis=-1), *drawn), batch.tokens_B

    nats_NxK, tokens_N = walk.over(self.model, source, measure, limit=limit)
    return Bounds(*jax.tree.map(lambda leaf: leaf.astype(np.float64), (nats_NxK, tokens_N)))

  def by_draws(self, prefix: str, figures: Mapping[str, float]) -> str:
    """What standard error other numbers of draws would have, in words."""
    if getattr(self.objective, "attends", "all") == "left":
      return "nothing is drawn"
    return metrics.draws_words(prefix, figures, self.draws)

  @property
  def convention(self) -> str:
    """What the figures are, in words."""
    return f"{self.objective.convention}; clues and padding are not scored"


class Likelihood:
  """Mean bound per token of a split.

  Args:
    model: what the config built.
    split: the split that is scored.
    draws: draws per example, see `Scorer`.
    limit: score only the first examples; None scores all.
  """

  def __init__(self, model: Model, split: str = "valid", draws: int = 1, limit: int | None = None):
    self.model, self.split, self.limit = model, split, limit
    self.source = model.dataset.split(split)
    self.scorer = Scorer(model, draws)

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Figures of the split: bits per token with standard error, perplexity, tokens scored."""
    del step
    bounds = self.scorer.score(params, self.source, self.limit)
    parts = {name: float(part_NxK.mean(1).sum()) for name, part_NxK in bounds.nats_NxK.items()}
    nats_NxK = bounds.nats_NxK["nelbo"]
    figures = metrics.likelihood_report(
      self.split, nats_NxK.mean(1), bounds.tokens_N, unit=self.model.dataset.unit
    )
    figures |= metrics.draws_report(f"{self.split}/nelbo", nats_NxK, bounds.tokens_N)
    del parts["nelbo"]
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
    return figures | {
      "convention": self.scorer.convention,
      "draws": self.scorer.draws,
      "standard_error_by_draws": self.scorer.by_draws(f"{self.split}/nelbo", figures),
    }
