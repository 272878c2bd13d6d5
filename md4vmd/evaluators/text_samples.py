"""Quality of sampled characters by the number of sampling steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from md4vmd import rngs, samplers, steps
from md4vmd.build import Model
from md4vmd.data.ngrams import Ngrams
from md4vmd.data.text import Text
from md4vmd.evaluators import walk

_PIECE = 1_000_000  # characters


class TextSamples:
  """Words and n-gram bits of samples, beside those of the validation text.

  valid_words: the share of the words between two spaces that occur in the training text.
  different_words: different ones of them over all of them. ngram_bits: bits per character under
  interpolated n-grams of the training text; samples that repeat themselves may have few bits, so
  read it beside different_words and beside the figure of the validation text.

  Args:
    model: what the config built; its dataset is the characters of a text.
    calls: numbers of sampling steps T, on the grid of config.sampler.
    count: samples for each, and pieces of the validation text.
    order: n of the n-grams.
  """

  def __init__(
    self,
    model: Model,
    calls: tuple[int, ...] = (8, 16, 32, 64),
    count: int = 256,
    order: int = 5,
  ):
    if not isinstance(model.dataset, Text):
      raise ValueError("evaluators.text_samples needs characters; set run.evaluators to the others")
    if count < 1 or min(calls, default=0) < 1:
      raise ValueError(f"evaluators.text_samples: count {count} and calls {calls} must be positive")
    self.model, self.dataset, self.count = model, model.dataset, count
    self._samplers = {
      number: jax.jit(
        functools.partial(
          steps.sample_step, **model.filling(times=samplers.times(model.sampling.grid, number))
        )
      )
      for number in calls
    }
    self._ngrams = Ngrams(self.dataset.train_tokens_N, self.dataset.vocab_size, order)
    self._words = _words(self.dataset)

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Figures as T<steps>/<figure>, and those of the validation text as valid/<figure>."""
    del step
    key, figures = rngs.stream(self.model.seed, 0, "text_samples"), {}
    blank = walk.Blank(self.count, self.dataset)
    for calls, sample in self._samplers.items():
      measure = lambda batch, sample=sample: sample(params, batch, key)
      samples = walk.over(self.model, blank, measure)
      figures |= self._judge(f"T{calls}", samples.x_BxL)
      figures[f"T{calls}/network_calls_mean"] = float(samples.calls_B.mean())
    source = self.dataset.split("valid")
    whole = max(1, len(source) - 1)  # the last piece may be padded
    real_BxL = np.stack([source[i]["x"] for i in range(min(self.count, whole))])
    figures |= self._judge("valid", real_BxL)
    return figures | {
      "convention": f"{self.count} samples, {self.model.sampling.grid} grid; words of the training "
      f"text; {self._ngrams.order}-grams of it, Witten-Bell"
    }

  def _judge(self, name: str, x_BxL: np.ndarray) -> dict[str, float]:
    words = [word for x_L in x_BxL for word in self.dataset.decode(x_L).split(" ")[1:-1] if word]
    bits = -self._ngrams.log_prob(x_BxL).mean() / np.log(2)
    return {
      f"{name}/valid_words": float(np.mean([word in self._words for word in words] or [0.0])),
      f"{name}/different_words": len(set(words)) / max(len(words), 1),
      f"{name}/ngram_bits_per_character": float(bits),
    }


def _words(dataset: Text) -> set[str]:
  """Every word of the training text, found in pieces so that memory stays small."""
  words: set[str] = set()
  left = ""
  for start in range(0, len(dataset.train_tokens_N), _PIECE):
    piece = dataset.decode(dataset.train_tokens_N[start : start + _PIECE])
    *whole, left = (left + piece).split(" ")
    words.update(whole)
  return words | {left}
