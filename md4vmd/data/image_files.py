"""Files of images: what they hold, by split. They are data: nothing in them is executed."""

from __future__ import annotations

import glob
import gzip
import hashlib
import math
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np

from md4vmd.data import image_records, image_tfds
from md4vmd.data.base import require
from md4vmd.data.image_splits import SPLITS, Images, in_memory

CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR10_PICKLED_MD5 = "c58f30108f718f92721af3b95e74349a"
_CIFAR10_FOLDER = "cifar-10-batches-bin"
_CIFAR10_ROW = 1 + 32 * 32 * 3
_CIFAR10_FILE = 10_000 * _CIFAR10_ROW
_CIFAR10_FILES = {
  "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
  "valid": ["test_batch.bin"],
}
_IDX_FILES = {"train": "train", "valid": "t10k"}
_MOST_IDX = 2**30  # bytes of an idx file, unzipped
_OWN_SPLITS = "only npz files have a data.valid_path; these have splits of their own: unset it"


def read(path: str, valid_path: str | None = None) -> Images:
  """The images at a path, in whichever format of `FORMATS` it is.

  Args:
    path: a file, a folder, a pattern of npz files, or tfds:NAME for a prepared set.
    valid_path: npz files of the valid split, where they are files of their own.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is in no format that is known, damaged, or executable.
  """
  if path.startswith("tfds:"):
    require(valid_path is None, _OWN_SPLITS, path=path, valid_path=valid_path)
    return image_tfds.read(path.removeprefix("tfds:"))
  if not Path(path).exists() and not glob.glob(path):
    raise FileNotFoundError(f"no images at {path!r}; correct data.path")
  for is_format, reader in FORMATS:
    if is_format(path):
      require(
        valid_path is None or reader is read_npz, _OWN_SPLITS, path=path, valid_path=valid_path
      )
      return read_npz(path, valid_path) if reader is read_npz else reader(path)
  raise ValueError(
    f"{path!r} is in no format that is read here: an .npz, CIFAR-10's binary archive or folder, a "
    f"folder of MNIST's idx files, or one that md4vmd.data.prepare_images wrote"
  )


def read_npz(path: str, valid_path: str | None = None) -> Images:
  """Images of npz files, in one of three layouts.

  SPLIT_images and SPLIT_labels with both splits in one file; images and labels, or Downsampled
  ImageNet's data (rows of red, then green, then blue) and labels (from 1), with a file or a
  pattern of files for each split.
  """
  files = _load_npz(path)
  if f"{SPLITS[0]}_images" in files[0]:
    require(
      len(files) == 1 and valid_path is None, "a file with both splits stands alone", path=path
    )
    return in_memory({name: _both_keys(files[0], name, path) for name in SPLITS}, path)
  require(
    valid_path is not None,
    "the file holds no train_images: give the files of the other split as data.valid_path",
    path=path,
  )
  assert valid_path is not None
  parts = {"train": (path, files), "valid": (valid_path, _load_npz(valid_path))}
  return in_memory({name: _joined(*part) for name, part in parts.items()}, path)


def _load_npz(pattern: str) -> list[dict[str, np.ndarray]]:
  # A file of that name is meant, even where its name could be a pattern.
  names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern)) or [pattern]
  loaded = []
  for name in names:
    try:
      with zipfile.ZipFile(name) as archive, np.load(name, allow_pickle=False) as file:
        keys = [key for key in file.files if re.search(r"(images|labels|data)$", key)]
        for key in keys:
          _check_size(archive, f"{key}.npy")
        loaded.append({key: file[key] for key in keys})
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(f"{name} is no npz of plain arrays, or damaged: {error}") from error
  return loaded


def _check_size(archive: zipfile.ZipFile, member: str) -> None:
  """Raises ValueError where an array says to be larger than its file, before memory is taken."""
  with archive.open(member) as stream:
    version = np.lib.format.read_magic(stream)
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
  size, held = math.prod(shape) * dtype.itemsize, archive.getinfo(member).file_size
  require(size <= held, "it holds fewer bytes than its header says", array=member, bytes=held)


def _both_keys(file, name, path):
  require(f"{name}_images" in file, f"it lacks {name}_images", path=path)
  return file[f"{name}_images"], file.get(f"{name}_labels")


