"""From text to tokens and back: GPT-2's BPE, bytes, characters, or a file of `tokenizers`.

A tokenizer is a record that JSON can hold. Its hash names it, and prepared text carries it along.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers as library

from md4vmd.data.base import require

EOS = "<|endoftext|>"  # how the end of a document is shown, whatever its token
TEXT8 = " abcdefghijklmnopqrstuvwxyz"
_ENDS = (EOS, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_LARGEST_FILE = 64 * 2**20
_GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_FORMS = "'bytes', 'characters', 'characters:FILE', 'gpt2:FOLDER' or a .json file of tokenizers"


class Coder(Protocol):
  """How one kind of tokenizer works; ids of `encode_batch` never hold the end of a document."""

  @property
  def vocab_size(self) -> int:
    """V, the end of a document included."""
    ...

  @property
  def eos(self) -> int:
    """The token that ends a document."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
    """The ids of every text."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, replacement characters where bytes are no utf-8."""
    ...


class Tokenizer:
  """A tokenizer and the record that it was made from.

  Attributes:
    record: what JSON holds of it; "kind" is bytes, characters, gpt2 or library.
    vocab_size: V, the end of a document included.
    eos: the token that ends a document.
  """

  def __init__(self, record: Mapping[str, Any]):
    """Raises ValueError where the record is none."""
    kind = str(record.get("kind"))
    require(kind in _CODERS, f"there is no such kind; known: {', '.join(_CODERS)}", kind=kind)
    self.record = dict(record)
    self._coder = _CODERS[kind](record)
    self.vocab_size, self.eos = self._coder.vocab_size, self._coder.eos

  @property
  def hash(self) -> str:
    """SHA-256 of the record, which does not depend on how the files were laid out."""
    text = json.dumps(self.record, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """The tokens int32 of a text; marks of special tokens are text like any other."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens int32 of every text. Raises ValueError on a character without a token."""
    return [np.asarray(ids, np.int32) for ids in self._coder.encode_batch(texts)]

  def decode(self, x_N: np.ndarray) -> str:
    """The text of tokens, with `EOS` where a document ends."""
    x_N = np.asarray(x_N)
    pieces = np.split(x_N, np.flatnonzero(x_N == self.eos))
    parts = [piece[1:] if i else piece for i, piece in enumerate(pieces)]
    return EOS.join(self._coder.decode(part.tolist()) for part in parts)

  def save(self, file: Path) -> None:
    """Writes the record."""
    file.write_text(json.dumps(self.record, sort_keys=True), encoding="utf-8")


class _Bytes:
  vocab_size, eos = 257, 256

  def __init__(self, record: Mapping[str, Any]):
    del record

  def encode_batch(self, texts):
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]

  def decode(self, ids):
    return bytes(ids).decode("utf-8", errors="replace")


class _Characters:
  def __init__(self, record: Mapping[str, Any]):
    characters = record.get("characters")
    if not isinstance(characters, str) or len(set(characters)) != len(characters):
      raise ValueError(f"characters {characters!r}: give different characters, as one text")
    self.characters = characters
    self.eos, self.vocab_size = len(self.characters), len(self.characters) + 1
    self._ids = {mark: i for i, mark in enumerate(self.characters)}

  def encode_batch(self, texts):
    try:
      return [[self._ids[mark] for mark in text] for text in texts]
    except KeyError as error:
      raise ValueError(
        f"{error.args[0]!r} has no token: the text may hold {self.characters[:80]!r}"
      ) from error

  def decode(self, ids):
    return "".join(self.characters[i] for i in ids)


