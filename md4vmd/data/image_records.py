"""Folders of images as ArrayRecord files, which md4vmd.data.prepare_images writes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from md4vmd.data.base import Item, require
from md4vmd.data.image_splits import SPLITS, Images

INDEX = "images.json"  # beside the records
_LABEL = struct.Struct("<i")


class Records:
  """Images in an ArrayRecord file: a label of four bytes, then the bytes of the image.

  Args:
    file: what `write` wrote.
    size: bytes of an image.
    classes: number of labels; 0 where items carry none.

  Raises:
    ValueError: the file is damaged or empty.
  """

  def __init__(self, file: Path, size: int, *, classes: int):
    self.file, self.size, self.classes = file, size, classes
    try:
      self._records: Any = grain.sources.ArrayRecordDataSource(str(file))
      count = len(self._records)
    except RuntimeError as error:
      raise self._damaged(error) from error
    require(count > 0, "the file holds no images; prepare the images again", file=str(file))

  def __len__(self) -> int:
    """Number of examples."""
    return len(self._records)

  def __getitem__(self, index: int) -> Item:
    """The example of that number. Raises ValueError where it is damaged, or its size or label."""
    try:
      record = self._records[index]
    except RuntimeError as error:
      raise self._damaged(f"record {index}: {error}") from error
    require(
      len(record) == _LABEL.size + self.size,
      f"{self.file}: a record has {_LABEL.size} + {self.size} bytes; prepare the images again",
      record=index,
      bytes=len(record),
    )
    item: Item = {"x": np.frombuffer(record, np.uint8, offset=_LABEL.size).astype(np.int32)}
    if self.classes:
      (label,) = _LABEL.unpack_from(record)
      require(
        0 <= label < self.classes,
        f"{self.file}: a label is below the {self.classes} classes; prepare the images again",
        record=index,
        label=label,
      )
      item["label"] = np.asarray(label, np.int32)
    return item

  def _damaged(self, why: object) -> ValueError:
    return ValueError(f"{self.file} is damaged: {why}; copy it again or prepare the images again")


Pairs = Iterable[tuple[np.ndarray, int]]


def write(
  folder: Path, pairs: Mapping[str, Pairs], shape: tuple[int, ...], classes: int, fit: str
) -> None:
  """Writes the (uint8 image, label) pairs of each split, any of which can be read at once.

  Files get their names after the last image is written; until then the folder holds what it held.

  Args:
    folder: which is made where it is missing.
    pairs: the images by split.
    shape: (H, W, C).
    classes: number of labels; 0 for none.
    fit: how the images became of that shape, which images.json tells.
  """
  folder.mkdir(parents=True, exist_ok=True)
  files = {split: folder / f"{split}.array_record" for split in pairs}
  partial = {split: file.with_name(f"{file.name}.partial") for split, file in files.items()}
  try:
    for split, made in pairs.items():
      _write_records(partial[split], made)
    # Without it the folder is no set, so that a stop between two files leaves no mixture.
    (folder / INDEX).unlink(missing_ok=True)
    for split, file in files.items():
      partial[split].replace(file)
  finally:
    for file in partial.values():
      file.unlink(missing_ok=True)
  text = json.dumps({"shape": list(shape), "classes": classes, "fit": fit})
  (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _write_records(file: Path, pairs: Pairs) -> None:
  writer = ArrayRecordWriter(str(file), "group_size:1")
  try:
    for image_HxWxC, label in pairs:
      writer.write(_LABEL.pack(label) + np.ascontiguousarray(image_HxWxC, np.uint8).tobytes())
  finally:
    writer.close()


def read(path: str) -> Images:
  """The images of a folder with images.json and SPLIT.array_record.

  Raises:
    ValueError: a file is missing or damaged.
  """
  folder = Path(path)
  try:
    about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    height, width, channels = map(int, about["shape"])
    classes = int(about["classes"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{folder / INDEX} does not give the shape and the classes") from error
  shape = height, width, channels
  splits = {}
  for name in SPLITS:
    file = folder / f"{name}.array_record"
    require(file.is_file(), "the folder lacks the file: prepare the images again", file=str(file))
    splits[name] = Records(file, math.prod(shape), classes=classes)
  return Images(splits, shape, classes)
