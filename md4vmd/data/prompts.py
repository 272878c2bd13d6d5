"""Prompts: texts with marks where tokens are to be filled."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from md4vmd.data import documents
from md4vmd.data.base import Dataset

_MASK = re.compile(r"\[MASK(?::(\d+))?\]")
_MISSPELT = re.compile(r"(?:(?i:\[\s*mask\s*(?=[:=\d\]]|$))|\bMASK(?=:\d))[^\]\s]{0,8}\]?")
_FORM = 'a line is like {"prompt": "to be [MASK:20]"}'


class Prompt(NamedTuple):
  """A prompt and the place that it was read from, for messages."""

  text: str
  where: str


def read(prompt: str, file: str) -> list[Prompt]:
  """The prompts of config.sampler: `sampler.prompt`, then those of `sampler.prompts_file`.

  Args:
    prompt: a prompt; "" for none.
    file: jsonl of {"prompt": ...}; "" for none.

  Raises:
    OSError: the file cannot be opened.
    ValueError: it holds no prompts, or a line is none.
  """
  found = [Prompt(prompt, "sampler.prompt")] if prompt else []
  return found + (_read_file(file) if file else [])


def _read_file(file: str) -> list[Prompt]:
  try:
    rows = list(documents.json_lines(Path(file)))
  except OSError as error:
    message = f"sampler.prompts_file is '{file}': {error.strerror}; correct the path"
    raise type(error)(message) from error
  except ValueError as error:
    raise ValueError(f"{error}; {_FORM}") from error
  if not rows:
    raise ValueError(f"sampler.prompts_file is '{file}', which holds no prompts; {_FORM}")
  found = []
  for number, row in rows:
    where, text = f"{file}, line {number}", row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str):
      raise ValueError(f"{where}: there is no text 'prompt' in {str(row)[:60]!r}; {_FORM}")
    found.append(Prompt(text, where))
  return found


def parse_all(
  dataset: Dataset, prompts: Sequence[Prompt], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_BxL, free_BxL) of prompts, as `parse` makes them; its errors name the place too."""
  parsed = []
  for prompt in prompts:
    try:
      parsed.append(parse(dataset, prompt.text, length))
    except ValueError as error:
      raise ValueError(f"{prompt.where}: {error}") from error
  tokens, free = zip(*parsed, strict=True)
  return np.stack(tokens), np.stack(free)


def parse(
  dataset: Dataset, prompt: str, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_L, free_L) of a prompt: `[MASK:n]` stands for n free tokens, as does the mask mark.

  Positions behind the prompt stay unknown: the model sees masks there and they are not filled.

  Args:
    dataset: whose alphabet it is.
    prompt: the text.
    length: L; that of the data by default.

  Raises:
    ValueError: the prompt is longer than L, leaves nothing to fill, has a misspelt mark or holds
      characters without a token.
  """
  length = length or dataset.length
  texts, counts = _encode(dataset, prompt)
  total = sum(map(len, texts)) + sum(counts)
  if total > length:
    raise ValueError(
      f"the prompt {_short(prompt)} has {total} tokens and the model's sequences {length}; "
      "shorten it"
    )
  masks = [np.full(count, dataset.vocab_size, np.int32) for count in counts]
  tokens_N = np.concatenate([texts[0], *itertools.chain(*zip(masks, texts[1:], strict=True))])
  tokens_L = np.full(length, dataset.vocab_size, np.int32)
  tokens_L[:total] = tokens_N
  free_L = np.zeros(length, bool)
  free_L[:total] = tokens_N == dataset.vocab_size
  if not free_L.any():
    raise ValueError(
      f"the prompt {_short(prompt)} leaves nothing to fill; write {dataset.free_mark}"
    )
  return tokens_L, free_L


def _encode(dataset: Dataset, prompt: str) -> tuple[list[np.ndarray], list[int]]:
  """Tokens of the texts around the marks, and the tokens that each mark stands for."""
  pieces = _MASK.split(prompt)  # text, count, text, count, ..., text
  for text in pieces[::2]:
    if misspelt := _MISSPELT.search(text):
      raise ValueError(
        f"{misspelt[0]!r} in the prompt {_short(prompt)} is no mark of what to fill; "
        f"write {dataset.free_mark}"
      )
  try:
    texts = [dataset.encode(text) for text in pieces[::2]]
  except ValueError as error:
    raise ValueError(f"{error}; correct the prompt {_short(prompt)}") from error
  return texts, [int(count or 1) for count in pieces[1::2]]


def _short(prompt: str) -> str:
  return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")
