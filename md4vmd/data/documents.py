"""Documents of text files: plain text, JSON lines and parquet, also compressed, one at a time."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from md4vmd.data.base import require

UNITS = ("line", "paragraph", "file")
_JSON = (".jsonl", ".json")
HUB = "hub:"
_LARGEST = 16 * 2**20  # bytes of a document, and of a line; a tokenizer takes 120 times as many
_ZST_PIECE = 4096  # compressed bytes at once; repeated bytes become 32,000 times as many
_ROWS = 256  # of a parquet file at a time

Progress = Callable[[int], None]


def files(patterns: str) -> list[Path]:
  """The files of comma-separated glob patterns, each once, in the order of their paths.

  Raises:
    FileNotFoundError: a pattern matches no file.
  """
  found = set()
  for pattern in patterns.split(","):
    matches = [Path(name) for name in glob.glob(pattern, recursive=True)]
    matches = [path for path in matches if path.is_file()]
    if not matches:
      raise FileNotFoundError(
        f"no file matches '{pattern}'; correct the pattern, or give {HUB}OWNER/NAME for a dataset "
        "of the hub"
      )
    found.update(matches)
  return sorted(found)


def read(
  path: Path,
  *,
  unit: str = "file",
  field: str | tuple[str, ...] = "text",
  progress: Progress | None = None,
  is_json: bool = False,
) -> Iterator[str]:
  """The documents of a file in order; what it is follows from its suffixes.

  .jsonl and .json hold an object per line, .parquet a table, all others utf-8 text; each may be
  compressed as .gz or .zst. Half a surrogate pair becomes the replacement character, and a byte
  order mark in front is left out.

  Args:
    path: the file.
    unit: what a document of plain text is: a "line", a "paragraph" (which ends at an empty line)
      or the "file".
    field: name of the text in an object or a table, or several: the first that there is. A list of
      texts is joined by line breaks.
    progress: called with the position in the file, in bytes as stored.
    is_json: whether it holds an object per line, whatever its suffixes.

  Raises:
    ValueError: the file is damaged, or a document is no text; the message names file and place.
  """
  require(unit in UNITS, f"there is no such unit: use one of {', '.join(UNITS)}", unit=unit)
  fields, kind = (field,) if isinstance(field, str) else field, _kind(path)
  if kind == ".parquet":
    texts = _rows(path, fields, progress)
  elif is_json or kind in _JSON:
    texts = _objects(path, fields, progress)
  else:
    texts = _plain(path, unit, progress)
  for text in texts:
    yield _whole(text)


def seems_json(path: Path) -> bool:
  """Whether a file of plain text by its suffixes begins with a line that is a JSON object."""
  if _kind(path) in (".parquet", *_JSON):
    return False
  line = next((line for _, line in _lines(path, None) if line.strip()), b"")
  try:
    return line.lstrip().startswith(b"{") and isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False


def hub(name: str, *, config: str | None, split: str, field: str) -> Iterator[str]:
  """The documents of a dataset of the hub, streamed.

  Raises:
    ValueError: `datasets` is not installed, or a row has no such field.
  """
  datasets = extra("datasets", "to read from the hub")
  rows = datasets.load_dataset(name, config, split=split, streaming=True)
  for number, row in enumerate(rows):
    yield _whole(_text(row, (field,), f"{name}, row {number}"))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
  """Turns what a damaged or foreign file raises into a ValueError with its name."""
  try:
    yield
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{path}: the gzip file is cut short or damaged; fetch it again") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not utf-8 at byte {error.start}; convert it") from error


def extra(module: str, purpose: str) -> Any:
  """A module of the extra [prepare]. Raises ValueError where it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f"{module} is needed {purpose} and is not installed: pip install '.[prepare]'"
    ) from error


def json_lines(path: Path, progress: Progress | None = None) -> Iterator[tuple[int, Any]]:
  """(number, value) of every line of a file of JSON values. Raises ValueError on any other."""
  for number, line in _lines(path, progress):
    if line.strip():
      try:
        yield number, json.loads(line)
      except UnicodeDecodeError as error:
        raise ValueError(
          f"{path}, line {number}: byte {error.object[error.start]:#04x} at position "
          f"{error.start} of the line is not utf-8; convert the file"
        ) from error
      except (ValueError, RecursionError) as error:
        shown = line[:60].decode(errors="replace").strip()
        raise ValueError(
          f"{path}, line {number}: not a JSON value ({error}), but {shown!r}"
        ) from error


def _kind(path: Path) -> str:
  """The last suffix that is not that of a compression."""
  suffixes = [suffix.lower() for suffix in path.suffixes]
  return next((suffix for suffix in suffixes[::-1] if suffix not in (".gz", ".zst")), "")


