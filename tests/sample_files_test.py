"""What the sampling job writes: arrays hold all samples, pictures the first ones."""

import types

import numpy as np
import PIL.Image

from md4vmd import image_grids, sample_files
from md4vmd.samplers import Samples


def test_arrays_hold_all_images_and_pictures_the_first_ones(tmp_path, capsys):
  rng = np.random.default_rng(0)
  shape, count = (2, 2, 3), sample_files.MOST_PICTURED + 6
  x_BxL = rng.integers(256, size=(count, 12))
  samples = Samples(x_BxL, np.tile(np.arange(12) % 2, (count, 1)), np.full(count, 2))
  model = types.SimpleNamespace(
    dataset=types.SimpleNamespace(image_shape=shape),
    run=types.SimpleNamespace(initial=""),
    config={"sampler": {"name": "margin"}},
    config_hash="0",
    seed=1,
  )
  free_BxL = np.ones((count, 12), bool)
  folder = tmp_path / "samples"
  folder.mkdir()
  for name in ("7.txt", "7.jsonl"):  # of an earlier job
    (folder / name).touch()
  sample_files.write(model, tmp_path, 7, [], x_BxL, free_BxL, None, samples)
  names = {path.name for path in folder.iterdir()}
  assert names == {"7.npz", "7.json", "7.png", "7-film.png", "7.gif"}
  np.testing.assert_array_equal(np.load(folder / "7.npz")["x_BxL"], x_BxL)
  first = x_BxL[: sample_files.MOST_PICTURED].reshape(-1, *shape).astype(np.uint8)
  expected = np.asarray(image_grids.grid(first))
  np.testing.assert_array_equal(np.asarray(PIL.Image.open(folder / "7.png")), expected)
  gif = PIL.Image.open(folder / "7.gif")
  assert gif.size == expected.shape[1::-1] and gif.n_frames == 3
  assert "of the first 64 of 70" in capsys.readouterr().out