def _joined(path, files):
  """(images, labels or None) of the files of one split."""
  key = "images" if "images" in files[0] else "data"
  for file in files:
    require(key in file, "an npz holds 'images' or Downsampled ImageNet's 'data'", path=path)
    shape, first = file[key].shape, files[0][key].shape
    require(
      len(shape) > 1 and shape[0] > 0 and shape[1:] == first[1:],
      "the files of a split hold images, all of one shape",
      path=path,
      shape=shape,
    )
  images = np.concatenate([file[key] for file in files])
  has_labels = all("labels" in file for file in files)
  label_N = np.concatenate([file["labels"] for file in files]) if has_labels else None
  if key == "data":
    side = math.isqrt(images[0].size // 3)
    require(
      images.ndim == 2 and images.shape[1] == 3 * side * side,
      "rows of Downsampled ImageNet hold 3 x side x side values",
      path=path,
      shape=images.shape,
    )
    images = images.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    if label_N is not None:
      # Without a sign, 0 - 1 would be a label.
      label_N = (label_N.astype(np.int64) if label_N.dtype.kind == "u" else label_N) - 1
  return images, label_N


def read_cifar10(path: str) -> Images:
  """The official binary version, as its archive, whose checksum is verified, or unpacked.

  The test images are the valid split.
  """
  raw = _unpacked(Path(path)) if Path(path).is_dir() else _archived(Path(path))
  arrays = {}
  for split, names in _CIFAR10_FILES.items():
    rows_NxR = np.frombuffer(b"".join(raw(name) for name in names), np.uint8)
    rows_NxR = rows_NxR.reshape(-1, _CIFAR10_ROW)
    images = rows_NxR[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    arrays[split] = np.ascontiguousarray(images), rows_NxR[:, 0]
  return in_memory(arrays, path)


def _unpacked(folder: Path) -> Callable[[str], bytes]:
  nested = folder / _CIFAR10_FOLDER
  folder = nested if nested.is_dir() else folder

  def raw(name):
    file = folder / name
    require(
      file.is_file(), "the folder of CIFAR-10 lacks the file: unpack it again", file=str(file)
    )
    return _sized(file.stat().st_size, str(file), file.read_bytes)

  return raw


def _archived(file: Path) -> Callable[[str], bytes]:
  with file.open("rb") as stream:
    md5 = hashlib.file_digest(stream, "md5").hexdigest()
  if md5 == _CIFAR10_PICKLED_MD5:
    refuse_pickles(str(file))
  require(
    md5 == CIFAR10_MD5,
    f"the archive is not CIFAR-10's cifar-10-binary.tar.gz, whose md5 is {CIFAR10_MD5}: fetch it "
    "again",
    file=str(file),
    md5=md5,
  )
  archive = tarfile.open(file)

  def raw(name):
    member = archive.getmember(f"{_CIFAR10_FOLDER}/{name}")
    stream = archive.extractfile(member)
    assert stream is not None
    return _sized(member.size, name, stream.read)

  return raw


def refuse_pickles(path: str) -> NoReturn:
  """Raises ValueError: CIFAR-10's python version is not read."""
  raise ValueError(
    f"{path} is CIFAR-10's python version, whose files are pickles and may run any code; give the "
    "binary version, cifar-10-binary.tar.gz"
  )


def _sized(size: int, name: str, read_all: Callable[[], bytes]) -> bytes:
  require(
    size == _CIFAR10_FILE,
    f"a file of CIFAR-10 holds 10,000 rows of {_CIFAR10_ROW} bytes: fetch it again; give a part of "
    "the images as an .npz",
    file=name,
    bytes=size,
  )
  return read_all()


def read_idx(path: str) -> Images:
  """A folder of MNIST's idx files, plain or gzip; the t10k files are the valid split."""
  arrays = {}
  for split, prefix in _IDX_FILES.items():
    images_NxHxW = _read_idx(Path(path), f"{prefix}-images-idx3-ubyte", 3)
    arrays[split] = images_NxHxW[..., None], _read_idx(Path(path), f"{prefix}-labels-idx1-ubyte", 1)
  return in_memory(arrays, path)


def _read_idx(folder: Path, name: str, axes: int) -> np.ndarray:
  found = [folder / f"{name}{end}" for end in ("", ".gz") if (folder / f"{name}{end}").is_file()]
  require(bool(found), f"the folder lacks {name}, plain or .gz", path=str(folder))
  with gzip.open(found[0]) if found[0].suffix == ".gz" else found[0].open("rb") as stream:
    try:
      header = struct.unpack(f">{1 + axes}I", stream.read(4 + 4 * axes))
      size = math.prod(header[1:])
      is_known = header[0] == 0x0800 + axes and 0 < size <= _MOST_IDX
      raw = stream.read(size + 1) if is_known else b""
    except (struct.error, EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(f"{found[0]} is cut short or damaged; fetch it again") from error
  require(
    is_known and len(raw) == size,
    f"no idx file of unsigned bytes with {axes} axes, or not as long as it says: fetch it again",
    file=str(found[0]),
    header=header,
  )
  return np.frombuffer(raw, np.uint8).reshape(header[1:])


def _is_folder_with(*names: str) -> Callable[[str], bool]:
  return lambda path: any((Path(path) / name).exists() for name in names)


FORMATS: tuple[tuple[Callable[[str], bool], Callable[..., Images]], ...] = (
  (lambda path: path.endswith(".npz"), read_npz),
  (lambda path: path.endswith((".tar.gz", ".tgz")), read_cifar10),
  (_is_folder_with(_CIFAR10_FOLDER, *_CIFAR10_FILES["valid"]), read_cifar10),
  (_is_folder_with("cifar-10-batches-py", "batches.meta"), refuse_pickles),
  (_is_folder_with(*(f"train-images-idx3-ubyte{end}" for end in ("", ".gz"))), read_idx),
  (_is_folder_with(image_records.INDEX), image_records.read),
)
