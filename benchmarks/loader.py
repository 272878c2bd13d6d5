"""Tokens per second that one process reads for training: ArrayRecord files against memory.

Examples of L = 1024 tokens, two bytes each, are written to a temporary folder and read back as
training reads them: shuffled over the whole file, batched, with numbers and weights, a batch at a
time. Goal: at least 2M tokens per second and process. `memory` is the same loader over an array.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from array_record.python import (
  array_record_data_source as records,
)
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from benchmarks import timing
from md4vmd import data
from md4vmd.data.base import Arrays, Dataset, Item, Source

_VOCAB_SIZE = 50257


class Records:
  """Examples in ArrayRecord files, one record of two-byte tokens each."""

  def __init__(self, path: pathlib.Path):
    self._records = records.ArrayRecordDataSource([str(path)])

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Item:
    return {"x": np.frombuffer(self._records[index], np.uint16).astype(np.int32)}


def write(path: pathlib.Path, x_NxL: np.ndarray) -> None:
  """One record a row, each readable by itself."""
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  for x_L in x_NxL:
    writer.write(x_L.tobytes())
  writer.close()


def stream(source: Source, length: int, batch_size: int) -> Iterator[Item]:
  """Training batches of a source."""
  dataset = Dataset(vocab_size=_VOCAB_SIZE, length=length, splits={"train": source}, about="random")
  return data.train_batches(dataset, batch_size=batch_size, seed=0)


def read(batches: Iterator[Item], count: int) -> float:
  """Seconds for that many batches."""
  start = time.perf_counter()
  for _ in range(count):
    next(batches)
  return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--examples", type=int, default=20_000)
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--batches", type=int, default=100, help="in a round")
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  shape = (options.examples, options.length)
  x_NxL = np.random.default_rng(0).integers(0, _VOCAB_SIZE, shape).astype(np.uint16)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "tokens.array_record"
    write(path, x_NxL)
    sources = {"array_record": Records(path), "memory": Arrays(x_NxL)}
    streams = {
      name: stream(source, options.length, options.batch_size) for name, source in sources.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for i in range(options.rounds + 1):
      for name, batches in streams.items():
        taken = read(batches, options.batches)
        if i:  # the first round fills the loader's buffers
          seconds[name].append(taken)
  tokens = options.batches * options.batch_size * options.length
  rates = {name: tokens / np.array(values) for name, values in seconds.items()}
  rows = [[name, float(np.median(values)), float(values.min())] for name, values in rates.items()]
  timing.say(timing.table(("source", "tokens/s, median", "tokens/s, slowest round"), rows))
  figures = {f"{name}/tokens_per_second": float(np.median(rates[name])) for name in rates}
  figures["array_record_over_memory"] = timing.ratio(rates["array_record"], rates["memory"])
  timing.finish(figures | {"cores": timing.cores()}, options.json)


if __name__ == "__main__":
  main()
