"""Batches from sources: an endless stream for training, a padded walk for evaluation.

Batches are dicts of numpy arrays with the field names of `interfaces.Batch`. The rows of a global
batch of B are cut into equal parts, of which each process reads its own: what the parts hold in
order is the batch that a single process would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from md4vmd.data.base import Dataset, Item, Source, require

FIELDS = {
  "x": "x_BxL",
  "given": "given_BxL",
  "scored": "scored_BxL",
  "label": "label_B",
  "index": "index_B",
}

# One thread, a few batches ahead: making small items holds the interpreter's lock, so that more
# threads only wait for each other, and grain's default buffer of 500 elements is 500 batches here.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)

# Grain's shuffle takes a time per example that grows as 1 / length below some thousands of them, so
# the copies of a smaller split are shuffled together.
_SHUFFLED_TOGETHER = 4096


class _Numbered:
  """Copies of a source, one after the other, whose items carry their number as "index"."""

  def __init__(self, source: Source, copies: int):
    self._source = source
    self._copies = copies

  def __len__(self) -> int:
    return len(self._source) * self._copies

  def __getitem__(self, index: int) -> Item:
    number = index % len(self._source)
    return {**self._source[number], "index": np.asarray(number, np.int32)}


def train_batches(
  dataset: Dataset,
  *,
  batch_size: int,
  seed: int,
  parts: int = 1,
  own: Sequence[int] = (0,),
  start: int = 0,
) -> Iterator[Item]:
  """Batches of the training split for ever: reshuffled every epoch, augmented, none dropped.

  Example n of the stream is a function of (dataset, seed, n), whatever the number of processes.

  Args:
    dataset: the examples.
    batch_size: size B of the global batch, over all processes.
    seed: seed of the order and of the augmentation.
    parts: number of parts that the rows are cut into; divides `batch_size`.
    own: the parts that this process reads, in ascending order.
    start: position of the stream, the number of global examples already used: a multiple of
      `batch_size`.
  """
  rows = _rows_of_a_part(batch_size, parts, own)
  require(0 <= seed < 2**32, "give a seed in [0, 2**32)", seed=seed)
  require(
    start >= 0 and start % batch_size == 0,
    "the position is a multiple of the batch size: resume with the batch size of the run",
    start=start,
    batch_size=batch_size,
  )
  source = dataset.split(dataset.train_split)
  copies = -(-_SHUFFLED_TOGETHER // len(source))
  examples = grain.MapDataset.source(_Numbered(source, copies)).seed(seed).shuffle().repeat()
  examples = examples.random_map(dataset.augment)
  # Slicing comes last: of the repeated stream, and of whole parts.
  cut = examples.batch(rows, drop_remainder=True)
  first = start // batch_size * parts
  streams = [cut[first + part :: parts].to_iter_dataset(_READ_OPTIONS) for part in own]
  return map(_as_batch, zip(*streams, strict=True))


def _as_batch(items: Sequence[Item]) -> Item:
  """The batch of the parts of a process."""
  joined = items[0]
  if len(items) > 1:
    joined = {key: np.concatenate([part[key] for part in items]) for key in joined}
  batch = {FIELDS[key]: array for key, array in joined.items()}
  return batch | {"weight_B": np.ones(len(batch["x_BxL"]), np.float32)}


def evaluation_batches(
  source: Source,
  *,
  batch_size: int,
  parts: int = 1,
  own: Sequence[int] = (0,),
  limit: int | None = None,
) -> Iterator[Item]:
  """The whole split in order, or its first `limit` examples; the same number of batches everywhere.

  The last batch is filled with copies of the last example, of weight 0.

  Args:
    source: the split.
    batch_size: size B of the global batch, over all processes.
    parts: number of parts that the rows are cut into; divides `batch_size`.
    own: the parts that this process reads, in ascending order.
    limit: number of examples to stop after.
  """
  rows = _rows_of_a_part(batch_size, parts, own)
  require(limit is None or limit > 0, "must be positive", limit=limit)
  count = len(source) if limit is None else min(limit, len(source))
  require(count > 0, "the split is empty", examples=count)
  numbered = _Numbered(source, copies=1)

  def batch(start: int) -> Item:
    place_B = start + np.concatenate([part * rows + np.arange(rows) for part in own])
    items = [numbered[index] for index in np.minimum(place_B, count - 1).tolist()]
    stacked = {FIELDS[key]: np.stack([item[key] for item in items]) for key in items[0]}
    return stacked | {"weight_B": (place_B < count).astype(np.float32)}

  return map(batch, range(0, count, batch_size))


def _rows_of_a_part(batch_size: int, parts: int, own: Sequence[int]) -> int:
  """Rows of each part of the global batch."""
  require(
    len(own) > 0 and list(own) == sorted(set(own)) and 0 <= own[0] and own[-1] < parts,
    "a process reads some of the parts, in ascending order",
    own=tuple(own),
    parts=parts,
  )
  require(
    batch_size > 0 and batch_size % parts == 0,
    "the batch is cut evenly: make batch_size a multiple of parts",
    batch_size=batch_size,
    parts=parts,
  )
  return batch_size // parts
