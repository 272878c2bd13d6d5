"""Converts folders of images, or files that `image_files` reads, to one size and one file format.

  python -m md4vmd.data.prepare_images --train=FOLDER --valid=FOLDER --size=64 --out=images.npz

A folder with images in subfolders gives each subfolder, in alphabetical order, a label, unless
--unlabelled is given. --fit says how images of other proportions become squares: `crop` cuts their
middle square out, `stretch` takes all of the image and changes its proportions, as the scripts of
Downsampled ImageNet (arXiv 1707.08819) do. Both resize by box means; the same files give the same
bytes. Where --out ends in .npz everything is held in memory; else it is a folder of ArrayRecord
files, written image by image. An image that cannot be read ends the conversion, and a folder that
was there before stays as it was.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from md4vmd.data import image_records
from md4vmd.data.base import require
from md4vmd.data.image_splits import SPLITS

FITS = ("crop", "stretch")
_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}


def find(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
  """(image files below a folder in a fixed order, names of the classes).

  Raises:
    ValueError: there are no images.
  """
  files = sorted(
    (path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file()),
    key=lambda path: path.relative_to(folder).as_posix(),
  )
  require(
    bool(files), f"no images in the folder: {', '.join(sorted(_ENDINGS))}", folder=str(folder)
  )
  parents = {path.relative_to(folder).parts[0] for path in files if path.parent != folder}
  is_by_class = all(path.parent != folder for path in files)
  return files, sorted(parents) if is_by_class else []


def resized(file: pathlib.Path, size: int, channels: int, fit: str) -> np.ndarray:
  """An image, or with fit "crop" its middle square, box-resized: uint8 [size, size, channels].

  Raises:
    ValueError: it cannot be read, or its values have more than 8 bits.
  """
  try:
    with Image.open(file) as image:
      mode, (width, height) = image.mode, image.size
      side = min(width, height)
      left, top = (width - side) // 2, (height - side) // 2
      middle = (left, top, left + side, top + side)
      colours = image.convert("RGB" if channels == 3 else "L")
      box = middle if fit == "crop" else None
      small = colours.resize((size, size), Image.Resampling.BOX, box=box)
  except (ValueError, SyntaxError, OSError, Image.DecompressionBombError) as error:
    raise ValueError(f"{file} cannot be read as an image: {error}") from error
  # Pillow clips them to white instead of scaling them.
  require(mode[0] not in "IF", "more than 8 bits a channel; convert it", file=str(file))
  return np.asarray(small, np.uint8).reshape(size, size, channels)


def labelled(
  folder: pathlib.Path, names: Sequence[str], size: int, channels: int, fit: str
) -> Iterator[tuple[np.ndarray, int]]:
  """(image, label) of every image of a folder; labels are 0 where there are no classes."""
  for file in find(folder)[0]:
    first = file.relative_to(folder).parts[0]
    yield resized(file, size, channels, fit), names.index(first) if names else 0


def prepare(
  folders: dict[str, pathlib.Path],
  out: pathlib.Path,
  *,
  size: int,
  channels: int = 3,
  fit: str = "crop",
  unlabelled: bool = False,
) -> None:
  """Writes the splits to `out`.

  Args:
    folders: of images, by split.
    out: a .npz, or a folder.
    size: side of the squares.
    channels: 1 or 3.
    fit: one of `FITS`.
    unlabelled: subfolders are no classes.

  Raises:
    ValueError: the splits differ in their classes, an image cannot be read, or there is no folder
      for the .npz.
  """
  is_npz = out.suffix == ".npz"
  require(not is_npz or out.parent.is_dir(), "there is no such folder; make it", out=str(out))
  classes = {split: [] if unlabelled else find(folder)[1] for split, folder in folders.items()}
  names = classes[SPLITS[0]]
  require(
    all(other == names for other in classes.values()),
    "the splits must have the same subfolders, which are the classes: sort the images of both into "
    "them, or convert without labels by --unlabelled",
    **{split: found[:3] for split, found in classes.items()},
  )
  made = {split: labelled(folder, names, size, channels, fit) for split, folder in folders.items()}
  if not is_npz:
    image_records.write(out, made, (size, size, channels), len(names), fit)
    return
  arrays: dict[str, Any] = {"fit": np.array(fit)}
  for split, pairs in made.items():
    images, labels = zip(*pairs, strict=True)
    arrays[f"{split}_images"] = np.stack(images)
    if names:
      arrays[f"{split}_labels"] = np.array(labels, np.int32)
  np.savez_compressed(out, **arrays)


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    description="Folders of images to one file that data.path reads."
  )
  for split in SPLITS:
    parser.add_argument(f"--{split}", type=pathlib.Path, required=True, help="folder of images")
  parser.add_argument("--size", type=int, required=True, help="side of the square images")
  parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
  parser.add_argument("--fit", choices=FITS, default="crop", help="how they become squares")
  parser.add_argument("--unlabelled", action="store_true", help="subfolders are no classes")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="a .npz, or a folder")
  given = vars(parser.parse_args(arguments))
  try:
    require(1 <= given["size"] <= 4096, "give a side of 1 to 4096 pixels", size=given["size"])
    prepare({split: given.pop(split) for split in SPLITS}, **given)
  except (ValueError, OSError) as error:
    parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
  main()
