"""Characters of a text file: text8, or any text with at most 255 different characters."""

from __future__ import annotations

import functools
import gzip
import math
from pathlib import Path

import numpy as np

from md4vmd.data import documents
from md4vmd.data.base import Alphabet, Dataset, Item, Source, require
from md4vmd.data.tokenizers import TEXT8

_TEXT8_CHARACTERS = 100_000_000
_PAIRS_AT_ONCE = 10_000_000
_UNSEEN = 255  # stands for a character without a token while a file is being read


class Windows:
  """Every `stride`-th window of `length` tokens, for training; the end that fills none is left."""

  def __init__(self, tokens_N: np.ndarray, length: int, stride: int):
    self.tokens_N = tokens_N
    self.length = length
    self.stride = stride

  def __len__(self) -> int:
    """Number of examples."""
    return (len(self.tokens_N) - self.length) // self.stride + 1

  def __getitem__(self, index: int) -> Item:
    """The example of that number."""
    start = index * self.stride
    return {"x": self.tokens_N[start : start + self.length].astype(np.int32)}


class Chunks:
  """The tokens cut into consecutive pieces, for evaluation: each token is scored exactly once.

  The last piece is padded with token 0, which is not scored.
  """

  def __init__(self, tokens_N: np.ndarray, length: int):
    self.tokens_N = tokens_N
    self.length = length

  def __len__(self) -> int:
    """Number of examples."""
    return math.ceil(len(self.tokens_N) / self.length)

  def __getitem__(self, index: int) -> Item:
    """The example of that number."""
    start = index * self.length
    piece = self.tokens_N[start : start + self.length]
    x_L = np.zeros(self.length, np.int32)
    x_L[: len(piece)] = piece
    return {"x": x_L, "scored": np.arange(self.length) < len(piece)}


class Text(Dataset):
  """Windows of characters.

  A file of 100,000,000 text8 characters is cut as published: 90M train, 5M valid, 5M test. Another
  file is cut in those proportions. With `valid_path` the two files are train and valid as they are.

  The tokens are those of text8 (space 0, a to z 1 to 26) where nothing else occurs, otherwise the
  characters of the training part in the order of their code points.

  Attributes:
    characters: the characters of the tokens.
    train_tokens_N: the training part, uint8.
  """

  unit = "character"

  def __init__(
    self, *, path: str, length: int = 256, stride: int | None = None, valid_path: str | None = None
  ):
    """Reads the files.

    Args:
      path: text file, utf-8, plain or gzip (.gz).
      length: characters of an example.
      stride: distance between the starts of training windows; None for `length`, no overlap.
      valid_path: file of the valid split, where it is a file of its own.
    """
    require(length > 0, "must be positive", length=length)
    require(stride is None or stride > 0, "must be positive", stride=stride)
    codes_N = read_characters(Path(path))
    if valid_path is not None:
      parts = {"train": codes_N, "valid": read_characters(Path(valid_path))}
      cut = "train and valid are files of their own"
    else:
      is_text8 = len(codes_N) == _TEXT8_CHARACTERS and _is_text8(codes_N)
      first, second = len(codes_N) * 90 // 100, len(codes_N) * 95 // 100
      parts = dict(zip(("train", "valid", "test"), np.split(codes_N, [first, second]), strict=True))
      cut = "the published cut of text8, 90M/5M/5M" if is_text8 else "cut 90/5/5 in proportion"
    for name, part in parts.items():
      needed = length if name == "train" else 1
      require(
        len(part) >= needed,
        f"{name} has {len(part)} characters and needs {needed}: shorten length or add text",
        path=path,
        length=length,
      )
    if all(_is_text8(part) for part in parts.values()):
      self.characters = TEXT8
    else:
      self.characters = "".join(map(chr, np.unique(parts["train"]).tolist()))
    require(
      len(self.characters) <= _UNSEEN,
      f"there are {len(self.characters)} different characters: at most {_UNSEEN} can be tokens",
      path=path,
    )
    tokens = {name: _tokenize(part, self.characters, name) for name, part in parts.items()}
    self.train_tokens_N = tokens.pop("train")
    splits: dict[str, Source] = {"train": Windows(self.train_tokens_N, length, stride or length)}
    splits |= {name: Chunks(tokens_N, length) for name, tokens_N in tokens.items()}
    super().__init__(
      vocab_size=len(self.characters),
      length=length,
      splits=splits,
      about=f"characters of {path}, {cut}",
    )
    self._alphabet = Alphabet(self.characters, "_" if "_" not in self.characters else "█")

  @functools.cached_property
  def references_bits(self) -> dict[str, float]:
    """Entropy of a training character alone, and given the one before it."""
    return {
      "unigram entropy": unigram_entropy_bits(self.train_tokens_N, self.vocab_size),
      "bigram entropy": bigram_entropy_bits(self.train_tokens_N, self.vocab_size),
    }

  def decode(self, x_L: np.ndarray) -> str:
    """The text, with `_` at masks, or a block where `_` is a character of the text."""
    return self._alphabet.decode(x_L)

  def encode(self, text: str) -> np.ndarray:
    """The tokens of a text, its mask marks included."""
    return self._alphabet.encode(text)


