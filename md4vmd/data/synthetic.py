"""The synthetic distributions of the VMD paper: short sequences over ten symbols."""

from __future__ import annotations

import numpy as np

from md4vmd.data.base import Alphabet, Arrays, Dataset

_SYMBOLS = 10


def _chain(length: int) -> np.ndarray:
  """The ten sequences k, k+1, ..., modulo 10."""
  return (np.arange(_SYMBOLS)[:, None] + np.arange(length)) % _SYMBOLS


def _two_pairs() -> np.ndarray:
  """The hundred sequences k, k+1, l, l+1, modulo 10."""
  k, j = np.divmod(np.arange(_SYMBOLS**2), _SYMBOLS)
  return np.concatenate([_chain(2)[k], _chain(2)[j]], axis=1)


# name: (support [M, L], copies [M]); the probabilities are the copies over their sum
DISTRIBUTIONS = {
  "pairs": (_chain(2), np.ones(10, int)),
  "pairs_skewed": (_chain(2), np.arange(10) + 1),
  "d1": (_chain(4), np.ones(10, int)),
  "d2": (_two_pairs(), np.ones(100, int)),
}


class Synthetic(Dataset):
  """A distribution over a few sequences, small enough to enumerate.

  Both splits hold each sequence in exact proportion to its probability: an epoch of "train" is the
  distribution, and a sum over "valid" is an exact expectation.

  Attributes:
    support_MxL: the sequences, int32.
    probabilities_M: their probabilities, float64.
  """

  def __init__(self, *, distribution: str):
    """Tabulates a distribution.

    Args:
      distribution: "pairs" (k, k+1) uniform; "pairs_skewed" with P = (k + 1) / 55; "d1"
        (k, k+1, k+2, k+3) uniform; "d2" (k, k+1, l, l+1) uniform; all modulo 10.
    """
    if distribution not in DISTRIBUTIONS:
      raise ValueError(
        f"distribution={distribution!r} does not exist: use one of {', '.join(DISTRIBUTIONS)}"
      )
    support_MxL, copies_M = DISTRIBUTIONS[distribution]
    self.support_MxL = support_MxL.astype(np.int32)
    probabilities_M = copies_M / copies_M.sum()
    self.probabilities_M = probabilities_M
    entropy_nats = float(-(probabilities_M * np.log(probabilities_M)).sum())
    source = Arrays(np.repeat(support_MxL, copies_M, axis=0))
    super().__init__(
      vocab_size=_SYMBOLS,
      length=support_MxL.shape[1],
      splits={"train": source, "valid": source},
      about=f"synthetic {distribution}, valid = the training distribution, exactly",
      entropies_nats={"train": entropy_nats, "valid": entropy_nats},
    )
    self._alphabet = Alphabet("0123456789", "_")

  def decode(self, x_L: np.ndarray) -> str:
    """The symbols as digits, `_` at masks."""
    return self._alphabet.decode(x_L)

  def encode(self, text: str) -> np.ndarray:
    """The tokens of digits and `_`."""
    return self._alphabet.encode(text)
