"""Images: every file format from small files made here, what is refused, and the data set."""

import gzip
import io
import pathlib
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from md4vmd import data
from md4vmd.data import image_files, images

RNG = np.random.default_rng(0)
TRAIN_6x4x4x3 = RNG.integers(256, size=(6, 4, 4, 3)).astype(np.uint8)
VALID_3x4x4x3 = RNG.integers(256, size=(3, 4, 4, 3)).astype(np.uint8)
LABEL_6, LABEL_3 = np.array([0, 1, 2, 2, 1, 0]), np.array([2, 0, 1])


def write_npz(folder, **changes):
  arrays = {"train_images": TRAIN_6x4x4x3, "valid_images": VALID_3x4x4x3}
  arrays |= {"train_labels": LABEL_6, "valid_labels": LABEL_3}
  path = folder / "images.npz"
  np.savez(path, **{key: array for key, array in (arrays | changes).items() if array is not None})
  return str(path)


def check(found, train=TRAIN_6x4x4x3, valid=VALID_3x4x4x3, labels=(LABEL_6, LABEL_3)):
  """The splits hold these images and labels."""
  assert found.shape == train.shape[1:]
  for name, expected, label_N in zip(("train", "valid"), (train, valid), labels, strict=True):
    source = found.splits[name]
    items = [source[i] for i in range(len(source))]
    x_NxL = np.stack([item["x"] for item in items])
    assert x_NxL.dtype == np.int32
    np.testing.assert_array_equal(x_NxL, expected.reshape(len(expected), -1))
    if label_N is not None:
      assert [int(item["label"]) for item in items] == label_N.tolist()


def test_an_npz_with_both_splits(tmp_path):
  check(image_files.read(write_npz(tmp_path)))


def test_downsampled_imagenet_is_channel_first_with_labels_from_one(tmp_path):
  for name, image, label in (("a1", TRAIN_6x4x4x3[:4], LABEL_6[:4]), ("a2", TRAIN_6x4x4x3[4:],
                             LABEL_6[4:]), ("val", VALID_3x4x4x3, LABEL_3)):  # fmt: skip
    rows = image.transpose(0, 3, 1, 2).reshape(len(image), -1)
    np.savez(tmp_path / f"{name}.npz", data=rows, labels=label + 1, mean=rows.mean(0))
  pattern, valid = str(tmp_path / "a*.npz"), str(tmp_path / "val.npz")
  check(image_files.read(pattern, valid))
  with pytest.raises(ValueError, match=r"give the files of the other split as data\.valid_path"):
    image_files.read(pattern)


def test_labels_without_a_sign_that_are_not_from_one_are_refused(tmp_path):
  for name in ("train", "val"):
    np.savez(
      tmp_path / f"{name}.npz", data=np.zeros((2, 48), np.uint8), labels=np.array([0, 1], np.uint8)
    )
  with pytest.raises(ValueError, match="one number from 0 on"):
    image_files.read(str(tmp_path / "train.npz"), str(tmp_path / "val.npz"))


def test_a_name_that_could_be_a_pattern_is_first_that_of_a_file(tmp_path):
  path = tmp_path / "a[1].npz"
  with pytest.raises(FileNotFoundError, match=r"correct data\.path"):
    image_files.read(str(path))
  pathlib.Path(write_npz(tmp_path)).rename(path)
  (tmp_path / "a1.npz").write_bytes(b"another file, which the pattern would find")
  check(image_files.read(str(path)))


def cifar_rows(count, seed):
  rows_NxR = np.random.default_rng(seed).integers(256, size=(count, 3073)).astype(np.uint8)
  rows_NxR[:, 0] %= 10
  return rows_NxR


@pytest.fixture
def cifar(tmp_path):
  """(folder, archive) of CIFAR-10's binary version with few rows."""
  folder = tmp_path / "cifar-10-batches-bin"
  folder.mkdir()
  for i, name in enumerate([f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]):
    (folder / name).write_bytes(cifar_rows(2, i).tobytes())
  archive = tmp_path / "cifar-10-binary.tar.gz"
  with tarfile.open(archive, "w:gz") as file:
    file.add(folder, folder.name)
  return folder, archive


