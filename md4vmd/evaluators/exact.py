"""Exact divergence from the data of what the T-step sampler draws, by enumeration."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import networks, partitioning, samplers, sections
from md4vmd.build import Model, require_all
from md4vmd.evaluators.enumeration import exact_log_prob


class Exact:
  """-log p_T, KL(data || model) and accuracy of ancestral sampling, for data with a support.

  Args:
    model: what the config built; its dataset lists `support_MxL` and `probabilities_M`.
    steps: numbers of steps T.
    grid: grid of times.

  A latent is drawn as config.sampler says, and its values are summed over.

  Raises:
    ValueError: a model that decodes from left to right, data without a known support, or a latent
      whose values cannot be listed.
  """

  def __init__(self, model: Model, steps: tuple[int, ...] = (1, 2, 4), grid: str = "uniform"):
    require_all(model, "evaluators.exact")
    support_MxL = model.dataset.support_MxL
    if support_MxL is None:
      raise ValueError(
        "evaluators.exact needs data whose support is known, such as 'synthetic'; "
        "set run.evaluators to the others"
      )
    network = model.network
    if isinstance(network, networks.LatentNetwork) and network.family.has_posterior:
      raise ValueError(
        f"evaluators.exact sums over the values of the latent, and those of {network.family} are "
        "not listed; set run.evaluators to the others"
      )
    sections.check_name(grid, samplers.GRIDS, "evaluators.exact.grid")
    self.model, self.support_MxL, self.grid = model, jnp.asarray(support_MxL), grid
    self.times = {count: samplers.times(grid, count) for count in steps}
    self._log_prob = jax.jit(self._exact)

  def _exact(self, params, times):
    fns = networks.bind(self.model.network, params)
    return exact_log_prob(
      fns,
      self.model.schedule,
      times,
      self.support_MxL,
      self.model.dataset.vocab_size,
      latent_refresh=self.model.sampling.latent_refresh,
    )

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Figures per T: nats and bits per example, KL in nats, and the mass on the support."""
    del step
    q = np.asarray(self.model.dataset.probabilities_M, np.float64)
    entropy = -float(np.sum(q * np.log(q)))
    figures: dict[str, Any] = {"exact/entropy_nats": entropy}
    for count, times in self.times.items():
      log_p = np.asarray(partitioning.to_host(self._log_prob(params, times)), np.float64)
      cross_entropy = -float(q @ log_p)
      figures |= {
        f"exact/T{count}_nats": cross_entropy,
        f"exact/T{count}_kl_nats": cross_entropy - entropy,
        f"exact/T{count}_accuracy": float(np.exp(log_p).sum()),
      }
    return figures | {"convention": self._convention}

  @property
  def _convention(self):
    latent = ""
    if isinstance(self.model.network, networks.LatentNetwork):
      is_held = self.model.sampling.latent_refresh == "once"
      latent = ", one latent per sequence" if is_held else ", a new latent every step"
    return f"ancestral sampler at T steps on the {self.grid} grid{latent}, exact by enumeration"
