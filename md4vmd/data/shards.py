"""Prepared text on the disk: ArrayRecord shards of raw tokens, a manifest and the tokenizer.

A folder holds `<split>-<number>-of-<count>.arrayrecord`, `tokenizer.json` and, written last,
`manifest.json`. A record is an example: little-endian uint16 tokens, or uint32 where the vocabulary
needs them. The last record of the valid split may be shorter.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from md4vmd.data.base import Item, require

VERSION = "tokens-v1"
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
_LARGEST_MANIFEST = 64 * 2**20
_AT_ONCE = 2**20


class Shard(NamedTuple):
  """A file of a split: its name, records, size in bytes and SHA-256."""

  name: str
  examples: int
  bytes: int
  sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
  """How tokens are stored: the smaller of uint16 and uint32 that holds them."""
  return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_shard(file: Path, examples: Iterable[np.ndarray], work: Path) -> Shard:
  """Writes records to a file, which is made in the folder `work` and moved when it is complete.

  Raises OSError where they cannot be written.
  """
  partial = work / f"{file.name}.{os.getpid()}.partial"
  # Not compressed and one record to a group: any record is read alone, and the bytes depend on
  # the records only.
  writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
  count = 0
  try:
    for x_L in examples:
      writer.write(x_L.tobytes())
      count += 1
    writer.close()
  except RuntimeError as error:  # of the library
    raise OSError(f"{partial} cannot be written ({error}); is the disk full?") from error
  sha256 = _sha256(partial)
  publish(partial, file)
  return Shard(file.name, count, file.stat().st_size, sha256)


def publish(partial: Path, file: Path) -> None:
  """Gives a complete file its name, after its bytes are on the disk."""
  with partial.open("rb") as stream:
    os.fsync(stream.fileno())
  os.replace(partial, file)


def write_json(file: Path, value: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
  partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  publish(partial, file)


def read_json(file: Path) -> Any:
  """The value of a JSON file. Raises ValueError with its name where it is none."""
  size = file.stat().st_size
  require(size <= _LARGEST_MANIFEST, f"{file} is too large", bytes=size)
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file}: not a JSON file ({error}); prepare the text again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
  """The manifest of prepared text.

  Raises:
    ValueError: it is damaged, or of another version.
  """
  file = folder / MANIFEST
  manifest = read_json(file)
  version = manifest.get("version") if isinstance(manifest, dict) else None
  if version != VERSION:
    raise ValueError(f"{file}: its version is {version!r} and not '{VERSION}'; prepare it again")
  try:
    for key in ("length", "vocab_size"):
      require(isinstance(manifest[key], int) and manifest[key] > 0, "must be positive", key=key)
    for split in manifest["splits"].values():
      for key in ("documents", "tokens", "tokens_dropped"):
        require(isinstance(split[key], int), "must be a number", key=key)
      split["shards"] = [Shard(**shard) for shard in split["shards"]]
      for shard in split["shards"]:
        is_plain = shard.name == os.path.basename(shard.name) and not shard.name.startswith(".")
        require(is_plain, "a shard lies in the folder itself", name=shard.name)
      examples = sum(shard.examples for shard in split["shards"])
      require(examples == split["examples"], "its shards hold others", examples=split["examples"])
    for key in ("tokenizer_sha256", "convention", "source"):
      require(isinstance(manifest[key], str), "must be a text", key=key)
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(f"{file}: it is damaged ({error}); prepare the text again") from error
  return manifest


def require_there(folder: Path, shards: Iterable[Shard]) -> None:
  """Raises ValueError where a shard is missing or has another size."""
  for shard in shards:
    file = folder / shard.name
    size = file.stat().st_size if file.is_file() else None
    if size != shard.bytes:
      found = "is missing" if size is None else f"has {size} bytes"
      raise ValueError(
        f"{file} {found}, the manifest says {shard.bytes} bytes; copy it again, or delete the "
        "folder and prepare the text again"
      )


class Shards:
  """The examples of a split, by random access; each shard is checked when it is first used.

  Args:
    folder: where the shards lie.
    shards: the shards in order.
    length: L.
    vocab_size: V, above which no token may be.
    is_padded: whether the last record may be short; items then say which tokens are "scored".
    verify: whether the SHA-256 of a shard is compared at its first use; its size always is.

  Raises:
    ValueError: a shard is missing or has another size.
  """

  def __init__(
    self,
    folder: Path,
    shards: list[Shard],
    *,
    length: int,
    vocab_size: int,
    is_padded: bool,
    verify: bool = True,
  ):
    self._folder, self._shards, self._verify = folder, shards, verify
    self._length, self._vocab_size, self._is_padded = length, vocab_size, is_padded
    self._dtype = token_dtype(vocab_size)
    self._ends = np.cumsum([shard.examples for shard in shards]).tolist()
    self._readers: dict[int, Any] = {}
    self._lock = threading.Lock()
    require_there(folder, shards)

  def __len__(self) -> int:
    """Number of examples."""
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> Item:
    """The example of that number. Raises ValueError with the name of a corrupt shard."""
    require(0 <= index < len(self), f"there are {len(self)} examples", index=index)
    number = bisect.bisect_right(self._ends, index)
    place = index - (self._ends[number - 1] if number else 0)
    shard = self._shards[number]
    try:
      (record,) = self._reader(number).read([place])
    except (RuntimeError, IndexError) as error:
      raise self._corrupt(shard, f"record {place}: {error}") from error
    if len(record) % self._dtype.itemsize:
      raise self._corrupt(shard, f"record {place} has {len(record)} bytes")
    tokens_N = np.frombuffer(record, self._dtype)
    is_last = index == len(self) - 1
    if len(tokens_N) != self._length and not (self._is_padded and is_last):
      raise self._corrupt(shard, f"record {place} has {len(tokens_N)} tokens, not {self._length}")
    if not 0 < len(tokens_N) <= self._length or tokens_N.max() >= self._vocab_size:
      raise self._corrupt(shard, f"record {place} holds no tokens of a vocabulary of this size")
    x_L = np.zeros(self._length, np.int32)
    x_L[: len(tokens_N)] = tokens_N
    if not self._is_padded:
      return {"x": x_L}
    return {"x": x_L, "scored": np.arange(self._length) < len(tokens_N)}

  def _reader(self, number: int):
    with self._lock:
      if number not in self._readers:
        shard = self._shards[number]
        file = self._folder / shard.name
        if self._verify and _sha256(file) != shard.sha256:
          raise self._corrupt(shard, "its SHA-256 is not that of the manifest")
        reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0")
        if reader.num_records() != shard.examples:
          raise self._corrupt(shard, f"it has {reader.num_records()} records")
        self._readers[number] = reader
      return self._readers[number]

  def _corrupt(self, shard: Shard, why: str) -> ValueError:
    return ValueError(
      f"{self._folder / shard.name} is corrupt: {why}; copy it again or prepare the text again"
    )


def summary(manifest: Mapping[str, Any]) -> str:
  """One line that says what was prepared."""
  sizes = ", ".join(
    f"{name} {split['documents']:,} documents, {split['tokens']:,} tokens in "
    f"{split['examples']:,} examples ({split['tokens_dropped']} dropped)"
    for name, split in manifest["splits"].items()
  )
  return f"{manifest['source']}, split '{manifest['convention']}': {sizes}"


def _sha256(file: Path) -> str:
  digest = hashlib.sha256()
  with file.open("rb") as stream:
    while block := stream.read(_AT_ONCE):
      digest.update(block)
  return digest.hexdigest()
