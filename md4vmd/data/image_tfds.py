"""Images that tensorflow_datasets has prepared on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from md4vmd.data.base import Item, require
from md4vmd.data.image_splits import SPLITS, Images

_HELD_OUT = ("validation", "test")


class Prepared:
  """A prepared split as a source.

  Args:
    examples: a random-access source of dicts with an "image".
    shape: that all images have.
    has_labels: whether items carry the label.
  """

  def __init__(self, examples: Sequence[Any], shape: tuple[int, ...], *, has_labels: bool):
    self._examples, self._shape, self._has_labels = examples, shape, has_labels

  def __len__(self) -> int:
    """Number of examples."""
    return len(self._examples)

  def __getitem__(self, index: int) -> Item:
    """The example of that number. Raises ValueError where its image differs from the others."""
    example = self._examples[index]
    image_HxWxC = np.asarray(example["image"])
    require(
      image_HxWxC.shape == self._shape and image_HxWxC.dtype == np.uint8,
      f"the images of the set must all be uint8 of {self._shape}; convert them with "
      "md4vmd.data.prepare_images",
      example=index,
      shape=image_HxWxC.shape,
      dtype=str(image_HxWxC.dtype),
    )
    item: Item = {"x": image_HxWxC.reshape(-1).astype(np.int32)}
    if self._has_labels:
      item["label"] = np.asarray(example["label"], np.int32)
    return item


def read(name: str) -> Images:
  """The images of a set that was prepared as ArrayRecord; TensorFlow is not needed.

  The split "validation", or else "test", is the valid split. Sizes that the features leave open are
  those of the first image.

  Raises:
    ValueError: there is no such set, it is not prepared so, or it holds no images of one shape.
  """
  import tensorflow_datasets as tfds

  path = f"tfds:{name}"
  try:
    builder: Any = tfds.builder(name)
  except (ValueError, AssertionError, RuntimeError, ImportError, OSError) as error:
    # Only its first line: the others list all sets that exist.
    raise ValueError(f"data.path={path!r}: {str(error).splitlines()[0]}") from None
  features, splits = builder.info.features, builder.info.splits
  require("image" in features, "the set has no feature 'image'", path=path, features=[*features])
  held_out = next((split for split in _HELD_OUT if split in splits), None)
  require(
    not splits or ("train" in splits and held_out is not None),
    "the set needs a split 'train' and a 'validation' or 'test'",
    path=path,
    splits=[*splits],
  )
  try:
    require(bool(splits), "the set is not prepared on this machine", path=path)
    sources = [builder.as_data_source(split=split) for split in ("train", held_out)]
  except (ValueError, NotImplementedError) as error:
    raise ValueError(
      f"data.path={path!r}: the set is not prepared for random access on this machine; prepare it "
      f"with tfds.builder({name!r}).download_and_prepare(file_format='array_record')"
    ) from error
  require(all(map(len, sources)), "a split of the set is empty", path=path)
  shape = tuple(features["image"].shape)
  if None in shape:
    shape = np.asarray(sources[0][0]["image"]).shape
  label = features["label"] if "label" in features else None
  classes = getattr(label, "num_classes", None) or 0
  made = [Prepared(source, shape, has_labels=classes > 0) for source in sources]
  height, width, channels = shape
  return Images(dict(zip(SPLITS, made, strict=True)), (height, width, channels), classes)
