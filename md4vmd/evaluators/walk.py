"""The walk over a source that evaluators share: every example once, whatever the batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from md4vmd import data, partitioning
from md4vmd.build import Model
from md4vmd.data.base import Item
from md4vmd.interfaces import Batch


def over(
  model: Model, source: data.Source, measure: Callable[[Batch], Any], *, limit: int | None = None
) -> Any:
  """What `measure` says of every example of a source.

  Args:
    model: its mesh and its batch size.
    source: the examples.
    measure: batch -> pytree of arrays with the examples along their first axis.
    limit: only the first examples; None takes all.

  Returns:
    The pytree with numpy leaves [N, ...], without the copies that fill the last batch; the same on
    every process.
  """
  parts = []
  for arrays in data.evaluation_batches(
    source,
    batch_size=model.run.batch_size,
    limit=limit,
    **partitioning.share(model.mesh),
  ):
    batch = partitioning.put_batch(model.mesh, arrays)
    measured, weight_B = partitioning.to_host((measure(batch), batch.weight_B))
    parts.append(jax.tree.map(lambda leaf, counts_B=weight_B > 0: leaf[counts_B], measured))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


class Blank:
  """Examples of which nothing is known but their class: where samples start from."""

  def __init__(self, count: int, dataset: data.Dataset):
    self._count, self._dataset = count, dataset

  def __len__(self) -> int:
    """Number of examples."""
    return self._count

  def __getitem__(self, index: int) -> Item:
    """The example of that number; classes come in turn."""
    item = {"x": np.full(self._dataset.length, self._dataset.vocab_size, np.int32)}
    if self._dataset.classes:
      item["label"] = np.array(index % self._dataset.classes, np.int32)
    return item
