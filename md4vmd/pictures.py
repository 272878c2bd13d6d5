"""Pictures of a run, drawn with pillow: how a sequence was unmasked, and curves.

Everything is drawn once at the size it is shown; text uses pillow's own scalable font, so a
picture is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WHITE = (255, 255, 255)
_INK = (31, 41, 55)
_SOFT = (107, 114, 128)
_GRID = (229, 231, 235)
_MASKED = (226, 230, 236)
_NEW = (255, 214, 140)
_NEW_INK = (146, 64, 14)
_OLD = (236, 246, 241)
_OLD_INK = (22, 101, 82)
_GIVEN = (255, 255, 255)
_SERIES = ((37, 99, 175), (217, 95, 40), (32, 140, 110), (140, 80, 170), (190, 60, 90))


def film_strip(
  cells: Sequence[str],
  reveal_step_L: np.ndarray,
  *,
  columns: int,
  box: int | None = None,
  frames: int = 8,
) -> Image.Image:
  """The unmasking of one sequence: panels after chosen network calls, from all masked to done.

  Masked cells are grey, cells revealed since the panel before are amber, earlier ones green, and
  given cells dark on white.

  Args:
    cells: final text of each of the L positions, laid out in rows of `columns`.
    reveal_step_L: 0-based call that revealed each position; -1 where it was given.
    columns: cells in a row.
    box: draws heavier lines around boxes of this side, 3 for a sudoku.
    frames: largest number of panels after the first, which shows the start.

  Raises:
    ValueError: lengths differ, or `columns` or `frames` is below 1.
  """
  reveal_step_L = np.asarray(reveal_step_L)
  if reveal_step_L.shape != (len(cells),) or not len(cells):
    raise ValueError(
      f"{len(cells)} cells need as many reveal steps, found shape {reveal_step_L.shape}"
    )
  if columns < 1 or frames < 1:
    raise ValueError(f"columns={columns} and frames={frames} must be at least 1")
  calls = int(reveal_step_L.max()) + 1
  shown = sorted({round(i * calls / frames) for i in range(frames + 1)})
  font = ImageFont.load_default(size=17)
  texts = [_printable(text) for text in cells]
  cell_h = 30
  widest = max(font.getlength(text) for text in texts)
  cell_w = cell_h if box else max(18, math.ceil(widest) + 8)
  rows = -(-len(cells) // columns)
  panel_w, panel_h = columns * cell_w + 1, rows * cell_h + 1
  across = _panels_across(len(shown), panel_w, panel_h)
  down = -(-len(shown) // across)
  margin, gap, caption = 28, 26, 30
  width = 2 * margin + across * panel_w + (across - 1) * gap
  height = 2 * margin + down * (panel_h + caption) + (down - 1) * gap // 2
  image = Image.new("RGB", (width, height), _WHITE)
  draw = ImageDraw.Draw(image)
  caption_font = ImageFont.load_default(size=15)
  for j, call in enumerate(shown):
    x = margin + j % across * (panel_w + gap)
    y = margin + j // across * (panel_h + caption + gap // 2)
    before = shown[j - 1] if j else 0
    for i, text in enumerate(texts):
      corner = (x + i % columns * cell_w, y + i // columns * cell_h)
      fill, ink = _cell_colours(int(reveal_step_L[i]), before, call)
      _draw_cell(draw, corner, (cell_w, cell_h), text if ink else "", fill, ink, font)
    if box:
      _draw_boxes(draw, (x, y), (cell_w, cell_h), columns, rows, box)
    draw.text(
      (x + panel_w // 2, y + panel_h + 17),
      f"step {call} / NFE {calls}",
      fill=_SOFT,
      font=caption_font,
      anchor="mm",
    )
  return image


def _cell_colours(reveal_step: int, before: int, call: int):
  """(fill, ink) of a cell after `call` calls; ink is None while it is masked."""
  if reveal_step < 0:
    return _GIVEN, _INK
  if reveal_step >= call:
    return _MASKED, None
  if reveal_step >= before:
    return _NEW, _NEW_INK
  return _OLD, _OLD_INK


def _printable(text: str) -> str:
  """One line of at most 14 characters without control characters."""
  text = text.replace("\n", "\\n").replace("\t", "\\t")
  text = "".join(c if c.isprintable() else "?" for c in text)
  return text if len(text) <= 14 else text[:13] + "…"


def _panels_across(panels: int, panel_w: int, panel_h: int) -> int:
  """Columns of panels that make the picture about three times as wide as high."""
  wanted = math.sqrt(3 * panels * (panel_h + 43) / (panel_w + 26))
  rows = max(1, round(panels / max(1, wanted)))
  return -(-panels // rows)


def _draw_cell(draw, corner, size, text, fill, ink, font) -> None:
  x, y = corner
  w, h = size
  draw.rectangle((x, y, x + w, y + h), fill=fill, outline=_WHITE if fill != _GIVEN else _GRID)
  if text.strip():
    bold = 0.6 if fill == _GIVEN else 0
    draw.text(
      (x + w / 2 + 0.5, y + h / 2 + 0.5), text, fill=ink, font=font, anchor="mm",
      stroke_width=bold,
    )  # fmt: skip


def _draw_boxes(draw, corner, size, columns: int, rows: int, box: int) -> None:
  x, y = corner
  right, bottom = x + columns * size[0], y + rows * size[1]
  for i in sorted({*range(0, columns + 1, box), columns}):
    draw.line((x + i * size[0], y, x + i * size[0], bottom), fill=_INK, width=2)
  for i in sorted({*range(0, rows + 1, box), rows}):
    draw.line((x, y + i * size[1], right, y + i * size[1]), fill=_INK, width=2)


def curve(
  series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  *,
  title: str = "",
  x_label: str = "",
  y_label: str = "",
  references: Mapping[str, float] | None = None,
  size: tuple[int, int] = (760, 440),
) -> Image.Image:
  """A line plot of series {label: (x, y)} with axes, ticks and a legend.

  Points that are not finite are left out.

  Args:
    series: the lines, in the order of their colours.
    title: line above the plot.
    x_label: name and unit of x.
    y_label: name and unit of y.
    references: values of dashed horizontal lines by label, such as an exact entropy.
    size: width and height in pixels.

  Raises:
    ValueError: no series has a finite point, or the x and y of one differ in length.
  """
  lines = {label: _finite_points(label, x, y) for label, (x, y) in series.items()}
  points_Nx2 = np.concatenate([*lines.values(), np.empty((0, 2))])
  if not len(points_Nx2):
    raise ValueError("a curve needs at least one finite point")
  references = references or {}
  heights = [*points_Nx2[:, 1], *references.values()]
  x_ticks = _ticks(points_Nx2[:, 0].min(), points_Nx2[:, 0].max(), 7)
  y_ticks = _ticks(min(heights), max(heights), 6)
  frame = _Frame(size, x_ticks, y_ticks, list(references), has_title=bool(title))
  scale = 3  # lines are drawn larger and scaled down, which smooths them
  image = Image.new("RGB", (size[0] * scale, size[1] * scale), _WHITE)
  draw = ImageDraw.Draw(image)
  frame.draw_grid(draw, scale)
  for value in references.values():
    frame.draw_dashes(draw, value, scale)
  for i, line_Nx2 in enumerate(lines.values()):
    frame.draw_line(draw, line_Nx2, _SERIES[i % len(_SERIES)], scale)
  image = image.resize(size, Image.Resampling.LANCZOS)
  draw = ImageDraw.Draw(image)
  frame.draw_labels(draw, title, x_label, y_label)
  for label, value in references.items():
    place = (frame.right + 8, frame.at(0, value)[1])
    draw.text(place, label, fill=_SOFT, font=frame.font, anchor="lm")
  frame.draw_legend(draw, list(lines))
  return image


def bars(
  labels: Sequence[str],
  values_N: np.ndarray,
  *,
  title: str,
  reference: float,
) -> Image.Image:
  """One horizontal bar per label, from a reference line to the value.

  Args:
    labels: names, top to bottom.
    values_N: finite values.
    title: line above the bars.
    reference: where the bars begin.

  Raises:
    ValueError: no labels, or not as many values.
  """
  values_N = np.asarray(values_N, float)
  if not len(labels) or values_N.shape != (len(labels),):
    raise ValueError(f"{len(labels)} labels need as many values, found shape {values_N.shape}")
  font, title_font = ImageFont.load_default(size=14), ImageFont.load_default(size=16)
  texts = [_printable(label) if label.strip() else "space" for label in labels]
  ticks = _ticks(min(reference, values_N.min()), max(reference, values_N.max()), 6)
  row, top, plot = 22, 60, 420
  left = 40 + math.ceil(max(font.getlength(text) for text in texts))
  image = Image.new("RGB", (left + plot + 80, top + row * len(texts) + 40), _WHITE)
  draw = ImageDraw.Draw(image)
  at = lambda value: left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * plot
  bottom = top + row * len(texts)
  draw.text((18, 18), title, fill=_INK, font=title_font, anchor="la")
  for tick in ticks:
    draw.line((at(tick), top, at(tick), bottom), fill=_GRID)
    draw.text((at(tick), bottom + 8), _tick_text(tick, ticks), fill=_SOFT, font=font, anchor="ma")
  for i, (text, value) in enumerate(zip(texts, values_N, strict=True)):
    y = top + i * row
    low, high = sorted((at(reference), at(value)))
    draw.rectangle((low, y + 4, high, y + row - 5), fill=_SERIES[int(value < reference)])
    draw.text((left - 12, y + row / 2), text, fill=_INK, font=font, anchor="rm")
    draw.text((high + 6, y + row / 2), f"{value:.3f}", fill=_SOFT, font=font, anchor="lm")
  draw.line((at(reference), top, at(reference), bottom), fill=_INK)
  return image


class _Frame:
  """The rectangle of a plot: where data go, and everything around them."""

  def __init__(self, size, x_ticks, y_ticks, right_labels: list[str], *, has_title: bool):
    self.font = ImageFont.load_default(size=13)
    self.title_font = ImageFont.load_default(size=16)
    self.x_ticks, self.y_ticks = x_ticks, y_ticks
    widest = max(self.font.getlength(_tick_text(t, y_ticks)) for t in y_ticks)
    widest_right = max((self.font.getlength(label) for label in right_labels), default=8)
    self.left, self.right = int(widest) + 34, size[0] - 20 - int(widest_right)
    self.top, self.bottom = 70 if has_title else 46, size[1] - 58

  def at(self, x: float, y: float) -> tuple[float, float]:
    """Pixel of a point."""
    (x0, x1), (y0, y1) = (self.x_ticks[0], self.x_ticks[-1]), (self.y_ticks[0], self.y_ticks[-1])
    return (
      self.left + (x - x0) / (x1 - x0) * (self.right - self.left),
      self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top),
    )

  def draw_grid(self, draw, scale: int) -> None:
    for tick in self.y_ticks:
      y = self.at(0, tick)[1] * scale
      draw.line((self.left * scale, y, self.right * scale, y), fill=_GRID, width=scale)
    y = self.bottom * scale
    draw.line((self.left * scale, y, self.right * scale, y), fill=_SOFT, width=scale)
    for tick in self.x_ticks:
      x = self.at(tick, 0)[0] * scale
      draw.line((x, y, x, y + 5 * scale), fill=_SOFT, width=scale)

  def draw_dashes(self, draw, value: float, scale: int) -> None:
    y = self.at(0, value)[1] * scale
    for x in range(self.left, self.right, 10):
      end = min(x + 6, self.right)
      draw.line((x * scale, y, end * scale, y), fill=_SOFT, width=round(1.4 * scale))

  def draw_line(self, draw, line_Nx2: np.ndarray, colour, scale: int) -> None:
    pixels = [tuple(scale * c for c in self.at(x, y)) for x, y in line_Nx2]
    if len(pixels) > 1:
      draw.line(pixels, fill=colour, width=2 * scale, joint="curve")
    radius = scale * (3 if len(pixels) <= 20 else 1)
    for x, y in pixels:
      draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

  def draw_labels(self, draw, title: str, x_label: str, y_label: str) -> None:
    for tick in self.x_ticks:
      place = (self.at(tick, 0)[0], self.bottom + 9)
      draw.text(place, _tick_text(tick, self.x_ticks), fill=_SOFT, font=self.font, anchor="ma")
    for tick in self.y_ticks:
      place = (self.left - 9, self.at(0, tick)[1])
      draw.text(place, _tick_text(tick, self.y_ticks), fill=_SOFT, font=self.font, anchor="rm")
    middle = (self.left + self.right) / 2
    draw.text((middle, self.bottom + 33), x_label, fill=_INK, font=self.font, anchor="ma")
    draw.text((18, self.top - 14), y_label, fill=_INK, font=self.font, anchor="ls")
    draw.text((18, 18), title, fill=_INK, font=self.title_font, anchor="la")

  def draw_legend(self, draw, labels: list[str]) -> None:
    x = self.right
    for i, label in reversed(list(enumerate(labels))):
      draw.text((x, self.top - 14), label, fill=_INK, font=self.font, anchor="rs")
      x -= self.font.getlength(label) + 8
      y = self.top - 18
      draw.line((x - 18, y, x, y), fill=_SERIES[i % len(_SERIES)], width=3)
      x -= 36


def _finite_points(label: str, x: Sequence[float], y: Sequence[float]) -> np.ndarray:
  if len(x) != len(y):
    raise ValueError(f"series {label!r} has {len(x)} x values and {len(y)} y values")
  points_Nx2 = np.stack([np.asarray(x, float), np.asarray(y, float)], axis=-1)
  return points_Nx2[np.isfinite(points_Nx2).all(-1)]


def _ticks(low: float, high: float, count: int) -> list[float]:
  """Round numbers that enclose [low, high], about `count` of them."""
  if high <= low:
    low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
  raw = (high - low) / (count - 1)
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def _tick_text(tick: float, ticks: list[float]) -> str:
  step = ticks[1] - ticks[0]
  if max(abs(t) for t in ticks) >= 10_000 and step >= 100:
    return f"{tick / 1000:g}k" if tick else "0"
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  decimals += not math.isclose(round(step, decimals), step)  # a step of 2.5 or 0.25
  return f"{tick:.{decimals}f}"
