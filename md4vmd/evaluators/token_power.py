"""The learned schedules of GenMD4: which tokens are masked early and which late."""

from __future__ import annotations

from typing import Any

import numpy as np

from md4vmd import networks, partitioning, pictures
from md4vmd.build import Model


class TokenPower:
  """The tokens with the largest and smallest w of alpha(t) = 1 - t^w, as text and as a picture.

  A token of larger w stays visible longer in the forward process, so sampling reveals it earlier.

  Args:
    model: what the config built.
    count: tokens shown at each end.
  """

  def __init__(self, model: Model, count: int = 10):
    if not isinstance(model.network, networks.TokenPowerNetwork):
      raise ValueError(
        "evaluators.token_power needs objective 'genmd4'; set run.evaluators to the others"
      )
    if count < 1:
      raise ValueError(f"evaluators.token_power.count is {count}; it must be at least 1")
    self.model, self.count = model, count

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Extremes and spread of w, the tokens there, and a picture of bars."""
    del step
    fns = networks.bind(self.model.network, params)
    assert fns.token_power is not None
    power_V = np.asarray(partitioning.to_host(fns.token_power()), np.float64)
    order_V = np.argsort(-power_V)
    ends = order_V
    if len(order_V) > 2 * self.count:
      ends = np.concatenate([order_V[: self.count], order_V[-self.count :]])
    names = self.model.dataset.cells(ends.astype(np.int32))
    named = [f"{name!r} {power:.3f}" for name, power in zip(names, power_V[ends], strict=True)]
    half = min(self.count, len(named))
    return {
      "power/largest": float(power_V.max()),
      "power/smallest": float(power_V.min()),
      "power/mean": float(power_V.mean()),
      "power/standard_deviation": float(power_V.std()),
      "largest_tokens": ", ".join(named[:half]),
      "smallest_tokens": ", ".join(named[-half:][::-1]),
      "picture": pictures.bars(
        names, power_V[ends], title="w of alpha(t) = 1 - t^w", reference=float(power_V.mean())
      ),
      "convention": "averaged parameters; tokens of larger w are revealed earlier",
    }