def _whole(text: str) -> str:
  """The text, without half surrogate pairs, which JSON can hold and utf-8 cannot."""
  if text.isascii():
    return text
  return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _text(row: Any, fields: tuple[str, ...], where: str) -> str:
  known = row if isinstance(row, dict) else {}
  text = next((known[field] for field in fields if field in known), None)
  if isinstance(text, list) and all(isinstance(part, str) for part in text):
    text = "\n".join(text)
  if not isinstance(text, str):
    shown = ", ".join(map(str, known)) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"{where}: no text in the field '{fields[0]}'; it has: {shown[:200]}")
  if len(text) > _LARGEST:
    raise ValueError(f"{where}: {len(text)} characters are too many for a document; cut the text")
  return text


def _objects(path, fields, progress):
  for number, row in json_lines(path, progress):
    yield _text(row, fields, f"{path}, line {number}")


def _rows(path, fields, progress):
  parquet = extra("pyarrow.parquet", "to read parquet files")
  if path.suffix.lower() != ".parquet":
    raise ValueError(f"{path}: parquet files are compressed inside; decompress it")
  with _stream(path) as (stream, _):
    try:
      table = parquet.ParquetFile(stream)
      field = next((field for field in fields if field in table.schema_arrow.names), None)
      if field is None:
        names = ", ".join(table.schema_arrow.names)
        raise ValueError(f"there is no column '{fields[0]}'; it has: {names[:200]}")
      done, rows = 0, max(table.metadata.num_rows, 1)
      for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
        for text in batch.column(0).to_pylist():
          done += 1
          yield _text({field: text}, (field,), f"{path}, row {done}")
        if progress:
          progress(path.stat().st_size * done // rows)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
      message = str(error) if str(path) in str(error) else f"{path}: {error}"
      raise ValueError(message) from error


def _plain(path, unit, progress):
  held: list[bytes] = []
  size = 0
  for number, line in _lines(path, progress):
    is_end = unit == "line" or (unit == "paragraph" and not line.strip())
    if unit == "line":
      yield _utf8(path, line.rstrip(b"\r\n"), number)
    elif is_end and held:
      yield _utf8(path, b"".join(held).rstrip(b"\r\n"), number)
      held, size = [], 0
    elif not is_end:
      held.append(line)
      size += len(line)
      require(
        size <= _LARGEST,
        f"{path}: a document is larger than {_LARGEST} bytes; choose a smaller unit of text, "
        "such as --unit paragraph or line",
        unit=unit,
      )
  if held:
    last = b"".join(held)
    yield _utf8(path, last.rstrip(b"\r\n") if unit == "paragraph" else last, 0)


def _utf8(path: Path, raw: bytes, number: int) -> str:
  try:
    return raw.decode("utf-8")
  except UnicodeDecodeError as error:
    place = f"before line {number}" if number else "at the end"
    raise ValueError(f"{path}: not utf-8 {place} ({error.reason}); convert it") from error


def _lines(path: Path, progress: Progress | None) -> Iterator[tuple[int, bytes]]:
  with _stream(path) as (stream, raw):
    number = 0
    while line := stream.readline(_LARGEST + 1):
      number += 1
      long = f"{path}: a line is longer than {_LARGEST} bytes; break it into shorter ones"
      require(len(line) <= _LARGEST, long, line=number)
      if progress:
        progress(raw.tell())
      yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


class _ZstFrames(io.RawIOBase):
  """The bytes of all frames of a file. Raises EOFError where the last one is cut short.

  The library's own stream ends there without a word.
  """

  def __init__(self, raw: BinaryIO, decompressor: Any):
    self._raw, self._decompressor = raw, decompressor
    self._frame: Any = None
    self._compressed, self._ready = b"", memoryview(b"")

  def readable(self) -> bool:
    """Yes."""
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills the start of the buffer: the number of bytes, 0 at the end of the file."""
    while not self._ready:
      self._compressed = self._compressed or self._raw.read(_ZST_PIECE)
      if not self._compressed:
        if self._frame is not None:
          raise EOFError("the last frame has no end")
        return 0
      self._frame = self._frame or self._decompressor.decompressobj()
      self._ready = memoryview(self._frame.decompress(self._compressed))
      self._compressed = b""
      if self._frame.eof:
        self._compressed, self._frame = self._frame.unused_data, None
    count = min(len(buffer), len(self._ready))
    buffer[:count], self._ready = self._ready[:count], self._ready[count:]
    return count


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[tuple[Any, BinaryIO]]:
  """(decompressed stream, the file itself, whose position tells how far it is read)."""
  with reading(path), path.open("rb") as raw:
    if path.suffix.lower() == ".gz":
      yield io.BufferedReader(gzip.GzipFile(fileobj=raw)), raw  # pyright: ignore[reportArgumentType]
    elif path.suffix.lower() == ".zst":
      zstandard = extra("zstandard", "to read .zst files")
      try:
        yield io.BufferedReader(_ZstFrames(raw, zstandard.ZstdDecompressor())), raw
      except (EOFError, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: the zst file is cut short or damaged; fetch it again") from error
    else:
      yield raw, raw
