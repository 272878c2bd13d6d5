"""Pieces of prepared text: consecutive documents as tokens, in a file of their own.

The input alone decides what is a piece. Its file holds the tokens of its documents in order, and
what decides which of them are for validation.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from md4vmd.data import corpora, shards, tokenizers

# Named and versioned: which documents are held out for validation.
#   md4: those whose SHA-256 is 0 modulo 50, about 2 %; equal documents fall on the same side. MD4
#     itself holds out as many of the shuffled sequences that documents were cut into.
#   mdlm: the last 100,000 documents.
#   files: those of the files that --valid names.
CONVENTIONS = {"md4": "md4-v1", "mdlm": "mdlm-v1", "files": "files-v1"}
SPLITS = ("train", "valid")
ONE_IN = 50
LAST = 100_000
SIZE = 2**20  # characters of a piece


class Document(NamedTuple):
  """A text, whether it is held out by its file, and the name of the file."""

  text: str
  is_valid: bool
  file: str


class Piece(NamedTuple):
  """Consecutive documents: the number of the piece, and whether all of them are held out."""

  number: int
  documents: list[Document]
  is_valid: bool


def group(documents: Iterable[Document], counts: dict[str, int]) -> Iterator[Piece]:
  """Runs of documents of the same kind; counts them and the empty documents, which are left out."""
  for is_valid, group in itertools.groupby(documents, key=lambda document: document.is_valid):
    held, size = [], 0
    for document in group:
      if not document.text.strip():
        counts["empty"] += 1
        continue
      held.append(document)
      size += len(document.text)
      if size >= SIZE:
        yield Piece(counts["pieces"], held, is_valid)
        counts["pieces"] += 1
        held, size = [], 0
    if held:
      yield Piece(counts["pieces"], held, is_valid)
      counts["pieces"] += 1


def file_of(work: Path, number: int) -> Path:
  """Where a piece lies."""
  return work / f"piece-{number:07d}.npz"


def write(job: tuple[Path, Piece, str]) -> int:
  """Writes the tokens of a piece, the ends of its documents and what is held out; their number.

  Raises ValueError with the name of the file that holds a character without a token.
  """
  work, piece, detokenizer = job
  tokenizer = _tokenizer(work / shards.TOKENIZER)
  ids = _encode(tokenizer, detokenizer, piece.documents)
  tokens_N = np.concatenate([part for x_N in ids for part in (x_N, [tokenizer.eos])])
  digests = [hashlib.sha256(document.text.encode()).digest() for document in piece.documents]
  is_valid_D = [int.from_bytes(digest, "big") % ONE_IN == 0 for digest in digests]
  file = file_of(work, piece.number)
  partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
  with partial.open("wb") as stream:
    np.savez(
      stream,
      tokens_N=tokens_N.astype(shards.token_dtype(tokenizer.vocab_size)),
      ends_D=np.cumsum([len(x_N) + 1 for x_N in ids]),
      is_hashed_valid_D=np.array(is_valid_D),
      is_valid_file=np.array(piece.is_valid),
    )
  shards.publish(partial, file)
  return len(tokens_N)


def _encode(tokenizer, detokenizer, documents):
  texts = [corpora.DETOKENIZERS[detokenizer](document.text) for document in documents]
  try:
    return tokenizer.encode_batch(texts)
  except ValueError:
    for text, document in zip(texts, documents, strict=True):
      try:
        tokenizer.encode(text)
      except ValueError as error:
        raise ValueError(f"{document.file}: {error}") from error
    raise


_made: dict[Path, tokenizers.Tokenizer] = {}


def _tokenizer(file: Path) -> tokenizers.Tokenizer:
  """The tokenizer of a preparation, made once in a process."""
  if file not in _made:
    _made.clear()
    _made[file] = tokenizers.load(file)
  return _made[file]


class Stream:
  """The tokens of each split, in the pieces that hold them."""

  def __init__(self, work: Path, pieces: int, convention: str):
    self._work, self._convention = work, convention
    self._first_D = [0]  # number of the first document of every piece, and of all documents
    for number in range(pieces):
      with self._piece(number) as piece:
        self._first_D.append(self._first_D[-1] + len(piece["ends_D"]))
    self.documents = dict.fromkeys(SPLITS, 0)
    self._starts = {split: [0] for split in SPLITS}
    for number in range(pieces):
      with self._piece(number) as piece:
        is_valid_D, size_D = self._is_valid(number, piece), np.diff(piece["ends_D"], prepend=0)
      for split, is_in_D in zip(SPLITS, (~is_valid_D, is_valid_D), strict=True):
        self.documents[split] += int(is_in_D.sum())
        self._starts[split].append(self._starts[split][-1] + int(size_D[is_in_D].sum()))

  def size(self, split: str) -> int:
    """Tokens of a split."""
    return self._starts[split][-1]

  def _piece(self, number: int) -> Any:
    return np.load(file_of(self._work, number), allow_pickle=False)

  def _is_valid(self, number: int, piece: Any) -> np.ndarray:
    """True at the documents of a piece that are held out."""
    if self._convention == "md4":
      return piece["is_hashed_valid_D"]
    count = len(piece["ends_D"])
    if self._convention == "files":
      return np.full(count, bool(piece["is_valid_file"]))
    return self._first_D[number] + np.arange(count) >= self._first_D[-1] - LAST

  def _tokens(self, number: int, split: str) -> np.ndarray:
    """The tokens of a split in a piece."""
    with self._piece(number) as piece:
      is_in_D = self._is_valid(number, piece) == (split == "valid")
      return piece["tokens_N"][np.repeat(is_in_D, np.diff(piece["ends_D"], prepend=0))]

  def examples(self, split: str, start: int, stop: int, length: int) -> Iterator[np.ndarray]:
    """Tokens [start, stop) of a split, `length` at a time; the last may be shorter."""
    starts = self._starts[split]
    held = np.zeros(0, np.uint16)
    for number in range(len(starts) - 1):
      first, last = max(start, starts[number]), min(stop, starts[number + 1])
      if first >= last:
        continue
      tokens_N = self._tokens(number, split)[first - starts[number] : last - starts[number]]
      held = np.concatenate([held, tokens_N]) if len(held) else tokens_N
      whole = len(held) // length * length
      yield from held[:whole].reshape(-1, length)
      held = held[whole:]
    if len(held):
      yield held