def test_cifar10_is_read_from_its_folder_and_from_its_archive(cifar, monkeypatch):
  folder, archive = cifar
  monkeypatch.setattr(image_files, "_CIFAR10_FILE", 2 * 3073)
  rows_NxR = np.concatenate([cifar_rows(2, i) for i in range(6)])
  image = rows_NxR[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  labels = rows_NxR[:10, 0], rows_NxR[10:, 0]
  for path in (folder, folder.parent):
    check(image_files.read(str(path)), image[:10], image[10:], labels)
  with pytest.raises(ValueError, match="whose md5 is c32a1d4ab5d03f1284b67883e8d87530"):
    image_files.read(str(archive))
  md5 = image_files.hashlib.md5(archive.read_bytes()).hexdigest()
  monkeypatch.setattr(image_files, "CIFAR10_MD5", md5)
  check(image_files.read(str(archive)), image[:10], image[10:], labels)
  monkeypatch.setattr(image_files, "_CIFAR10_PICKLED_MD5", md5)
  with pytest.raises(ValueError, match="pickles and may run any code; give the binary version"):
    image_files.read(str(archive))


@pytest.mark.parametrize("inside", ["cifar-10-batches-py/batches.meta", "batches.meta"])
def test_the_folder_of_the_python_version_is_answered_with_the_binary_one(inside, tmp_path):
  (tmp_path / inside).parent.mkdir(exist_ok=True)
  (tmp_path / inside).write_bytes(pickle.dumps(Loud()))
  with pytest.raises(ValueError, match=r"are pickles .*binary version, cifar-10-binary\.tar\.gz"):
    image_files.read(str(tmp_path))


def test_a_file_of_cifar10_that_is_cut_short_or_missing_is_named(cifar, monkeypatch):
  folder, _ = cifar
  with pytest.raises(ValueError, match=r"data_batch_1\.bin.*bytes=6146: .*10,000 rows"):
    image_files.read(str(folder))
  monkeypatch.setattr(image_files, "_CIFAR10_FILE", 2 * 3073)
  (folder / "data_batch_3.bin").write_bytes(b"\0" * 3073)
  with pytest.raises(ValueError, match=r"data_batch_3\.bin.*bytes=3073"):
    image_files.read(str(folder))
  (folder / "data_batch_3.bin").unlink()
  with pytest.raises(ValueError, match=r"data_batch_3\.bin.*unpack it again"):
    image_files.read(str(folder))


def write_idx(folder, *, zipped=False):
  """MNIST's files with the first channel of the images above."""
  arrays = {
    "train-images-idx3-ubyte": TRAIN_6x4x4x3[..., 0],
    "train-labels-idx1-ubyte": LABEL_6.astype(np.uint8),
    "t10k-images-idx3-ubyte": VALID_3x4x4x3[..., 0],
    "t10k-labels-idx1-ubyte": LABEL_3.astype(np.uint8),
  }
  for name, array in arrays.items():
    raw = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path = folder / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_read_from_its_idx_files(zipped, tmp_path):
  write_idx(tmp_path, zipped=zipped)
  check(image_files.read(str(tmp_path)), TRAIN_6x4x4x3[..., :1], VALID_3x4x4x3[..., :1])


def test_an_idx_file_that_lies_about_its_size_is_refused(tmp_path):
  write_idx(tmp_path)
  file = tmp_path / "t10k-images-idx3-ubyte"
  raw = file.read_bytes()
  for wrong in (raw[:-1], raw + b"\0", struct.pack(">4I", 0x0803, 2**31, 2**31, 4) + raw[16:]):
    file.write_bytes(wrong)
    with pytest.raises(ValueError, match="not as long as it says"):
      image_files.read(str(tmp_path))
  file.write_bytes(raw[:10])
  with pytest.raises(ValueError, match="cut short"):
    image_files.read(str(tmp_path))


class Loud:
  def __reduce__(self):
    return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"train_images": TRAIN_6x4x4x3.astype(np.float32)}, "images are uint8 arrays"),
    ({"train_images": TRAIN_6x4x4x3[0]}, "images are uint8 arrays"),
    ({"valid_images": VALID_3x4x4x3[:, :2]}, "must be of one shape"),
    ({"valid_labels": None}, "all or none of them have labels"),
    ({"train_labels": LABEL_6[:5]}, "one number from 0 on for each image"),
    ({"train_labels": LABEL_6 - 1}, "one number from 0 on for each image"),
    ({"valid_images": None}, "it lacks valid_images"),
    ({"train_images": None, "images": TRAIN_6x4x4x3}, "data.valid_path"),
    ({"train_images": np.array([Loud()], object)}, "no npz of plain arrays"),
  ],
)
def test_an_npz_that_holds_no_such_images_is_refused(changes, words, tmp_path):
  with pytest.raises(ValueError, match=words):
    image_files.read(write_npz(tmp_path, **changes))


def test_an_array_larger_than_its_file_is_refused_before_memory_is_taken(tmp_path):
  header = io.BytesIO()
  about = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000, 3)}
  np.lib.format.write_array_header_1_0(header, about)
  path = tmp_path / "images.npz"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("train_images.npy", header.getvalue() + b"x" * 100)
  with pytest.raises(ValueError, match="it holds fewer bytes than its header says"):
    image_files.read(str(path))


