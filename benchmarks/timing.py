"""Interleaved timing of several variants, tables for people, one flat JSON object for programs."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def interleave(
  functions: Mapping[str, Callable[[], Any]],
  *,
  rounds: int,
  warmups: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
  """Seconds of every call of every function, `rounds` each.

  A round calls every function once and the order rotates from round to round, so that a machine
  that slows down does so for all. Each call ends when the arrays that it returns are ready.

  Args:
    functions: name -> function of no arguments that returns arrays; compiled already, or compiled
      in its first warm-up.
    rounds: calls of each function that count.
    warmups: calls of each function before the clock runs.
    clock: seconds so far; `time.process_time` counts this process alone.
  """
  names = list(functions)
  for _ in range(warmups):
    for name in names:
      jax.block_until_ready(functions[name]())
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for i in range(rounds):
    first = i % len(names)
    for name in names[first:] + names[:first]:
      start = clock()
      jax.block_until_ready(functions[name]())
      seconds[name].append(clock() - start)
  return {name: np.array(values) for name, values in seconds.items()}


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
  """Median over the rounds of the ratio of two times of one round."""
  return float(np.median(numerator / denominator))


def machine() -> str:
  """The hardware, the cores that this process may use, versions and the date, on one line."""
  device = jax.devices()[0]
  return (
    f"{_processor()}, {cores()} cores in use, device {device.device_kind} x {jax.device_count()}, "
    f"jax {jax.__version__}, python {platform.python_version()}, {datetime.date.today()}"
  )


def cores() -> int:
  """Cores that this process may run on."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _processor() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Aligned text: the first column to the left, the others to the right; floats get 3 digits."""
  text = [list(header), *([_cell(value) for value in row] for row in rows)]
  widths = [max(len(row[i]) for row in text) for i in range(len(header))]

  def line(row):
    first, *others = (
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others])

  return "\n".join(
    [line(text[0]), "  ".join("-" * width for width in widths), *map(line, text[1:])]
  )


def _cell(value):
  return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else _whole(value)


def _whole(value):
  return f"{value:,.0f}" if isinstance(value, float) else str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
  """The command line that all benchmarks share."""
  made = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("--json", type=pathlib.Path, metavar="OUT", help="write the figures to OUT")
  return made


def finish(figures: Mapping[str, float], out: pathlib.Path | None) -> None:
  """Prints the figures as one line of JSON; writes them to `out`, if given, whole or not at all.

  Raises:
    ValueError: a figure is not a finite number.
  """
  for name, value in figures.items():
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
      raise ValueError(f"figure {name} is {value!r}; it must be a finite number")
  say(json.dumps(dict(figures)))
  if out is None:
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  partial = out.with_name(out.name + ".partial")
  partial.write_text(json.dumps(dict(figures), indent=2) + "\n", encoding="utf-8")
  partial.replace(out)
  say(f"wrote {out}")


def say(text: str) -> None:
  """Prints at once, so that a long benchmark shows where it is."""
  print(text, flush=True, file=sys.stdout)
