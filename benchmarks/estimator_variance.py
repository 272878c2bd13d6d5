"""How noisy each estimator of MD4's bound is: one batch of 64 sequences, time and mask redrawn.

Takes the models `md4`, which does not see t, and `md4_linear`, which does, as
`benchmarks.text8_baselines` with the same options left them, and trains them first where it has
not. `iid` draws the time of each sequence alone, `time` draws them on one grid over the batch,
`count` masks a number of tokens that is on such a grid, at a time that belongs to it (Beta
counting); `tilted` masks few tokens more often.

Two figures for each: the standard deviation of the bound, which is what an evaluation waits for,
and that of the gradient, the root of its total variance, which is what training waits for. Goal:
without t, the deviation of the bound by `count` at least 2.5 times below that by `iid`. The weights
1/t of `iid` and `time` have no bound, so their figures depend on the smallest t that was drawn.

    python -m benchmarks.estimator_variance --path text8.gz --minutes 8
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import text8_baselines, timing, trainings
from md4vmd import build, data, networks, partitioning, rngs, train_state
from md4vmd.objectives import MD4

_BATCH = 64
ESTIMATORS: dict[str, dict[str, Any]] = {
  "iid": {"estimator": "time"},
  "time": {"estimator": "time"},
  "count": {"estimator": "count"},
  "tilted": {"estimator": "tilted"},
}


def redrawn(
  model: build.Model, params: Any, batch: Any, name: str, *, redraws: int, gradients: int
) -> tuple[np.ndarray, float]:
  """(bits per character of the batch at every redraw, standard deviation of the gradient)."""
  objective = MD4(model.schedule, model.dataset.vocab_size, **ESTIMATORS[name])
  scale = 1.0 / (batch.tokens_B.sum() * math.log(2.0))

  def once(params, key):
    noise = rngs.batch_noise(key, _BATCH)
    if name == "iid":
      alone_B = jax.random.uniform(rngs.named(key, "iid"), (_BATCH,))
      noise = dataclasses.replace(noise, place_B=alone_B)
    draws = objective.draw(noise, batch)
    fns = networks.bind(model.network, params)
    return objective.loss(fns, batch, draws, step=jnp.zeros((), jnp.int32)).loss * scale

  def add(sums, key):
    gradient = jax.grad(once)(params, key)
    return (jax.tree.map(jnp.add, sums[0], gradient), sums[1] + _square(gradient)), None

  keys_R = jax.random.split(rngs.stream(model.seed, 0, "redraws"), redraws)
  bits_R = jax.jit(lambda keys_R: jax.lax.map(lambda key: once(params, key), keys_R))(keys_R)
  zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
  total, squares = jax.jit(lambda keys: jax.lax.scan(add, zeros, keys)[0])(keys_R[:gradients])
  variance = (squares - _square(total) / gradients) / (gradients - 1)
  return np.asarray(bits_R), math.sqrt(float(variance))


def _square(tree: Any) -> jax.Array:
  """Sum of the squares of all entries."""
  return jnp.square(optax.global_norm(tree))


HEADER = (
  "model, estimator",
  "mean bits",
  "deviation",
  "iid / this",
  "of the gradient",
  "iid / this",
)


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  text8_baselines.add_options(parser)
  parser.add_argument("--redraws", type=int, default=300)
  parser.add_argument("--gradients", type=int, default=100, help="redraws with a gradient")
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  rows: list[list[Any]] = []
  found: dict[str, float] = {"redraws": options.redraws, "gradients": options.gradients}
  jobs = text8_baselines.planned(options, ("md4", "md4_linear"), seeds=1)
  for job, _ in trainings.on_cores(text8_baselines.finish, jobs, processes=options.processes):
    model = build.model(text8_baselines.config(job))
    arrays = next(data.evaluation_batches(model.dataset.split("valid"), batch_size=_BATCH))
    how_often = {"redraws": options.redraws, "gradients": options.gradients}
    with partitioning.use(model.mesh):
      params = train_state.load_average(model, job.workdir).state["ema"]
      batch = partitioning.put_batch(model.mesh, arrays)
      noise = {name: redrawn(model, params, batch, name, **how_often) for name in ESTIMATORS}
    iid_bits_R, iid_gradient = noise["iid"]
    for estimator, (bits_R, gradient) in noise.items():
      figures = {
        "mean_bits": float(bits_R.mean()),
        "standard_deviation_bits": float(bits_R.std(ddof=1)),
        "iid_ratio": float(iid_bits_R.std() / bits_R.std()),
        "gradient_deviation": gradient,
        "gradient_iid_ratio": iid_gradient / gradient,
      }
      rows.append([f"{job.model} {estimator}", *figures.values()])
      found |= {f"{job.model}/{estimator}/{key}": value for key, value in figures.items()}
  timing.say(timing.table(HEADER, rows))
  timing.finish(found, options.json)


if __name__ == "__main__":
  main()
