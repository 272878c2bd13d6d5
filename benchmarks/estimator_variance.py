"""How noisy each estimator of MD4's bound is: one batch of 64 sequences, time and mask redrawn.

Takes the models `md4`, which does not see t, and `md4_linear`, which does, as
`benchmarks.text8_baselines` with the same options left them, and trains them first where it has
not. `iid` draws the time of each sequence alone, `time` draws them on one grid over the batch,
`count` masks a number of tokens that is on such a grid, at a time that belongs to it (Beta
counting). Goal: without t, the deviation of `count` at least 2.5 times below that of `iid`.

    python -m benchmarks.estimator_variance --path text8.gz --minutes 8
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import text8_baselines, timing, trainings
from md4vmd import build, data, networks, partitioning, rngs, train_state
from md4vmd.objectives import MD4

_BATCH = 64
ESTIMATORS = {"iid": "time", "time": "time", "count": "count"}


def redrawn(model: build.Model, params: Any, batch: Any, redraws: int) -> dict[str, np.ndarray]:
  """Bits per character of the batch at every redraw, by estimator."""
  fns = networks.bind(model.network, params)
  figures = {}
  for name, estimator in ESTIMATORS.items():
    objective = MD4(model.schedule, model.dataset.vocab_size, estimator)

    def once(key, is_iid=name == "iid", objective=objective):
      noise = rngs.batch_noise(key, _BATCH)
      if is_iid:
        alone_B = jax.random.uniform(rngs.named(key, "iid"), (_BATCH,))
        noise = dataclasses.replace(noise, place_B=alone_B)
      terms = objective.loss(
        fns, batch, objective.draw(noise, batch), step=jnp.zeros((), jnp.int32)
      )
      assert terms.nelbo_B is not None
      return terms.nelbo_B.sum() / batch.tokens_B.sum() / math.log(2.0)

    keys_R = jax.random.split(rngs.stream(model.seed, 0, f"redraws {estimator}"), redraws)
    figures[name] = np.asarray(jax.jit(lambda keys_R, once=once: jax.lax.map(once, keys_R))(keys_R))
  return figures


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  text8_baselines.add_options(parser)
  parser.add_argument("--redraws", type=int, default=300)
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  rows: list[list[Any]] = []
  found: dict[str, float] = {"redraws": options.redraws}
  jobs = text8_baselines.planned(options, ("md4", "md4_linear"), seeds=1)
  for job, _ in trainings.on_cores(text8_baselines.finish, jobs, processes=options.processes):
    name = job.model
    model = build.model(text8_baselines.config(job))
    arrays = next(data.evaluation_batches(model.dataset.split("valid"), batch_size=_BATCH))
    with partitioning.use(model.mesh):
      params = train_state.load_average(model, job.workdir).state["ema"]
      bits = redrawn(model, params, partitioning.put_batch(model.mesh, arrays), options.redraws)
    for estimator, bits_R in bits.items():
      deviation, ratio = float(bits_R.std(ddof=1)), float(bits["iid"].std() / bits_R.std())
      rows.append([f"{name} {estimator}", float(bits_R.mean()), deviation, ratio])
      found |= {
        f"{name}/{estimator}/mean_bits": float(bits_R.mean()),
        f"{name}/{estimator}/standard_deviation_bits": deviation,
        f"{name}/{estimator}/iid_ratio": ratio,
      }
  timing.say(timing.table(("model, estimator", "mean bits", "deviation", "iid / this"), rows))
  timing.finish(found, options.json)


if __name__ == "__main__":
  main()
