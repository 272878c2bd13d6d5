"""Tokens per second of the bound over a split, beside a training step and the forward pass alone.

One draw per example, by counting. `forward` predicts and sums the same rows without the draws and
the bound's bookkeeping; evaluation cannot be faster than it, and a training step computes about
three times as much.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.train_step import CASES, Case, compile_ours, make_batch, make_state
from md4vmd import networks, partitioning, steps
from md4vmd.optim import Optimizer

HEADER = ("case", "evaluation tokens/s", "over training step", "over forward pass")


def measure(case: Case, rounds: int) -> dict[str, float]:
  """Median tokens per second of an evaluation step, and its speed over the two others."""
  optimizer, batch = Optimizer(steps=1000), make_batch(case)
  state = make_state(case, optimizer)
  params = jax.tree.map(jnp.copy, state.params)  # the training step takes the state's memory
  bound = jax.jit(
    functools.partial(
      steps.bound_step, network=case.network, objective=case.objective, draws=1, seed=0
    )
  )

  @jax.jit
  def forward(params):
    is_masked_BxL = jnp.arange(batch.x_BxL.size).reshape(batch.x_BxL.shape) % 2 == 0
    zt_BxL = jnp.where(is_masked_BxL, case.vocab_size, batch.x_BxL)
    prediction = networks.bind(case.network, params).denoise(
      zt_BxL, jnp.full((len(zt_BxL), 1), 0.5)
    )
    return prediction.weighted_nll(batch.x_BxL, is_masked_BxL.astype(jnp.float32))[1]

  compiled = compile_ours(case, optimizer, state, batch).step

  def train():
    nonlocal state
    state, sums = compiled(state, batch)
    return sums

  functions = {
    "train": train,
    "forward": lambda: forward(params),
    "evaluation": lambda: bound(params, batch, jnp.int32(0)),
  }
  seconds = timing.interleave(functions, rounds=rounds)
  return {
    "tokens_per_second": case.batch * case.length / float(np.median(seconds["evaluation"])),
    "over_training_step": timing.ratio(seconds["train"], seconds["evaluation"]),
    "over_forward_pass": timing.ratio(seconds["forward"], seconds["evaluation"]),
  }


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--rounds", type=int, default=9)
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  figures: dict[str, float] = {"cores": timing.cores()}
  rows = []
  with partitioning.use(partitioning.make_mesh()):
    for case in CASES:
      if not case.is_genmd4:
        found = measure(case, options.rounds)
        rows.append([case.name, *found.values()])
        figures |= {f"{case.name}/{name}": value for name, value in found.items()}
  timing.say(timing.table(HEADER, rows))
  timing.finish(figures, options.json)


if __name__ == "__main__":
  main()
