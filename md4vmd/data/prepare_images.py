"""Converts folders of images, or files that `image_files` reads, to one size and one file format.

  python -m md4vmd.data.prepare_images --train=FOLDER --valid=FOLDER --size=64 --out=images.npz

A folder with images in subfolders gives each subfolder, in alphabetical order, a label. Images are
cut to their middle square and box-resized, as Downsampled ImageNet's are; the same files give the
same bytes. Where --out ends in .npz everything is held in memory; else it is a folder of
ArrayRecord files, written image by image. An image that cannot be read ends the conversion.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from md4vmd.data import image_files
from md4vmd.data.base import require

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}
_MOST_PIXELS = 2**28


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


def square(file: pathlib.Path, size: int, channels: int) -> np.ndarray:
  """The middle square of an image, box-resized: uint8 [size, size, channels].

  Raises:
    ValueError: it cannot be read, or is of a size that no image needs.
  """
  try:
    with Image.open(file) as image:
      width, height = image.size
      require(width * height <= _MOST_PIXELS, f"more than {_MOST_PIXELS} pixels", file=str(file))
      # Pillow clips them to white instead of scaling them.
      require(image.mode[0] not in "IF", "more than 8 bits a channel; convert it", file=str(file))
      side = min(width, height)
      left, top = (width - side) // 2, (height - side) // 2
      colours = image.convert("RGB" if channels == 3 else "L")
      box = (left, top, left + side, top + side)
      small = colours.resize((size, size), Image.Resampling.BOX, box=box)
  except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
    raise ValueError(f"{file} cannot be read as an image: {error}") from error
  return np.asarray(small, np.uint8).reshape(size, size, channels)


def labelled(
  folder: pathlib.Path, names: Sequence[str], size: int, channels: int
) -> Iterator[tuple[np.ndarray, int]]:
  """(image, label) of every image of a folder; labels are 0 where there are no classes."""
  for file in find(folder)[0]:
    first = file.relative_to(folder).parts[0]
    yield square(file, size, channels), names.index(first) if names else 0


def prepare(folders: dict[str, pathlib.Path], size: int, channels: int, out: pathlib.Path) -> None:
  """Writes the splits to `out`.

  Raises:
    ValueError: the splits differ in their classes, or an image cannot be read.
  """
  classes = {split: find(folder)[1] for split, folder in folders.items()}
  names = classes[image_files.SPLITS[0]]
  require(
    all(other == names for other in classes.values()),
    "the splits must have the same subfolders, which are the classes",
    **{split: len(found) for split, found in classes.items()},
  )
  made = {split: labelled(folder, names, size, channels) for split, folder in folders.items()}
  if out.suffix == ".npz":
    arrays = {}
    for split, pairs in made.items():
      images, labels = zip(*pairs, strict=True)
      arrays[f"{split}_images"] = np.stack(images)
      if names:
        arrays[f"{split}_labels"] = np.array(labels, np.int32)
    np.savez_compressed(out, **arrays)
    return
  out.mkdir(parents=True, exist_ok=True)
  for split, pairs in made.items():
    image_files.write_records(out / f"{split}.array_record", pairs)
  image_files.write_index(out, (size, size, channels), len(names))


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    description="Folders of images to one file that data.path reads."
  )
  for split in image_files.SPLITS:
    parser.add_argument(f"--{split}", type=pathlib.Path, required=True, help="folder of images")
  parser.add_argument("--size", type=int, required=True, help="side of the square images")
  parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
  parser.add_argument("--out", type=pathlib.Path, required=True, help="a .npz, or a folder")
  given = parser.parse_args(arguments)
  try:
    require(1 <= given.size <= 4096, "give a side of 1 to 4096 pixels", size=given.size)
    folders = {split: getattr(given, split) for split in image_files.SPLITS}
    prepare(folders, given.size, given.channels, given.out)
  except (ValueError, OSError) as error:
    parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
  main()