class _Library:
  """A `tokenizers.Tokenizer` whose special tokens in a text are plain text."""

  def __init__(self, tokenizer: library.Tokenizer, eos: str):
    self._tokenizer = tokenizer
    tokenizer.encode_special_tokens = True
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    if ids != list(range(len(ids))):
      raise ValueError("tokenizer: its ids are not 0 to V-1, each once; give another one")
    self.vocab_size, found = len(ids), tokenizer.token_to_id(eos)
    if found is None:
      raise ValueError(f"tokenizer: it has no token {eos!r} for the end of a document")
    self.eos = found

  @classmethod
  def from_json(cls, record: Mapping[str, Any]):
    try:
      made = library.Tokenizer.from_str(json.dumps(record["tokenizer"]))
      made.no_truncation()
      made.no_padding()
    except Exception as error:  # the library raises nothing more special
      raise ValueError(f"tokenizer: the library `tokenizers` cannot read it ({error})") from error
    return cls(made, str(record["eos"]))

  @classmethod
  def gpt2(cls, record: Mapping[str, Any]):
    try:
      merges = [(first, second) for first, second in record["merges"]]
      made = library.Tokenizer(library.models.BPE(dict(record["vocab"]), merges))
    except Exception as error:  # as above
      raise ValueError(f"tokenizer: its vocabulary and merges do not fit ({error})") from error
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    return cls(made, EOS)

  def encode_batch(self, texts):
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def decode(self, ids):
    return self._tokenizer.decode(ids, skip_special_tokens=False)


_CODERS: dict[str, Any] = {
  "bytes": _Bytes,
  "characters": _Characters,
  "gpt2": _Library.gpt2,
  "library": _Library.from_json,
}


def make(name: str) -> Tokenizer:
  """The tokenizer that a name stands for.

  Args:
    name: "bytes"; "characters" for those of text8, "characters:FILE" for those that a text file
      holds; "gpt2:FOLDER" with encoder.json and vocab.bpe, or vocab.json and merges.txt; or a .json
      file of the library `tokenizers`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the name or a file means nothing.
  """
  kind, _, place = name.partition(":")
  if name == "bytes":
    return Tokenizer({"kind": "bytes"})
  if kind == "characters":
    marks = _read(Path(place)) if place else TEXT8
    return Tokenizer({"kind": "characters", "characters": "".join(sorted(set(marks)))})
  if kind == "gpt2" and place:
    return _gpt2(Path(place))
  require(name.endswith(".json"), f"there is no such tokenizer: give {_FORMS}", tokenizer=name)
  content = _read_json(Path(name))
  if "kind" in content:
    return Tokenizer(content)
  try:
    added = [token["content"] for token in content.get("added_tokens") or []]
    known = [*added, *(content.get("model") or {}).get("vocab", ())]
  except (TypeError, AttributeError, KeyError) as error:
    raise ValueError(f"{name}: no file of the library `tokenizers` ({error})") from error
  ends = [end for end in _ENDS if end in known]
  require(bool(ends), f"it has none of {', '.join(_ENDS)} to end a document", tokenizer=name)
  return Tokenizer({"kind": "library", "eos": ends[0], "tokenizer": content})


def load(file: Path) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` wrote. Raises ValueError where the file holds none."""
  try:
    return Tokenizer(_read_json(file))
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def _gpt2(folder: Path) -> Tokenizer:
  for vocab, merges in _GPT2_FILES:
    if (folder / vocab).is_file() and (folder / merges).is_file():
      lines = _read(folder / merges).split("\n")
      pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
      record = {"kind": "gpt2", "vocab": _read_json(folder / vocab), "merges": pairs}
      return Tokenizer(record)
  raise FileNotFoundError(
    f"{folder} holds neither {' and '.join(_GPT2_FILES[0])} nor {' and '.join(_GPT2_FILES[1])}, "
    "the files of GPT-2's tokenizer; correct the folder or fetch them"
  )


def _read(file: Path) -> str:
  if not file.is_file():
    raise FileNotFoundError(f"there is no tokenizer file {file}; correct the path")
  size = file.stat().st_size
  require(size <= _LARGEST_FILE, f"{file} is too large for a tokenizer", bytes=size)
  try:
    return file.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{file}: not utf-8 at byte {error.start}") from error


def _read_json(file: Path) -> dict[str, Any]:
  try:
    content = json.loads(_read(file))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not a JSON file ({error})") from error
  require(isinstance(content, dict), "a tokenizer file holds one object", file=str(file))
  return content
