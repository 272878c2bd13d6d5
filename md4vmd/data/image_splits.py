"""What files of images hold: their splits, the shape of the images and the number of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from md4vmd.data.base import Arrays, Source, require

SPLITS = ("train", "valid")


class Images(NamedTuple):
  """The splits of a set of images.

  Attributes:
    splits: sources of {"x": int32 [H W C], "label": int32} by name; without labels no "label".
    shape: (H, W, C).
    classes: number of labels; 0 for none.
  """

  splits: Mapping[str, Source]
  shape: tuple[int, int, int]
  classes: int


def in_memory(arrays: Mapping[str, tuple[np.ndarray, np.ndarray | None]], where: str) -> Images:
  """`Images` of {split: (uint8 images [N, H, W, C], labels [N] or None)}.

  Raises:
    ValueError: they are no such arrays, or differ between the splits.
  """
  splits, shapes, labelled, classes = {}, set(), set(), 0
  for name, (images_NxHxWxC, label_N) in arrays.items():
    require(
      images_NxHxWxC.dtype == np.uint8 and images_NxHxWxC.ndim == 4 and len(images_NxHxWxC) > 0,
      f"{where}, {name}: images are uint8 arrays of [count, height, width, channels]",
      dtype=str(images_NxHxWxC.dtype),
      shape=images_NxHxWxC.shape,
    )
    others = {}
    if label_N is not None:
      require(
        label_N.shape == (len(images_NxHxWxC),)
        and np.issubdtype(label_N.dtype, np.integer)
        and label_N.min() >= 0,
        f"{where}, {name}: labels are one number from 0 on for each image",
        dtype=str(label_N.dtype),
        shape=label_N.shape,
      )
      others["label"] = label_N.astype(np.int32)
      classes = max(classes, int(label_N.max()) + 1)
    shapes.add(images_NxHxWxC.shape[1:])
    labelled.add(label_N is not None)
    splits[name] = Arrays(images_NxHxWxC.reshape(len(images_NxHxWxC), -1), **others)
  require(
    len(shapes) == 1 and len(labelled) == 1,
    f"{where}: the splits must be of one shape, and all or none of them have labels",
    shapes=sorted(shapes),
  )
  return Images(splits, shapes.pop(), classes)