def read_characters(file: Path) -> np.ndarray:
  """The code points of a utf-8 file, gzip or plain: uint8 where all are ASCII, otherwise uint32.

  Raises FileNotFoundError where there is no such file, ValueError where it cannot be read.
  """
  if not file.is_file():
    raise FileNotFoundError(
      f"no text file at {str(file)!r}: correct the path; text8 is on Matt Mahoney's page about the"
      " large text compression benchmark, zipped, and is used unzipped"
    )
  with documents.reading(file):
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
      raw = stream.read()
    codes_N = np.frombuffer(raw, np.uint8)
    if codes_N.max(initial=0) < 128:
      return codes_N
    return np.frombuffer(raw.decode("utf-8").encode("utf-32-le"), "<u4")


def _is_text8(codes_N: np.ndarray) -> bool:
  is_known = np.zeros(int(codes_N.max(initial=0)) + 128, bool)
  is_known[[ord(character) for character in TEXT8]] = True
  return bool(is_known[codes_N].all())


def _tokenize(codes_N: np.ndarray, characters: str, part: str) -> np.ndarray:
  """Tokens, uint8. Raises ValueError on a character that the training part does not have."""
  codes_V = np.array([ord(character) for character in characters])
  token_of = np.full(max(int(codes_N.max(initial=0)), int(codes_V.max())) + 1, _UNSEEN, np.uint8)
  token_of[codes_V] = np.arange(len(codes_V))
  tokens_N = token_of[codes_N]
  is_unseen = tokens_N == _UNSEEN
  if is_unseen.any():
    place = int(np.argmax(is_unseen))
    raise ValueError(
      f"{part}, character {place:,}: {chr(int(codes_N[place]))!r} does not occur in the training"
      " part, so it has no token; remove it or train on text that has it"
    )
  return tokens_N


def unigram_entropy_bits(tokens_N: np.ndarray, vocab_size: int) -> float:
  """Entropy of a token, by counts, in bits."""
  return _entropy_bits(np.bincount(tokens_N, minlength=vocab_size))


def bigram_entropy_bits(tokens_N: np.ndarray, vocab_size: int) -> float:
  """Entropy of a token given the one before it, by counts of pairs, in bits."""
  count_VxV = np.zeros((vocab_size, vocab_size), np.int64)
  for start in range(0, len(tokens_N) - 1, _PAIRS_AT_ONCE):
    first = tokens_N[start : start + _PAIRS_AT_ONCE + 1].astype(np.int32)
    pairs = first[:-1] * vocab_size + first[1:]
    count_VxV += np.bincount(pairs, minlength=vocab_size**2).reshape(count_VxV.shape)
  return _entropy_bits(count_VxV.ravel()) - _entropy_bits(count_VxV.sum(1))


def _entropy_bits(counts: np.ndarray) -> float:
  shares = counts[counts > 0] / counts.sum()
  return float(-(shares * np.log2(shares)).sum())
