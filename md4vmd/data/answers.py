"""Prompts with answers: what is scored is the answer, given the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from md4vmd.data import corpora, documents
from md4vmd.data.base import Arrays, require
from md4vmd.data.tokenizers import Tokenizer


class Question(NamedTuple):
  """A prompt, the answers to choose from as they continue it, and the number of the right one."""

  prompt: str
  choices: tuple[str, ...]
  right: int


def read(path: Path) -> list[Question]:
  """The questions of a file of JSON lines.

  A line is {"ctx": text, "endings": [texts], "label": number}, HellaSwag's format, or {"prompt":
  text, "answer": text}. An answer follows its prompt after one space.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is neither, or the file holds none.
  """
  if not path.is_file():
    raise FileNotFoundError(f"there is no file of questions {path}; correct the path")
  questions = [_question(row, f"{path}, line {n}") for n, row in documents.json_lines(path)]
  require(len(questions) > 0, "the file holds no questions", path=str(path))
  return questions


def _question(row: Any, where: str) -> Question:
  try:
    prompt, choices, right = (
      (row["prompt"], [row["answer"]], 0)
      if "prompt" in row
      else (row["ctx"], row["endings"], int(row["label"]))
    )
    texts = [prompt, *choices]
    if all(isinstance(text, str) and text.strip() for text in texts) and right in range(
      len(choices)
    ):
      return Question(prompt.rstrip(), tuple(f" {choice.strip()}" for choice in choices), right)
  except (KeyError, TypeError, ValueError):
    pass
  raise ValueError(
    f'{where}: expected {{"ctx": text, "endings": [texts], "label": number of the right one}} or '
    '{"prompt": text, "answer": text}'
  )


def last_words(name: str, path: Path) -> list[Question]:
  """A set of passages, such as LAMBADA, as questions: the last word of each, given those before.

  Quotes and the like in front of the word belong to the prompt, those behind it to nothing.
  """
  split = [_last_word(text) for _, text in corpora.read(name, path)]
  return [Question(prompt, (word,), 0) for prompt, word in split if re.search(r"\w", prompt)]


def _last_word(text: str) -> tuple[str, str]:
  """(what stands before, the last word); a single space between the two belongs to the word."""
  found = re.search(r"( ?\w\S*?)\W*$", text)
  return (text[: found.start()], found[1]) if found else ("", "")


class Rows(NamedTuple):
  """Prompts with one answer each as examples, and how many prompts lost their beginning."""

  source: Arrays
  shortened: int


def rows(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], length: int) -> Rows:
  """Examples of (prompt, answer): given are the prompt and the unknown tokens behind the answer.

  A prompt begins a document, so the end-of-document token stands before it. One that leaves no room
  for its answer loses its beginning. Unknown tokens are the mask, id V.

  Raises:
    ValueError: an answer has no tokens, or more than `length`.
  """
  x_NxL = np.full((len(pairs), length), tokenizer.vocab_size, np.int32)
  given_NxL = np.ones((len(pairs), length), bool)
  prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
  answers = tokenizer.encode_batch([answer for _, answer in pairs])
  shortened = 0
  for i, (prompt_N, answer_N) in enumerate(zip(prompts, answers, strict=True)):
    require(
      0 < len(answer_N) <= length,
      f"an answer has {len(answer_N)} tokens; an example has room for 1 to {length}",
      answer=pairs[i][1][:40],
    )
    whole_N = np.concatenate([[tokenizer.eos], prompt_N, answer_N])
    shortened += len(whole_N) > length
    kept_N = whole_N[-length:]
    x_NxL[i, : len(kept_N)] = kept_N
    given_NxL[i, len(kept_N) - len(answer_N) : len(kept_N)] = False
  return Rows(Arrays(x_NxL, given=given_NxL), shortened)
