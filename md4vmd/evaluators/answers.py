"""Answers given prompts: Monte-Carlo bounds on -log p(answer | prompt), and multiple choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from md4vmd import metrics
from md4vmd.build import Model
from md4vmd.data import answers
from md4vmd.data.tokenizers import Tokenizer
from md4vmd.evaluators.likelihood import Bounds, Scorer


def tokenizer_of(model: Model, where: str) -> Tokenizer:
  """The tokenizer of the model's data. Raises ValueError for data without one."""
  tokenizer = getattr(model.dataset, "tokenizer", None)
  if tokenizer is None:
    raise ValueError(
      f"{where} reads text and this data has no tokenizer; use data 'tokens', or set "
      "run.evaluators to the others"
    )
  return tokenizer


def conditional_bounds(
  scorer: Scorer, params: Any, pairs: Sequence[tuple[str, str]]
) -> tuple[Bounds, int]:
  """Bounds on -log p(answer | prompt) of (prompt, answer) pairs, in nats by draw.

  The prompt is given, the answer alone is masked and scored. The bound is that of decoding the
  answer with the prompt in sight; its mean over draws has the standard error std / sqrt(K).

  Args:
    scorer: a model and its number of draws.
    params: parameters.
    pairs: the texts.

  Returns:
    The bounds, and how many prompts lost their beginning for want of room.

  Raises:
    ValueError: the data have no tokenizer, or an answer has no tokens or too many.
  """
  tokenizer = tokenizer_of(scorer.model, "the likelihood of answers")
  packed = answers.rows(tokenizer, pairs, scorer.model.dataset.length)
  return scorer.score(params, packed.source), packed.shortened


class Answers:
  """Likelihood of the right answers, and how often it is the most likely one.

  Args:
    model: what the config built; its data are tokens of a tokenizer.
    path: JSON lines of questions, see `data.answers.read`; "" for none.
    draws: draws per answer.
    limit: only the first questions; None takes all.
  """

  def __init__(self, model: Model, path: str = "", draws: int = 16, limit: int | None = None):
    tokenizer_of(model, "evaluators.answers")
    self.questions = answers.read(Path(path))[:limit] if path else []
    self.model, self.scorer = model, Scorer(model, draws)

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Nats per token of the right answers; accuracy by the whole bound and by nats per byte."""
    del step
    questions = self.questions
    if not questions:
      return {"convention": "no questions: set evaluators.answers.path to a file of JSON lines"}
    pairs = [(q.prompt, choice) for q in questions for choice in q.choices]
    bounds, shortened = conditional_bounds(self.scorer, params, pairs)
    nats_NxK = bounds.nats_NxK["nelbo"]
    starts = np.cumsum([0, *(len(q.choices) for q in questions)])
    right = starts[:-1] + np.array([q.right for q in questions])
    figures: dict[str, Any] = metrics.ratio_report(
      "answers/nelbo", nats_NxK[right].mean(1), bounds.tokens_N[right], unit="token"
    )
    figures |= metrics.draws_report("answers/nelbo", nats_NxK[right], bounds.tokens_N[right])
    if any(len(q.choices) > 1 for q in questions):
      size_N = np.array([len(answer.encode()) for _, answer in pairs])
      for name, nats_N in {
        "accuracy": nats_NxK.mean(1),
        "accuracy_per_byte": nats_NxK.mean(1) / size_N,
      }.items():
        chosen = [first + np.argmin(part) for first, part in _parts(nats_N, starts)]
        figures |= share(f"answers/{name}", np.equal(chosen, right))
    return figures | {
      "answers/questions": len(questions),
      "answers/prompts_shortened": shortened,
      "convention": f"{self.scorer.convention}; the prompt is given, the answer alone is scored",
      "draws": self.scorer.draws,
      "standard_error_by_draws": self.scorer.by_draws("answers/nelbo", figures),
    }


def _parts(nats_N: np.ndarray, starts: np.ndarray):
  return zip(starts[:-1], np.split(nats_N, starts[1:-1]), strict=True)


def share(name: str, is_hit_N: np.ndarray) -> dict[str, float]:
  """A share of hits with its standard error."""
  mean = float(np.mean(is_hit_N))
  error = math.sqrt(mean * (1 - mean) / len(is_hit_N))
  return {name: mean, f"{name}_standard_error": error}
