"""n-grams of characters: a plain language model to judge samples with."""

from __future__ import annotations

import numpy as np

_AT_ONCE = 10_000_000  # tokens counted at a time
_LARGEST_TABLE = 20_000_000


class Ngrams:
  """Interpolated n-grams (Witten and Bell 1991), learned from the counts of a text.

  p(c | h) = (N(hc) + D(h) p(c | h')) / (N(h) + D(h)): h the last n - 1 tokens, h' all of them but
  the first, N counts, D(h) the number of different tokens that follow h. At the end stands the
  uniform distribution.

  Attributes:
    order: n. At most the order that was asked for whose table has 20 million entries or fewer.
  """

  def __init__(self, tokens_N: np.ndarray, vocab_size: int, order: int = 5):
    """Counts the text: integers below vocab_size."""
    largest = max(1, int(np.log(_LARGEST_TABLE) / np.log(max(vocab_size, 2))))
    self.order, self.vocab_size = min(order, largest), vocab_size
    self._counts = [_count(tokens_N, vocab_size, n) for n in range(1, self.order + 1)]

  def log_prob(self, tokens_BxL: np.ndarray) -> np.ndarray:
    """log p of every token given those before it in its row, in nats: [B, L]."""
    count, length = tokens_BxL.shape
    p_BxL = np.full((count, length), 1.0 / self.vocab_size)
    for n, count_HxV in enumerate(self._counts, start=1):
      if n > length:
        break
      code_BxM = _codes(tokens_BxL, self.vocab_size, n)
      history_BxM, last_BxM = np.divmod(code_BxM, self.vocab_size)
      rows_BxMxV = count_HxV[history_BxM]
      different_BxM = (rows_BxMxV > 0).sum(-1)
      seen_BxM = np.take_along_axis(rows_BxMxV, last_BxM[..., None], axis=-1)[..., 0]
      total_BxM = rows_BxMxV.sum(-1) + different_BxM
      mixed_BxM = (seen_BxM + different_BxM * p_BxL[:, n - 1 :]) / np.maximum(total_BxM, 1)
      p_BxL[:, n - 1 :] = np.where(total_BxM > 0, mixed_BxM, p_BxL[:, n - 1 :])
    return np.log(p_BxL)


def _codes(tokens: np.ndarray, vocab_size: int, n: int) -> np.ndarray:
  """Numbers of the n-grams along the last axis, their last token varying fastest."""
  size = tokens.shape[-1] - n + 1
  code = np.zeros((*tokens.shape[:-1], size), np.int64)
  for i in range(n):
    code = code * vocab_size + tokens[..., i : i + size]
  return code


def _count(tokens_N: np.ndarray, vocab_size: int, n: int) -> np.ndarray:
  """count_HxV of the n-grams: of every history, and of every token after it."""
  counts = np.zeros(vocab_size**n, np.int32)
  for start in range(0, len(tokens_N), _AT_ONCE):
    codes = _codes(tokens_N[start : start + _AT_ONCE + n - 1], vocab_size, n)
    counts += np.bincount(codes, minlength=len(counts)).astype(np.int32)
  return counts.reshape(-1, vocab_size)
