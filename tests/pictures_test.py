import numpy as np
import pytest
from PIL import Image

from md4vmd import pictures

REVEAL_STEP_L = np.array([-1, 0, 1, 2, 3, 3])


def strip(frames: int = 4, **kwargs) -> Image.Image:
  return pictures.film_strip(list("abcdef"), REVEAL_STEP_L, columns=3, frames=frames, **kwargs)


def count(image: Image.Image, colour: tuple) -> int:
  return int((np.asarray(image) == np.array(colour)).all(-1).sum())


def masked_cells(image: Image.Image) -> float:
  one = count(pictures.film_strip([" "], np.array([0]), columns=1, frames=1), pictures._MASKED)
  return count(image, pictures._MASKED) / one


def test_masked_area_counts_the_cells_that_wait():
  # After 0, 1, 2, 3, 4 calls 5, 4, 3, 2 and 0 of the 6 cells are masked.
  cells = [" "] * 6
  image = pictures.film_strip(cells, REVEAL_STEP_L, columns=3, frames=4)
  assert masked_cells(image) == pytest.approx(5 + 4 + 3 + 2 + 0, rel=0.02)


def test_every_new_cell_is_highlighted_once():
  cells = [" "] * 6
  one = count(pictures.film_strip([" "], np.array([0]), columns=1, frames=1), pictures._NEW)
  for frames in (1, 2, 4):
    image = pictures.film_strip(cells, REVEAL_STEP_L, columns=3, frames=frames)
    assert count(image, pictures._NEW) / one == pytest.approx(5, rel=0.02)


def test_text_is_hidden_until_it_is_revealed():
  revealed_at_once = pictures.film_strip(["M"], np.array([0]), columns=1, frames=1)
  given = pictures.film_strip(["M"], np.array([-1]), columns=1, frames=1)
  assert count(revealed_at_once, pictures._NEW_INK) > 5 and count(given, pictures._INK) > 5
  # The left panel, all masked, shows no ink.
  left = revealed_at_once.crop((0, 0, revealed_at_once.width // 2, 56))
  assert count(left, pictures._NEW_INK) == 0 and count(left, pictures._MASKED) > 0


def test_at_most_the_frames_asked_for_and_the_start():
  narrow, wide = strip(frames=2), strip(frames=100)
  assert wide.size == strip(frames=4).size  # there are only 4 calls
  assert narrow.width * narrow.height < wide.width * wide.height


def test_box_lines_are_dark():
  cells, steps_L = [" "] * 81, np.zeros(81, int)
  boxed = pictures.film_strip(cells, steps_L, columns=9, box=3)
  assert count(pictures.film_strip(cells, steps_L, columns=9), pictures._INK) == 0
  # Two panels, four lines each way, two pixels wide.
  assert count(boxed, pictures._INK) == pytest.approx(2 * 8 * 2 * 270, rel=0.05)


def test_odd_texts_are_one_short_printable_line():
  assert pictures._printable("\n") == "\\n"
  assert pictures._printable("a\x00b") == "a?b"
  assert pictures._printable("x" * 40) == "x" * 13 + "…"
  strip_of_odd = pictures.film_strip(["\n", "x" * 99, ""], np.array([0, 1, -1]), columns=3)
  assert strip_of_odd.width < 1500


def test_strip_is_the_same_twice_and_saves_as_png(tmp_path):
  strip().save(tmp_path / "a.png")
  reread = np.asarray(Image.open(tmp_path / "a.png"))
  np.testing.assert_array_equal(reread, np.asarray(strip()))


def test_wrong_inputs_are_named():
  with pytest.raises(ValueError, match=r"2 cells need as many reveal steps, found shape \(3,\)"):
    pictures.film_strip(["a", "b"], np.zeros(3, int), columns=2)
  with pytest.raises(ValueError, match="columns=0"):
    pictures.film_strip(["a"], np.zeros(1, int), columns=0)
  with pytest.raises(ValueError, match="frames=0"):
    strip(frames=0)


def rows_of(image: Image.Image, colour: tuple, columns: slice) -> float:
  hits = (np.asarray(image)[:, columns] == np.array(colour)).all(-1)
  return float(np.nonzero(hits)[0].mean())


def test_curve_has_its_size_and_rises_with_its_values():
  blue = pictures._SERIES[0]
  image = pictures.curve({"": ([0, 1, 2], [0.0, 1.0, 2.0])}, size=(500, 300))
  assert image.size == (500, 300)
  below_legend = image.crop((0, 46, 500, 300))
  assert rows_of(below_legend, blue, slice(0, 150)) > rows_of(below_legend, blue, slice(350, 500))


def test_reference_is_drawn_at_its_height():
  series = {"a": ([0, 1], [0.0, 4.0])}
  image = pictures.curve(series, references={"half": 2.0}, size=(500, 300))
  plain = pictures.curve(series, size=(500, 300))
  dashes = lambda i: (np.asarray(i)[60:230, 60:400].sum(-1) < 400).mean(1)
  # The plot runs from row 46 to 242: 2 of 4 is at 144, row 84 of the crop.
  assert abs(int(np.argmax(dashes(image))) - 84) <= 1
  assert dashes(plain).max() < 0.5 * dashes(image).max()


@pytest.mark.parametrize(
  "low,high", [(0, 1), (1.3, 5.3), (-2, 2), (0, 20_000), (0.001, 0.0042), (3, 3)]
)
def test_ticks_enclose_the_data_and_read_as_what_they_are(low, high):
  ticks = pictures._ticks(low, high, 6)
  assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
  assert 4 <= len(ticks) <= 9
  for tick in ticks:
    text = pictures._tick_text(tick, ticks)
    value = float(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)
    assert value == pytest.approx(tick, abs=1e-9)


def test_curve_leaves_out_what_is_not_finite():
  whole = pictures.curve({"a": ([0, 2], [1.0, 3.0])})
  holed = pictures.curve({"a": ([0, 1, 2], [1.0, np.nan, 3.0])})
  np.testing.assert_array_equal(np.asarray(whole), np.asarray(holed))
  with pytest.raises(ValueError, match="at least one finite point"):
    pictures.curve({"a": ([0], [np.inf])})
  with pytest.raises(ValueError, match="series 'a' has 2 x values and 1 y values"):
    pictures.curve({"a": ([0, 1], [1.0])})
