"""Folders of images become an npz or records, which are read again; damage to either is named."""

import json

import numpy as np
import PIL.Image
import pytest

from md4vmd import data
from md4vmd.data import image_files, image_records, prepare_images


def write_folders(folder):
  """Pictures of 12x8 in a subfolder per class; returns what they become with a side of 4, by fit.

  Of crop the middle 8x8 halved by means of 4, of stretch all of it by means of 3 x 2.
  """
  expected = {"crop": {}, "stretch": {}}
  for split, count in (("train", 2), ("valid", 1)):
    for number, name in enumerate(("cat", "dog")):
      for i in range(count):
        image = np.random.default_rng(100 * number + 10 * i + count).integers(256, size=(8, 12, 3))
        path = folder / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image.astype(np.uint8)).save(path)
        middle = image[:, 2:10].reshape(4, 2, 4, 2, 3).mean((1, 3))
        expected["crop"].setdefault(split, []).append(middle)
        whole = image.reshape(4, 2, 4, 3, 3).mean((1, 3))
        expected["stretch"].setdefault(split, []).append(whole)
  return expected


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("out", ["made.npz", "made"])
def test_folders_become_squares_by_box_means_and_are_read_again(out, fit, tmp_path):
  expected = write_folders(tmp_path)[fit]
  folders = [f"--{split}={tmp_path / split}" for split in ("train", "valid")]
  option = [] if fit == "crop" else [f"--fit={fit}"]
  prepare_images.main([*folders, "--size=4", *option, f"--out={tmp_path / out}"])
  dataset = data.TABLE["images"](path=str(tmp_path / out), class_conditional=True)
  assert dataset.classes == 2 and dataset.image_shape == (4, 4, 3)
  for split, labels in (("train", [0, 0, 1, 1]), ("valid", [0, 1])):
    source = dataset.split(split)
    items = [source[i] for i in range(len(source))]
    assert [int(item["label"]) for item in items] == labels
    made = np.stack([item["x"] for item in items]).reshape(np.shape(expected[split]))
    assert np.abs(made - expected[split]).max() <= 1  # means are rounded
  if out == "made":
    about = json.loads((tmp_path / "made/images.json").read_text())
    assert about == {"shape": [4, 4, 3], "classes": 2, "fit": fit}
  else:
    assert np.load(tmp_path / out)["fit"] == fit


def test_a_flat_folder_beside_classes_is_converted_without_labels(tmp_path, capsys):
  write_folders(tmp_path)
  for name in ("cat", "dog"):
    (tmp_path / f"valid/{name}/0.png").rename(tmp_path / f"valid/{name}.png")
  arguments = [f"--{split}={tmp_path / split}" for split in ("train", "valid")]
  arguments += ["--size=4", f"--out={tmp_path / 'made'}"]
  with pytest.raises(SystemExit):
    prepare_images.main(arguments)
  said = capsys.readouterr().err
  assert "train=['cat', 'dog'], valid=[]" in said and "--unlabelled" in said
  prepare_images.main([*arguments, "--unlabelled"])
  found = image_files.read(str(tmp_path / "made"))
  assert found.classes == 0 and [len(found.splits[name]) for name in ("train", "valid")] == [4, 2]


