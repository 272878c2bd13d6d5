"""FLOPs per token, bytes per step and the share of the matrix peak that a training step reaches.

  python -m benchmarks.roofline --config=configs/text8.py:md4 --batch_size=64

counts the matrix FLOPs of the training step of a config, without what remat computes again
(`benchmarks.products`), compiles it on the devices that are there, times it on random tokens, and
divides by what one large matrix product reaches in the same run: MFU = FLOPs per second of the
step / FLOPs per second of the product. The loop over masked rows counts once, so its FLOPs are too
few where it runs more often. `arithmetic_intensity` is FLOPs by the bytes that the program reads
and writes (`benchmarks.hlo`). The config's data need not be there; see `benchmarks.tpu_compile`.

On a GPU: python -m benchmarks.roofline --config=configs/owt.py --batch_size=32, then with
--config.network.attention=xla and cudnn.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hlo, products, timing, tpu_compile
from md4vmd import build, partitioning, train, train_state


def matrix_peak(dtype: Any, size: int, rounds: int) -> float:
  """FLOPs per second of a square matrix product, the best of the rounds."""
  a = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  seconds = timing.interleave({"matmul": lambda: product(a, a)}, rounds=rounds)["matmul"]
  return 2.0 * size**3 / seconds.min()


def measure(config: Any, dataset: Any, *, rounds: int, size: int) -> dict[str, float]:
  """Figures of one training step, per device where they are not ratios."""
  model = build.model(config, stand_in=dataset)
  shape = (model.run.batch_size, dataset.length)
  rng = np.random.default_rng(0)
  with partitioning.use(model.mesh):
    state = train_state.initial(model)
    batch = partitioning.put_batch(
      model.mesh,
      {
        "x_BxL": rng.integers(0, dataset.vocab_size, shape).astype(np.int32),
        "weight_B": np.ones(shape[0], np.float32),
        "index_B": np.arange(shape[0], dtype=np.int32),
      },
    )
    compiled = train.compiled_step(model).lower(state, batch).compile()

    def step():
      nonlocal state
      state, sums = compiled(state, batch)
      return sums

    seconds = float(np.median(timing.interleave({"step": step}, rounds=rounds)["step"]))
    peak = matrix_peak(jnp.dtype(model.network.dtype), size, rounds)
  accessed, memory = hlo.cost(compiled.as_text()).memory_bytes, compiled.memory_analysis()
  tokens = shape[0] * shape[1] / jax.device_count()
  flops = products.of_step(config, dataset) / jax.device_count()
  return {
    "parameters": train_state.count_parameters(state.params),
    "flops_per_token": flops / tokens,
    "tokens_per_second": tokens / seconds,
    "peak_flops_per_second": peak,
    "mfu": flops / seconds / peak,
    "bytes_per_step": accessed,
    "arithmetic_intensity": flops / accessed,
    "temp_bytes": memory.temp_size_in_bytes,
    "devices": jax.device_count(),
  }


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  tpu_compile.add_options(parser)
  parser.add_argument("--batch_size", type=int, help="in place of run.batch_size")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--matrix_size", type=int, default=4096, help="of the product for the peak")
  options, rest = parser.parse_known_args(arguments)
  timing.say(timing.machine())
  try:
    config = tpu_compile.parse_config(rest)
    if options.batch_size:
      config.run.batch_size = options.batch_size
    dataset = tpu_compile.stand_in(config, **tpu_compile.described(options))
    figures = measure(config, dataset, rounds=options.rounds, size=options.matrix_size)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  timing.say(timing.table(("figure", "value"), [[k, float(v)] for k, v in figures.items()]))
  timing.finish(figures, options.json)


if __name__ == "__main__":
  main()
