"""Likelihood of texts that the model was not trained on, by named conventions."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from md4vmd import build, metrics, networks, rngs, samplers, steps
from md4vmd.build import Model
from md4vmd.data import answers, corpora
from md4vmd.evaluators import walk
from md4vmd.evaluators.answers import share, tokenizer_of
from md4vmd.evaluators.likelihood import Scorer

_COLUMNS = ("set", "convention", "perplexity", "+-", "bits/token", "+-", "scored", "dropped")
_COLUMNS += ("over limit", "ppl/word", "bits/byte")


class ZeroShot:
  """Perplexity of published sets from local files, each by each convention of packing.

  Per word and per byte: the nats of the scored chunks, times all tokens of the set over those of
  its text in these chunks, over the words of the text as published and over the bytes of the text
  as it is scored.

  Args:
    model: what the config built; its data are tokens of a tokenizer.
    sets: "name=path" of each file; names are those of `data.corpora.SETS`.
    conventions: of `data.corpora.CONVENTIONS`.
    draws: draws per chunk.
    limit: only the first chunks of a set, and passages of LAMBADA; None takes all.
    calls: network calls for the last word of a passage of LAMBADA, a token each.
  """

  def __init__(
    self,
    model: Model,
    sets: tuple[str, ...],
    conventions: tuple[str, ...] = tuple(corpora.CONVENTIONS),
    draws: int = 4,
    limit: int | None = None,
    calls: int = 8,
  ):
    self.model, self.limit = model, limit
    self.tokenizer = tokenizer_of(model, "evaluators.zero_shot")
    self.scorer = Scorer(model, draws)
    paths = dict(_name_and_path(entry) for entry in sets)
    if len(paths) < len(sets):
      raise ValueError(f"evaluators.zero_shot.sets names a set twice: {', '.join(sets)}")
    self.packed = {
      (name, convention): corpora.pack(
        name, path, self.tokenizer, length=model.dataset.length, convention=convention
      )
      for name, path in paths.items()
      for convention in conventions
    }
    self.passages = {}
    for name in [name for name in paths if name in corpora.PASSAGES]:
      questions = answers.last_words(name, paths[name])[:limit]
      pairs = [(question.prompt, question.choices[0]) for question in questions]
      self.passages[name] = answers.rows(self.tokenizer, pairs, model.dataset.length)
    self._fill = jax.jit(
      functools.partial(
        steps.sample_step,
        **model.filling(sampler=_greedy(model), times=samplers.times("uniform", calls)),
      )
    )

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Figures as set/convention/quantity, and all of them in one table."""
    del step
    if not self.packed:
      return {"convention": "no sets: set evaluators.zero_shot.sets to ('wikitext2=FILE', ...)"}
    figures: dict[str, Any] = {}
    rows = []
    for (name, convention), packed in self.packed.items():
      prefix = f"{name}/{convention}"
      figures |= self._score(prefix, packed, params)
      rows.append([name, convention, *_shown(prefix, figures)])
    by_draws = [
      [*names, self.scorer.by_draws(f"{'/'.join(names)}/nelbo", figures)] for names in self.packed
    ]
    for name, passages in self.passages.items():
      figures |= self._last_words(name, passages, params)
    return figures | {
      "convention": f"{self.scorer.convention}; sets as packed by their convention",
      "draws": self.scorer.draws,
      "table": "\n" + _table([_COLUMNS, *rows]),
      "standard_error_by_draws": "\n" + _table(by_draws),
    }

  def _score(self, prefix: str, packed: corpora.Packed, params: Any) -> dict[str, float]:
    bounds = self.scorer.score(params, packed.source, self.limit)
    nats_NxK = bounds.nats_NxK["nelbo"]
    figures = metrics.likelihood_report(prefix, nats_NxK.mean(1), bounds.tokens_N, unit="token")
    figures |= metrics.draws_report(f"{prefix}/nelbo", nats_NxK, bounds.tokens_N)
    chunk = self.model.dataset.length - packed.framed
    nats = float(nats_NxK.mean(1).sum()) * packed.tokens / (chunk * len(nats_NxK))
    per = {"word": nats / packed.words, "byte": nats / packed.bytes}
    return figures | {
      f"{prefix}/tokens_dropped": packed.dropped,
      f"{prefix}/tokens_over_limit": chunk * (len(packed.source) - len(nats_NxK)),
      f"{prefix}/tokens_of_the_set": packed.tokens,
      f"{prefix}/documents": packed.documents,
      f"{prefix}/words": packed.words,
      f"{prefix}/bytes": packed.bytes,
      **{f"{prefix}/perplexity_per_{unit}": math.exp(min(n, 700.0)) for unit, n in per.items()},
      f"{prefix}/bits_per_byte": per["byte"] / math.log(2),
    }

  def _last_words(self, name: str, passages: answers.Rows, params: Any) -> dict[str, Any]:
    """Share of the passages of LAMBADA whose last word is found, token by token, most likely first.

    A model with a schedule for each token reveals them in its own order.
    """
    key = rngs.stream(self.model.seed, 0, "last_words")

    def measure(batch):
      return (self._fill(params, batch, key).x_BxL == batch.x_BxL).all(-1)

    is_hit_N = walk.over(self.model, passages.source, measure)
    figures = share(f"{name}/last_word_accuracy", is_hit_N)
    return figures | {
      f"{name}/passages": len(is_hit_N),
      f"{name}/passages_shortened": passages.shortened,
    }


def _name_and_path(entry: str) -> tuple[str, Path]:
  name, equals, path = entry.partition("=")
  if not equals or not path:
    raise ValueError(f"evaluators.zero_shot.sets: '{entry}' is not of the form name=path")
  return name, Path(path)


def _greedy(model: Model):
  is_by_token = isinstance(model.network, networks.TokenPowerNetwork)
  return build.sampler("token_ancestral" if is_by_token else "top_prob", temperature=0.0)


def _shown(prefix: str, figures: dict[str, Any]) -> list[str]:
  """The cells of a row behind the names."""
  get = lambda name: figures[f"{prefix}/{name}"]
  perplexity = get("perplexity_bound")
  return [
    f"{perplexity:.2f}",
    f"{perplexity * get('nelbo_nats_per_token_standard_error'):.2f}",
    f"{get('nelbo_bits_per_token'):.3f}",
    f"{get('nelbo_bits_per_token_standard_error'):.3f}",
    f"{get('tokens'):,.0f}",
    f"{get('tokens_dropped'):,}",
    f"{get('tokens_over_limit'):,}",
    f"{get('perplexity_per_word'):.4g}",
    f"{get('bits_per_byte'):.3f}",
  ]


def _table(rows: list[Any]) -> str:
  """Rows of text in columns: names to the left, figures to the right."""
  widths = np.array([[len(cell) for cell in row] for row in rows]).max(0)
  line = lambda row: "  ".join(
    cell.ljust(width) if i < 2 else cell.rjust(width)
    for i, (cell, width) in enumerate(zip(row, widths, strict=True))
  )
  return "\n".join(map(line, rows))