@pytest.mark.parametrize("shape", [(0, 48), (2, 12), ()])
def test_files_of_a_split_hold_images_of_one_shape(shape, tmp_path):
  np.savez(tmp_path / "a0.npz", data=np.zeros((2, 48), np.uint8))
  np.savez(tmp_path / "a1.npz", data=np.zeros(shape, np.uint8))
  np.savez(tmp_path / "val.npz", data=np.zeros((2, 48), np.uint8))
  with pytest.raises(ValueError, match="hold images, all of one shape"):
    image_files.read(str(tmp_path / "a*.npz"), str(tmp_path / "val.npz"))


def test_a_pickle_is_never_loaded_and_what_is_nothing_is_said_to_be(tmp_path):
  path = tmp_path / "images.npz"
  path.write_bytes(pickle.dumps(Loud()))
  with pytest.raises(ValueError, match="no npz of plain arrays, or damaged"):
    image_files.read(str(path))
  with pytest.raises(FileNotFoundError, match=r"correct data\.path"):
    image_files.read(str(tmp_path / "nothing.npz"))
  np.save(tmp_path / "array.npy", np.zeros((2, 2)))
  (tmp_path / "array.npy").rename(tmp_path / "array.npz")
  with pytest.raises(ValueError, match="no npz of plain arrays, or damaged"):
    image_files.read(str(tmp_path / "array.npz"))
  with pytest.raises(ValueError, match="in no format that is read here"):
    image_files.read(str(tmp_path))
  write_npz(tmp_path)
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(ValueError, match="damaged"):
    image_files.read(str(path))


def test_an_image_and_its_digits_are_each_other(tmp_path):
  dataset = images.Images(path=write_npz(tmp_path))
  x_L = dataset.split("train")[0]["x"].copy()
  x_L[5] = dataset.vocab_size
  text = dataset.decode(x_L)
  assert len(text.splitlines()) == 4 and text[10:12] == "__"
  np.testing.assert_array_equal(dataset.encode(text), x_L)
  with pytest.raises(ValueError, match="value='zz'"):
    dataset.encode("00zz")
  assert (dataset.vocab_size, dataset.length, dataset.unit) == (256, 48, "dim")


def test_half_of_the_training_images_are_mirrored_where_the_recipe_says_so(tmp_path):
  dataset = images.Images(path=write_npz(tmp_path), flip=True)
  item = dataset.split("train")[1]
  mirrored = TRAIN_6x4x4x3[1, :, ::-1].reshape(-1).tolist()
  made = [dataset.augment(item, np.random.default_rng(i))["x"].tolist() for i in range(200)]
  assert all(x_L in (item["x"].tolist(), mirrored) for x_L in made)
  assert 70 < sum(x_L == mirrored for x_L in made) < 130
  plain = images.Images(path=write_npz(tmp_path))
  assert all(plain.augment(item, np.random.default_rng(i)) is item for i in range(9))


def test_labels_are_given_where_they_are_asked_for(tmp_path):
  path = write_npz(tmp_path)
  assert "label" not in images.Images(path=path).split("train")[0]
  dataset = images.Images(path=path, class_conditional=True)
  assert dataset.classes == 3
  batch = next(data.evaluation_batches(dataset.split("valid"), batch_size=4))
  assert batch["label_B"].tolist() == [2, 0, 1, 1]
  with pytest.raises(ValueError, match=r"set data\.class_conditional=False"):
    images.Images(
      path=write_npz(tmp_path, train_labels=None, valid_labels=None), class_conditional=True
    )


@pytest.mark.parametrize("name", images.REGIONS)
def test_a_region_is_a_part_of_the_pixels_with_all_their_channels(name):
  inside = images.region(name, (4, 8, 3)).reshape(4, 8, 3)
  assert (inside == inside[..., :1]).all()
  assert inside.mean() == (0.25 if name == "center" else 0.5)
  expected = {"left": (0, 0), "top": (0, 0), "right": (3, 7), "bottom": (3, 7), "center": (1, 2)}
  assert inside[expected[name]].all()
  assert not inside[3 - expected[name][0] if name != "center" else 0, 7 - expected[name][1]].any()


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_middle_of_few_pixels_is_all_of_them(side):
  assert images.region("center", (side, side, 1)).all()


def test_an_unknown_region_is_answered_with_those_that_exist():
  with pytest.raises(ValueError, match="left, right, top, bottom, center"):
    images.region("middle", (4, 4, 3))
