"""Ancestral sampling of one sequence: md4vmd against the plain loop over the grid.

T = L = 256 on the cosine grid. The plain loop calls the network at every step and draws at every
position; its steps all cost the same, so it is timed over the first of them and scaled to all.
The library's time is that of a whole sequence. The law of both is the same.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import naive, timing
from benchmarks.train_step import Case, make_state
from md4vmd import networks, partitioning, samplers, schedules
from md4vmd.optim import Optimizer

_SCHEDULE = schedules.Linear()
CASES = (Case("v50257", 50257, 256, 2, 256, 1), Case("v27", 27, 256, 6, 384, 1))
HEADER = ("sampler", "s per sequence", "network calls", "ms per call", "ms per step", "speed ratio")


def compile_ours(case: Case, params: Any, times: jax.Array) -> Any:
  """`samplers.sample` with `Ancestral` as the sampling job runs it: key, params -> Samples."""

  def run(key, params):
    return samplers.sample(
      key,
      networks.bind(case.network, params),
      _SCHEDULE,
      samplers.Ancestral(),
      times,
      tokens_BxL=jnp.zeros((case.batch, case.length), jnp.int32),
      free_BxL=jnp.ones((case.batch, case.length), bool),
      vocab_size=case.vocab_size,
    )

  return jax.jit(run).lower(jax.random.key(0), params).compile()


def compile_naive(case: Case, params: Any, times: jax.Array, steps: int) -> Any:
  """The first `steps` steps of the plain loop: key, params -> tokens."""
  run = functools.partial(
    naive.ancestral,
    times=times,
    network=case.network,
    schedule=_SCHEDULE,
    vocab_size=case.vocab_size,
    batch=case.batch,
    length=case.length,
    steps=steps,
  )
  return jax.jit(run).lower(jax.random.key(0), params).compile()


def measure(
  case: Case, *, steps: int, naive_steps: int, rounds: int
) -> tuple[list[list[Any]], dict[str, float]]:
  """(rows of the table, figures) of one case; `naive_steps` of the plain loop are run."""
  params = make_state(case, Optimizer(steps=1000)).params
  times = samplers.times("cosine", steps)
  ours = compile_ours(case, params, times)
  plain = compile_naive(case, params, times, naive_steps)
  keys = iter(jax.random.split(jax.random.key(1), rounds + 1))
  calls = []

  def run_ours():
    samples = ours(next(keys), params)
    calls.append(float(samples.calls_B.max()))
    return samples

  seconds = timing.interleave(
    {"naive": lambda: plain(jax.random.key(2), params), "ours": run_ours}, rounds=rounds
  )
  seconds["naive"] = seconds["naive"] * (steps / naive_steps)
  used = {"naive": float(steps), "ours": float(np.mean(calls[1:]))}
  rows: list[list[Any]] = []
  for name, values in seconds.items():
    median = float(np.median(values))
    speed = timing.ratio(seconds["naive"], values)
    per_call, per_step = 1e3 * median / used[name], 1e3 * median / steps
    rows.append([f"{case.name} {name}", median, used[name], per_call, per_step, speed])
  return rows, {
    f"{case.name}/seconds_ratio": rows[1][-1],
    f"{case.name}/naive_seconds": rows[0][1],
    f"{case.name}/ours_seconds": rows[1][1],
    f"{case.name}/naive_calls": rows[0][2],
    f"{case.name}/ours_calls": rows[1][2],
  }


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--naive-steps", type=int, default=16, help="of 256, timed and scaled")
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  figures: dict[str, float] = {"cores": timing.cores()}
  with partitioning.use(partitioning.make_mesh()):
    for case in CASES:
      if options.case in (None, case.name):
        rows, new = measure(
          case, steps=case.length, naive_steps=options.naive_steps, rounds=options.rounds
        )
        timing.say("\n" + timing.table(HEADER, rows))
        figures |= new
  timing.finish(figures, options.json)


if __name__ == "__main__":
  main()