def test_a_conversion_that_fails_leaves_the_folder_as_it_was(tmp_path):
  expected = write_folders(tmp_path)
  folders = {split: tmp_path / split for split in ("train", "valid")}
  out = tmp_path / "made"
  prepare_images.prepare(folders, out, size=4)
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  assert sorted(before) == ["images.json", "train.array_record", "valid.array_record"]
  (tmp_path / "valid/dog/1.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match=r"1\.png cannot be read"):
    prepare_images.prepare(folders, out, size=2, fit="stretch")
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before
  (tmp_path / "valid/dog/1.png").unlink()
  prepare_images.prepare(folders, out, size=4, fit="stretch")
  made = image_files.read(str(out)).splits["train"][0]["x"].reshape(4, 4, 3)
  assert np.abs(made - expected["stretch"]["train"][0]).max() <= 1


def test_an_npz_in_a_folder_that_is_missing_is_refused_before_an_image_is_read(tmp_path):
  write_folders(tmp_path)
  (tmp_path / "train/cat/0.png").write_bytes(b"no image")
  folders = {split: tmp_path / split for split in ("train", "valid")}
  with pytest.raises(ValueError, match=r"none/made\.npz'.*no such folder"):
    prepare_images.prepare(folders, tmp_path / "none/made.npz", size=4)


@pytest.mark.parametrize(
  "raw",
  [b"P6\nabc 4\n255\n", b"P6\n4 4\n255\n123", b"P6\n4 4\n70000000\n", b"P6\n20000 20000\n255\n"],
)
def test_a_damaged_or_huge_image_is_named(raw, tmp_path):
  file = tmp_path / "bad.ppm"
  file.write_bytes(raw)
  with pytest.raises(ValueError, match=r"bad\.ppm cannot be read as an image"):
    prepare_images.resized(file, 4, 3, "crop")


def test_what_is_no_image_or_no_class_ends_the_conversion_with_a_line(tmp_path, capsys):
  write_folders(tmp_path)
  arguments = [f"--{split}={tmp_path / split}" for split in ("train", "valid")]
  arguments += ["--size=4", f"--out={tmp_path / 'made.npz'}"]
  (tmp_path / "valid/cat/bad.png").write_bytes(b"no image")
  with pytest.raises(SystemExit):
    prepare_images.main(arguments)
  assert "bad.png cannot be read as an image" in capsys.readouterr().err
  PIL.Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / "valid/cat/bad.png")
  with pytest.raises(SystemExit):
    prepare_images.main(arguments)
  assert "more than 8 bits a channel" in capsys.readouterr().err
  (tmp_path / "valid/cat/bad.png").rename(tmp_path / "valid/bad.png")
  with pytest.raises(SystemExit):
    prepare_images.main(arguments)
  assert "the splits must have the same subfolders" in capsys.readouterr().err


def write_records(folder, images, labels=None, *, shape, classes=0):
  """The folder with these images in both splits."""
  pairs = [*zip(images, labels or [0] * len(images), strict=True)]
  image_records.write(folder, {"train": pairs, "valid": pairs}, shape, classes, "crop")


def test_a_record_of_another_size_is_refused(tmp_path):
  write_records(tmp_path, [np.zeros((2, 2, 1)), np.zeros((3, 2, 1))], shape=(2, 2, 1))
  source = image_files.read(str(tmp_path)).splits["train"]
  assert "label" not in source[0] and len(source) == 2
  with pytest.raises(ValueError, match="record=1, bytes=10"):
    source[1]
  (tmp_path / "images.json").write_text('{"shape": "large"}')
  with pytest.raises(ValueError, match="does not give the shape"):
    image_files.read(str(tmp_path))


def test_a_label_beyond_the_classes_is_refused(tmp_path):
  image = np.zeros((2, 2, 3), np.uint8)
  write_records(tmp_path, [image, image], [1, 7], shape=(2, 2, 3), classes=2)
  source = image_files.read(str(tmp_path)).splits["train"]
  assert source[0]["label"] == 1
  with pytest.raises(ValueError, match=r"label=7: .*below the 2 classes"):
    source[1]


def test_damaged_records_are_named(tmp_path):
  write_records(
    tmp_path, np.random.default_rng(0).integers(256, size=(20, 32, 32, 3)), shape=(32, 32, 3)
  )
  file = tmp_path / "train.array_record"
  raw = file.read_bytes()
  file.write_bytes(raw[:40_000] + bytes(100) + raw[40_100:])
  source = image_files.read(str(tmp_path)).splits["train"]
  with pytest.raises(ValueError, match=r"train\.array_record is damaged: record \d+: .*again"):
    [source[i] for i in range(20)]
  for wrong in (b"", b"x" * 1000, raw[: len(raw) // 2]):
    file.write_bytes(wrong)
    with pytest.raises(ValueError, match=r"train\.array_record is damaged: .*again"):
      image_files.read(str(tmp_path))
  write_records(tmp_path, [], shape=(32, 32, 3))
  with pytest.raises(ValueError, match=r"train\.array_record.*holds no images"):
    image_files.read(str(tmp_path))
