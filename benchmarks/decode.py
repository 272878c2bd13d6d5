"""Decoding from left to right, one sequence at a time: with a cache against without one.

The sampler, the network and its parameters are the same. Without a cache each call computes the
whole sequence anew, for blocks both its streams; its calls all cost the same, so the first
positions are timed and scaled to all. The cached time is that of a whole sequence.

Before anything is timed, the logits of both are compared along a sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import naive, timing
from benchmarks.train_step import Case, make_state
from md4vmd import networks, partitioning, samplers, schedules
from md4vmd.interfaces import ModelFns
from md4vmd.networks import Transformer
from md4vmd.optim import Optimizer

_LARGEST_ERROR = 1e-5


@dataclasses.dataclass(frozen=True)
class Decoding(Case):
  """A case whose network decodes token by token, or by blocks of `block_size`."""

  block_size: int | None = None

  @property
  def network(self) -> Transformer:
    """The network, as the library runs it."""
    attends = "left" if self.block_size is None else "blocks"
    return self.denoiser.clone(attends=attends, block_size=self.block_size)


CASES = (
  Decoding("ar", 27, 256, 6, 384, 1),
  Decoding("block8", 27, 256, 6, 384, 1, block_size=8),
)
HEADER = ("decoding", "s per sequence", "network calls", "ms per call", "speed ratio")


def disagreement(case: Decoding, fns: ModelFns, plain: ModelFns) -> float:
  """Largest difference of a logit, reading a random sequence by tokens or by blocks."""
  size = case.block_size or 1
  x_BxL = np.random.default_rng(0).integers(0, case.vocab_size, (case.batch, case.length))

  @jax.jit
  def largest():
    def read(caches, x_BxS):
      logits, longer = [], []
      for one, cache in zip((fns, plain), caches, strict=True):
        noisy_BxS = jnp.full_like(x_BxS, case.vocab_size) if case.block_size else x_BxS
        logits.append(one.denoise(noisy_BxS, None, cache=cache)[0].logits())
        longer.append(one.denoise(x_BxS, None, cache=cache)[1])
      return tuple(longer), jnp.abs(logits[0] - logits[1]).max()

    assert fns.init_cache is not None and plain.init_cache is not None
    empty = tuple(init(case.batch, case.length) for init in (fns.init_cache, plain.init_cache))
    blocks = jnp.moveaxis(jnp.asarray(x_BxL).reshape(case.batch, -1, size), 1, 0)
    return jax.lax.scan(read, empty, blocks)[1].max()

  return float(largest())


def compile_decoder(case: Decoding, fns: ModelFns, positions: int) -> Any:
  """key -> Samples of the first `positions` tokens, one network call for each."""
  shape = (case.batch, case.length)
  given = {
    "tokens_BxL": jnp.full(shape, case.vocab_size, jnp.int32),
    "free_BxL": jnp.broadcast_to((jnp.arange(case.length) < positions)[None], shape),
    "vocab_size": case.vocab_size,
  }
  schedule, step = schedules.Linear(), samplers.Ancestral()
  times = samplers.times("uniform", 1000)  # hardly ever two tokens in one step

  def run(key):
    if case.block_size is None:
      return samplers.sample_tokens(key, fns, schedule, step, **given)
    return samplers.sample_blocks(key, fns, schedule, step, times, **given)

  return jax.jit(run).lower(jax.random.key(0)).compile()


def measure(
  case: Decoding, *, naive_positions: int, rounds: int
) -> tuple[list[list[Any]], dict[str, float]]:
  """(rows of the table, figures) of one case; without a cache `naive_positions` are decoded.

  Raises:
    ArithmeticError: the logits with and without a cache differ.
  """
  fns = networks.bind(case.network, make_state(case, Optimizer(steps=1000)).params)
  plain = naive.without_cache(fns)
  error = disagreement(case, fns, plain)
  if not error <= _LARGEST_ERROR:
    raise ArithmeticError(f"{case.name}: logits with and without a cache differ by {error:.1e}")
  timing.say(f"{case.name}: logits with and without a cache agree to {error:.1e}")
  share = naive_positions / case.length
  decoders = {
    "without cache": compile_decoder(case, plain, naive_positions),
    "with cache": compile_decoder(case, fns, case.length),
  }
  calls = {name: float(run(jax.random.key(1)).calls_B.max()) for name, run in decoders.items()}
  seconds = timing.interleave(
    {name: lambda run=run: run(jax.random.key(1)) for name, run in decoders.items()}, rounds=rounds
  )
  seconds["without cache"] = seconds["without cache"] / share
  calls["without cache"] /= share
  rows: list[list[Any]] = []
  for name, values in seconds.items():
    median, speed = float(np.median(values)), timing.ratio(seconds["without cache"], values)
    per_call = 1e3 * median / calls[name]
    rows.append([f"{case.name} {name}", median, calls[name], per_call, speed])
  return rows, {
    f"{case.name}/seconds_ratio": rows[1][-1],
    f"{case.name}/uncached_seconds": rows[0][1],
    f"{case.name}/cached_seconds": rows[1][1],
    f"{case.name}/cached_calls": rows[1][2],
    f"{case.name}/logits_error": error,
  }


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--naive-positions", type=int, default=16, help="of 256, timed and scaled")
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  figures: dict[str, float] = {"cores": timing.cores()}
  with partitioning.use(partitioning.make_mesh()):
    for case in CASES:
      if options.case in (None, case.name):
        rows, new = measure(case, naive_positions=options.naive_positions, rounds=options.rounds)
        timing.say("\n" + timing.table(HEADER, rows))
        figures |= new
  timing.finish(figures, options.json)


if __name__ == "__main__":
  main()
