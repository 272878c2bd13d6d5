"""The prediction of a network whose head is one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from md4vmd import numerics, row_losses

_MOST_LOGITS = 20 * 2**20  # elements of the float32 logits of one chunk: 80 MiB
_MOST_ROWS = 1024
_TILE = 128  # rows of a matrix unit
_PARTS = 4  # of a chunk, for the rows that fill no whole one
_LARGEST_VOCABULARY_AT_ONCE = 1024


def padded(vocab_size: int) -> int:
  """Rows of the embedding and columns of the head: V tokens and the mask, in multiples of 128."""
  return 128 * -(-(vocab_size + 1) // 128)


def _rows_at_once(columns: int) -> int:
  """Rows of a chunk of the loss: whole tiles of a matrix unit where they fit the logits' memory.

  Few large chunks are faster: each adds its gradient to that of the whole head.
  """
  rows = min(_MOST_ROWS, _MOST_LOGITS // columns)
  return max(8, rows - rows % (_TILE if rows >= _TILE else 8))


@flax.struct.dataclass
class HeadPrediction:
  """mu = softmax(hidden @ kernel), evaluated only where it is asked for.

  Attributes:
    hidden_BxLxD: features before the head.
    kernel_DxP: the head, padded.
    vocab_size: V.
  """

  hidden_BxLxD: jax.Array
  kernel_DxP: jax.Array
  vocab_size: int = flax.struct.field(pytree_node=False)

  def weighted_nll(self, x_BxL: jax.Array, weight_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `interfaces.Prediction.weighted_nll`."""
    total, nats_BxL, _ = self.weighted_loss(row_losses.cross_entropy, x_BxL, weight_BxL)
    return total, nats_BxL

  def weighted_loss(
    self,
    row_loss: row_losses.RowLoss,
    x_BxL: jax.Array,
    weight_BxL: jax.Array,
    values_V: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `interfaces.Prediction.weighted_loss`."""
    return numerics.weighted_loss(
      row_loss,
      self.hidden_BxLxD,
      self.kernel_DxP,
      x_BxL,
      weight_BxL,
      values_V,
      vocab_size=self.vocab_size,
      chunk=_rows_at_once(self.kernel_DxP.shape[1]),
      parts=_PARTS if x_BxL.size > _TILE else 1,
    )

  def map_rows(
    self,
    function: Callable[..., Any],
    where_BxL: jax.Array,
    *arguments_BxL: jax.Array,
    rows_at_once: int = 64,
  ) -> Any:
    """See `interfaces.Prediction.map_rows`."""
    return numerics.map_rows(
      function,
      self.hidden_BxLxD,
      self.kernel_DxP,
      where_BxL,
      *arguments_BxL,
      vocab_size=self.vocab_size,
      chunk=rows_at_once,
    )

  def logits(self) -> jax.Array:
    """logits_BxLxV in float32.

    Raises:
      ValueError: the vocabulary is too large to hold the logits of every position.
    """
    if self.vocab_size > _LARGEST_VOCABULARY_AT_ONCE:
      raise ValueError(
        f"logits() of {self.vocab_size} tokens would fill the memory; it serves vocabularies up "
        f"to {_LARGEST_VOCABULARY_AT_ONCE}: use weighted_nll or map_rows"
      )
    logits_BxLxP = numerics.chunk_logits(self.hidden_BxLxD, self.kernel_DxP, self.vocab_size)
    return logits_BxLxP[..., : self.vocab_size].astype(jnp.float32)
