"""Images as pictures: a grid of samples, and their unmasking as a film strip and as a GIF."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

_MASKED = 128
_PAPER = 255
_GAP = 2
_SIDE = 96  # pixels that an image is enlarged to at least


def grid(images_NxHxWxC: np.ndarray, columns: int | None = None) -> Image.Image:
  """Images side by side in rows, enlarged by a whole number where they are small.

  Args:
    images_NxHxWxC: uint8, with 1 or 3 channels.
    columns: images in a row; about as many as rows if None.

  Raises:
    ValueError: no images, or another number of channels.
  """
  images_NxHxWxC = np.asarray(images_NxHxWxC)
  if images_NxHxWxC.ndim != 4 or images_NxHxWxC.shape[3] not in (1, 3) or not len(images_NxHxWxC):
    raise ValueError(
      f"found an array of {images_NxHxWxC.shape}; images have the axes count, height, width and "
      "1 or 3 channels"
    )
  count, height, width, channels = images_NxHxWxC.shape
  columns = columns or math.ceil(math.sqrt(count))
  rows = -(-count // columns)
  scale = max(1, -(-_SIDE // max(height, width)))
  cell_h, cell_w = height * scale + _GAP, width * scale + _GAP
  paper = np.full((rows * cell_h + _GAP, columns * cell_w + _GAP, channels), _PAPER, np.uint8)
  for number, image_HxWxC in enumerate(images_NxHxWxC):
    top, left = _GAP + number // columns * cell_h, _GAP + number % columns * cell_w
    large = image_HxWxC.repeat(scale, axis=0).repeat(scale, axis=1)
    paper[top : top + height * scale, left : left + width * scale] = large
  return Image.fromarray(paper[..., 0] if channels == 1 else paper)


def stages(
  x_NxL: np.ndarray, call_NxL: np.ndarray, shape: tuple[int, int, int], frames: int
) -> list[np.ndarray]:
  """The images after some of the network calls, uint8, from the start to the end.

  Args:
    x_NxL: finished images, in the order of (row, column, channel).
    call_NxL: 0-based call that filled a token; -1 where it was given. Others are grey before it.
    shape: (H, W, C).
    frames: largest number of images after the first.
  """
  calls = int(call_NxL.max()) + 1
  shown = sorted({round(i * calls / frames) for i in range(frames + 1)})
  image = lambda call: np.where((call_NxL < call) & (x_NxL < 256), x_NxL, _MASKED).astype(np.uint8)
  return [image(call).reshape(len(x_NxL), *shape) for call in shown]


def film(images: Sequence[np.ndarray]) -> Image.Image:
  """One row per image and one column per stage, of `stages`."""
  stacked_NxKxHxWxC = np.stack(images, axis=1)
  return grid(stacked_NxKxHxWxC.reshape(-1, *stacked_NxKxHxWxC.shape[2:]), columns=len(images))


def save_gif(images: Sequence[np.ndarray], path: pathlib.Path, seconds: float = 4.0) -> None:
  """The stages one after another as a GIF that repeats, the last one held for a second."""
  frames = [grid(stage) for stage in images]
  milliseconds = [round(1000 * seconds / len(frames))] * (len(frames) - 1) + [1000]
  frames[0].save(
    path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, optimize=False
  )
