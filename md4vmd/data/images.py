"""Images whose tokens are the 256 values of the channels of their pixels."""

from __future__ import annotations

import numpy as np

from md4vmd.data import image_files
from md4vmd.data.base import Dataset, Item, require

MASK = "__"
REGIONS = ("left", "right", "top", "bottom", "center")


class Images(Dataset):
  """Images of 256 values, read from any of the formats of `image_files`.

  A token is one channel of one pixel, and an example is an image in the order of (row, column,
  channel).

  Attributes:
    image_shape: (H, W, C).
    classes: number of labels that examples carry; 0 where they carry none.
  """

  unit = "dim"

  def __init__(
    self,
    *,
    path: str,
    valid_path: str | None = None,
    flip: bool = False,
    class_conditional: bool = False,
  ):
    """Opens the files.

    Args:
      path: see `image_files.read`.
      valid_path: npz files of the valid split, where they are files of their own.
      flip: mirrors half of the training images.
      class_conditional: gives every example its label.
    """
    found = image_files.read(path, valid_path)
    require(
      found.classes > 0 or not class_conditional,
      "the images have no labels: set data.class_conditional=False",
      path=path,
    )
    self.image_shape = found.shape
    self.classes = found.classes if class_conditional else 0
    self.flip = flip
    height, width, channels = found.shape
    super().__init__(
      vocab_size=256,
      length=height * width * channels,
      splits={
        name: source if class_conditional else _Unlabelled(source)
        for name, source in found.splits.items()
      },
      about=f"images of {height}x{width}x{channels} from {path}",
    )
    self.columns = width * channels

  def augment(self, item: Item, rng: np.random.Generator) -> Item:
    """The image or, as often where `flip` is set, its mirror image."""
    if not self.flip or rng.random() < 0.5:
      return item
    mirrored_HxWxC = item["x"].reshape(self.image_shape)[:, ::-1]
    return item | {"x": np.ascontiguousarray(mirrored_HxWxC).reshape(-1)}

  def decode(self, x_L: np.ndarray) -> str:
    """Two hexadecimal digits for each value, two underscores for a mask, a line for each row."""
    cells = self.cells(x_L)
    rows = [cells[i : i + self.columns] for i in range(0, len(cells), self.columns)]
    return "\n".join("".join(row) for row in rows)

  def encode(self, text: str) -> np.ndarray:
    """The tokens of such digits."""
    packed = "".join(text.split())
    pairs = [packed[i : i + 2] for i in range(0, len(packed), 2)]
    known = {f"{value:02x}": value for value in range(256)} | {MASK: self.vocab_size}
    for pair in pairs:
      require(pair in known, f"a value is two hexadecimal digits, or {MASK} for a mask", value=pair)
    return np.array([known[pair] for pair in pairs], np.int32)

  def cells(self, x_N: np.ndarray) -> list[str]:
    """The digits of every token."""
    return [MASK if value >= self.vocab_size else f"{value:02x}" for value in x_N.tolist()]


class _Unlabelled:
  """A source without its labels."""

  def __init__(self, source):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Item:
    return {"x": self._source[index]["x"]}


def region(name: str, image_shape: tuple[int, int, int]) -> np.ndarray:
  """True at the tokens of half of an image, or of the middle half of its rows and columns, [L].

  Fewer than 4 rows or columns are all in the middle.

  Raises:
    ValueError: there is no such region.
  """
  height, width, _ = image_shape
  half, across = slice(height // 2), slice(width // 2)
  places = {
    "left": (slice(None), across),
    "right": (slice(None), slice(width // 2, None)),
    "top": (half, slice(None)),
    "bottom": (slice(height // 2, None), slice(None)),
    "center": tuple(slice(side // 4, side - side // 4) for side in (height, width)),
  }
  require(name in places, f"sampler.inpaint must be one of {', '.join(REGIONS)}", inpaint=name)
  is_inside_HxWxC = np.zeros(image_shape, bool)
  is_inside_HxWxC[places[name]] = True
  return is_inside_HxWxC.reshape(-1)
