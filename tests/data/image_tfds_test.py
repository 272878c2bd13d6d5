"""Sets of tensorflow_datasets: one that it prepares here, and what is refused."""

import functools
import io
import types

import numpy as np
import PIL.Image
import pytest

from md4vmd.data import image_files

tfds = pytest.importorskip("tensorflow_datasets")
IMAGES_6x4x5x3 = np.random.default_rng(0).integers(256, size=(6, 4, 5, 3)).astype(np.uint8)


class PixelsOfAnySize(tfds.core.GeneratorBasedBuilder):
  """Images whose shape the features leave open, as those of downsampled_imagenet do."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate(range(4)), "validation": self._generate(range(4, 6))}

  def _generate(self, numbers):
    for i in numbers:
      file = io.BytesIO()
      PIL.Image.fromarray(IMAGES_6x4x5x3[i]).save(file, "png")
      file.seek(0)
      yield i, {"image": file, "label": i % 3}

  def _generate_examples(self):
    raise NotImplementedError


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """Where sets are looked for; pixels_of_any_size is prepared there, for random access."""
  monkeypatch.setattr(tfds, "builder", functools.partial(tfds.builder, data_dir=tmp_path))
  tfds.builder("pixels_of_any_size").download_and_prepare(file_format="array_record")


def test_a_prepared_set_takes_its_shape_from_its_first_image(prepared):
  found = image_files.read("tfds:pixels_of_any_size")
  assert found.shape == (4, 5, 3) and found.classes == 3
  seen = []
  for name, count in (("train", 4), ("valid", 2)):
    assert len(found.splits[name]) == count
    for i in range(count):
      item = found.splits[name][i]
      (number,) = np.flatnonzero((IMAGES_6x4x5x3.reshape(6, -1) == item["x"]).all(1))
      assert item["label"] == number % 3 and item["x"].dtype == np.int32
      seen.append(number)
  assert sorted(seen) == [0, 1, 2, 3, 4, 5]


def test_splits_of_other_files_are_refused(prepared):
  with pytest.raises(ValueError, match=r"only npz files have a data\.valid_path"):
    image_files.read("tfds:pixels_of_any_size", "valid.npz")


@pytest.mark.parametrize(
  "name", ["no_such_pixels", "cifar10/no_such_config", "cifar10:1.2.3", "a b"]
)
def test_a_name_that_is_none_is_answered_with_one_line(name, prepared):
  with pytest.raises(ValueError, match=f"data.path='tfds:{name}': ") as caught:
    image_files.read(f"tfds:{name}")
  assert len(str(caught.value).splitlines()) == 1
  assert caught.value.__suppress_context__  # or a traceback would show the list after all


def test_a_set_that_is_not_prepared_is_answered_with_the_command(prepared):
  with pytest.raises(ValueError, match=r"builder\('cifar10'\).*file_format='array_record'"):
    image_files.read("tfds:cifar10")


def fake(monkeypatch, images, *, feature="image", shape=(None, None, 3), splits=("train", "test")):
  """The set "toy" with these images in each of its splits; None where it has another format."""

  def examples(split):
    if images is None:
      raise NotImplementedError("Random access data source for TFRECORD is not supported")
    return [{feature: image} for image in images]

  features = {feature: types.SimpleNamespace(shape=shape)}
  info = types.SimpleNamespace(splits=splits, features=features)
  builder = types.SimpleNamespace(info=info, as_data_source=examples)
  monkeypatch.setattr(tfds, "builder", {"toy": builder}.__getitem__)


def test_a_set_without_labels_has_none(monkeypatch):
  fake(monkeypatch, IMAGES_6x4x5x3)
  found = image_files.read("tfds:toy")
  assert found.classes == 0 and [*found.splits["valid"][1]] == ["x"]


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"images": None}, r"builder\('toy'\).*prepare\(file_format='array_record'\)"),
    ({"feature": "picture"}, r"features=\['picture'\]: the set has no feature 'image'"),
    ({"splits": ("train", "more")}, "needs a split 'train' and a 'validation' or 'test'"),
    ({"images": []}, "a split of the set is empty"),
  ],
)
def test_a_set_that_is_no_such_images_is_refused(changes, words, monkeypatch):
  fake(monkeypatch, **{"images": IMAGES_6x4x5x3} | changes)
  with pytest.raises(ValueError, match=words):
    image_files.read("tfds:toy")


@pytest.mark.parametrize("shape", [(None, None, 3), (4, 5, 3)])
def test_an_image_unlike_the_first_is_refused_with_its_number(shape, monkeypatch):
  fake(
    monkeypatch,
    [IMAGES_6x4x5x3[0], IMAGES_6x4x5x3[1, :3], IMAGES_6x4x5x3[2].astype(np.float32)],
    shape=shape,
  )
  source = image_files.read("tfds:toy").splits["train"]
  np.testing.assert_array_equal(source[0]["x"], IMAGES_6x4x5x3[0].reshape(-1))
  for i, found in ((1, r"shape=\(3, 5, 3\)"), (2, "dtype='float32'")):
    with pytest.raises(ValueError, match=f"example={i}, .*{found}"):
      source[i]
