"""The temperature of a trained VMD's tokens given the latent, fitted by maximum likelihood.

A bound by few draws of z is loosest where tokens are sure of themselves: most draws then give an
example next to nothing. Such training ends with tokens that are too unsure given z. One number
mends that, the factor on all logits for which a bound by many draws is best (temperature scaling,
arXiv 1706.04599). Many draws are too dear for all of training but not for one number.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import build, data, networks, objectives, partitioning, rngs

FACTORS = 2.0 ** np.arange(-1.0, 3.5, 0.5)
_BATCHES = 4


def check(model: build.Model) -> None:
  """Raises ValueError where `run.calibrate` has nothing to fit."""
  if not (
    isinstance(model.objective, objectives.VMD)
    and model.objective.latent_refresh == "step"
    and model.objective.posterior_reads == "revealed"
    and isinstance(model.network, networks.LatentNetwork)
    and model.network.recognition is not None
  ):
    raise ValueError(
      f"run.calibrate is {model.run.calibrate} draws of a latent: one with a posterior is needed, "
      "and form 'jump' or 'step' with posterior_reads 'revealed'; otherwise set run.calibrate=0"
    )


def fit(model: build.Model, params: Any) -> tuple[float, dict[float, float]]:
  """(best of FACTORS, loss in nats per token by factor), the loss by `run.calibrate` draws of z.

  It is measured on training batches, with the same draws for every factor.
  """

  @jax.jit
  def nats(params, batch, key):
    noise = rngs.batch_noise(key, batch.x_BxL.shape[0])
    draws = _objective(model).draw(noise, batch)

    def at(factor):
      fns = networks.bind(model.network, sharpened(params, factor))
      return _objective(model).loss(fns, batch, draws, step=jnp.zeros((), jnp.int32)).loss

    return jax.lax.map(at, jnp.asarray(FACTORS, jnp.float32)), batch.tokens_B.sum()

  batches = data.train_batches(
    model.dataset,
    batch_size=model.run.batch_size,
    seed=model.seed,
    **partitioning.share(model.mesh),
  )
  sums = [
    nats(
      params,
      partitioning.put_batch(model.mesh, arrays),
      rngs.stream(model.seed, number, "calibration"),
    )
    for number, arrays in enumerate(itertools.islice(batches, _BATCHES))
  ]
  nats_F, tokens = jax.tree.map(lambda *each: np.sum(each, axis=0), *partitioning.to_host(sums))
  by_factor = dict(zip(FACTORS.tolist(), (nats_F / tokens).tolist(), strict=True))
  return min(by_factor, key=by_factor.__getitem__), by_factor


@jax.jit
def sharpened(params: Any, factor: jax.Array | float) -> Any:
  """Parameters of a `LatentNetwork` whose denoiser's logits are multiplied."""
  denoiser = params["denoiser"]
  heads = {name: factor * denoiser[name] for name in ("head", "head_bias") if name in denoiser}
  return {**params, "denoiser": {**denoiser, **heads}}


def _objective(model: build.Model) -> objectives.VMD:
  assert isinstance(model.objective, objectives.VMD)
  return dataclasses.replace(model.objective.charged_in_full(), samples=model.run.calibrate)
