"""Pictures of images: every pixel is where it belongs."""

import numpy as np
import PIL.Image
import pytest

from md4vmd import image_grids

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_the_images_row_by_row_enlarged(channels):
  images = RNG.integers(256, size=(5, 40, 50, channels)).astype(np.uint8)
  picture = np.asarray(image_grids.grid(images, columns=3)).reshape(
    2 * 82 + 2, 3 * 102 + 2, channels
  )
  for number, image in enumerate(images):
    top, left = 2 + number // 3 * 82, 2 + number % 3 * 102
    np.testing.assert_array_equal(picture[top : top + 80 : 2, left : left + 100 : 2], image)
  assert (picture[:2] == 255).all() and (picture[84:, 206:] == 255).all()


def test_stages_show_grey_until_a_token_is_filled_and_given_ones_from_the_start():
  x_NxL = np.array([[10, 20, 30, 256]])
  call_NxL = np.array([[-1, 0, 1, -1]])
  stages = image_grids.stages(x_NxL, call_NxL, (2, 2, 1), frames=2)
  shown = [stage.reshape(-1).tolist() for stage in stages]
  assert shown == [[10, 128, 128, 128], [10, 20, 128, 128], [10, 20, 30, 128]]
  assert len(image_grids.stages(x_NxL, call_NxL, (2, 2, 1), frames=1)) == 2


def test_a_film_has_a_row_for_every_image_and_a_gif_a_frame_for_every_stage(tmp_path):
  x_NxL = RNG.integers(256, size=(2, 12))
  call_NxL = np.tile(np.arange(12) % 4, (2, 1))
  stages = image_grids.stages(x_NxL, call_NxL, (2, 2, 3), frames=4)
  film = image_grids.film(stages)
  assert film.size == (5 * 98 + 2, 2 * 98 + 2)
  np.testing.assert_array_equal(np.asarray(film)[2, 2 + 4 * 98], stages[4][0, 0, 0])
  np.testing.assert_array_equal(np.asarray(film)[2 + 98, 2], [128] * 3)
  image_grids.save_gif(stages, tmp_path / "film.gif")
  assert PIL.Image.open(tmp_path / "film.gif").n_frames == 5


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 4, 4, 2), (2, 4, 4)])
def test_what_are_no_images_is_refused_with_its_shape(shape):
  with pytest.raises(ValueError, match=str(shape[0])):
    image_grids.grid(np.zeros(shape, np.uint8))
