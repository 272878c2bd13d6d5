"""Plots of runs, with matplotlib, which the extra [report] brings."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from typing import Any

from md4vmd.report.runs import Run, number
from md4vmd.report.tables import labels

_CALLS = re.compile(r"(?P<head>.*?[/_])(?:nfe|T)(?P<calls>\d{1,9})(?P<tail>(?:_.*)?)")
_COLOURS = 10  # of matplotlib's cycle; more runs take theirs from a map
_PANELS_ACROSS = 3


def draw_all(runs: Sequence[Run]) -> dict[str, bytes]:
  """PNG files by name of all plots for which there are figures; {} without matplotlib."""
  try:
    import matplotlib  # pyright: ignore[reportMissingImports]
  except ImportError:
    return {}
  drawings = {"bits": draw_bits, "noise": draw_noise, "calls": draw_calls}
  # Names of runs are plain text and no formulas.
  with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "axes.axisbelow": True}):
    figures = {name: draw(runs) for name, draw in drawings.items()}
    return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def draw_bits(runs: Sequence[Run]) -> Any:
  """Bits per token against training steps: training batches as lines, evaluations as points."""
  figure, (axes,) = _figure(8.0, 4.6)
  tops, lows = [], []
  for run, label, colour in _styled(runs):
    points = run.series("train/nelbo_bits_per_token")
    if points:
      steps, bits = zip(*points, strict=True)
      smooth = smoothed(bits)
      axes.plot(steps, bits, color=colour, alpha=0.2, linewidth=0.8)
      axes.plot(steps, smooth, color=colour, label=label, linewidth=1.5)
      tops.append(max(smooth[len(smooth) // 10 :]))
      lows.append(min(smooth))
    bounds = run.bounds()
    if bounds:
      steps, bits, errors = zip(*bounds, strict=True)
      style = {"color": colour, "label": None if points else label, "markersize": 5}
      axes.errorbar(
        steps, bits, [abs(error or 0.0) for error in errors], fmt="o", capsize=2, **style
      )
      tops.append(max(bits))
      lows.append(min(bits))
  if not tops:
    return None
  margin = 0.06 * (max(tops) - min(lows)) or 0.1
  axes.set_ylim(min(lows) - margin, max(tops) + margin)
  axes.set(xlabel="training step", ylabel="bits per token")
  axes.set_title("Bound: training batches (lines, smoothed) and evaluations (points)", loc="left")
  _legend(figure, axes)
  return figure


def draw_noise(runs: Sequence[Run]) -> Any:
  """Noise of the training bound, a bar per run."""
  bars = [
    (label, run.noise_bits, colour)
    for run, label, colour in _styled(runs)
    if run.noise_bits is not None
  ]
  if not bars:
    return None
  names, values, colours = zip(*bars, strict=True)
  figure, (axes,) = _figure(8.0, 1.1 + 0.28 * len(bars))
  places = range(len(bars))
  axes.barh(places, values, color=colours, height=0.65)
  axes.set_yticks(places, names)
  axes.invert_yaxis()
  axes.set_xlabel("standard deviation of one step, bits per token")
  axes.set_title("Noise of the training bound over the last half of the run", loc="left")
  return figure


def draw_calls(runs: Sequence[Run]) -> Any:
  """Every figure that an evaluator gives for several numbers of calls or steps, a panel each."""
  curves = {run.name: curves_by_calls(run) for run in runs}
  panels = sorted({key for of_run in curves.values() for key in of_run})
  if not panels:
    return None
  across = min(len(panels), _PANELS_ACROSS)
  down = -(-len(panels) // across)
  figure, grid = _figure(3.4 * across + 1, 2.9 * down + 0.6, down, across)
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  for axes, panel in zip(grid, panels, strict=False):
    for run, label, colour in _styled(runs):
      points = curves[run.name].get(panel, [])
      if points:
        calls, values, errors = zip(*points, strict=True)
        axes.errorbar(
          calls, values, errors, fmt="o-", color=colour, label=label, markersize=4, capsize=2
        )
    ticks = sorted({calls for of_run in curves.values() for calls, *_ in of_run.get(panel, [])})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("network calls or steps")
    axes.set_title(panel, loc="left")
  _legend(figure, grid[0])
  return figure


def curves_by_calls(run: Run) -> dict[str, list[tuple[int, float, float]]]:
  """(calls, value, standard error) by figure, where the newest evaluations have several calls."""
  found: dict[str, list[tuple[int, float, float]]] = {}
  for _, record in run.newest().values():
    for name in record:
      match, value = _CALLS.fullmatch(name), number(record[name])
      if match and value is not None and int(match["calls"]) and not name.endswith("_error"):
        error = number(record.get(f"{name}_standard_error")) or 0.0
        curve = f"{match['head'].rstrip('/_')} {match['tail'].strip('_')}".strip()
        found.setdefault(curve, []).append((int(match["calls"]), value, abs(error)))
  # A cross-entropy is its divergence and a constant.
  divergences = {curve for curve in found if curve.endswith("kl_nats")}
  plain = {curve.replace("kl_nats", "nats") for curve in divergences}
  return {
    curve: sorted(points)
    for curve, points in found.items()
    if len(points) > 1 and curve not in plain
  }


def smoothed(values: Sequence[float]) -> list[float]:
  """Means over a window of about a twentieth of the curve, shorter at its ends."""
  half = len(values) // 40
  window = lambda i: min(half, i, len(values) - 1 - i)
  return [statistics.fmean(values[i - window(i) : i + window(i) + 1]) for i in range(len(values))]


def _styled(runs: Sequence[Run]) -> list[tuple[Run, str, Any]]:
  import matplotlib  # pyright: ignore[reportMissingImports]

  many = matplotlib.colormaps["viridis"]
  colours = [
    f"C{i}" if len(runs) <= _COLOURS else many(i / (len(runs) - 1)) for i in range(len(runs))
  ]
  return list(zip(runs, labels(runs), colours, strict=True))


def _figure(width: float, height: float, down: int = 1, across: int = 1) -> tuple[Any, list[Any]]:
  """A figure and its axes."""
  from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

  figure = Figure(figsize=(width, height), layout="constrained")
  grid = figure.subplots(down, across, squeeze=False).ravel().tolist()
  for axes in grid:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
  return figure, grid


def _legend(figure: Any, axes: Any) -> None:
  handles, names = axes.get_legend_handles_labels()
  figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False)


def _png(figure: Any) -> bytes:
  stream = io.BytesIO()
  figure.savefig(stream, format="png", dpi=150)
  return stream.getvalue()
