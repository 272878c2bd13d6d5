"""Trainings of a results table: several at a time, a core each, and none of them twice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import timing


def on_cores(
  function: Callable[[Any], Any], jobs: Sequence[Any], *, processes: int
) -> Iterator[tuple[Any, Any]]:
  """(job, function(job)) in order, `processes` at a time; each of several keeps to one core."""
  context = multiprocessing.get_context("spawn")
  cores = context.Queue()
  for i in range(processes):
    cores.put(sorted(os.sched_getaffinity(0))[i % timing.cores()] if processes > 1 else None)
  with concurrent.futures.ProcessPoolExecutor(
    processes, mp_context=context, initializer=_stay_on_core, initargs=(cores,)
  ) as pool:
    yield from zip(jobs, pool.map(function, jobs), strict=True)


def _stay_on_core(cores: Any) -> None:
  """Keeps a process of several on a core of its own, before jax counts the cores."""
  core = cores.get()
  if core is not None:
    os.sched_setaffinity(0, {core})


def kept(workdir: pathlib.Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """Figures in workdir/result.json; where there are none, those of `compute`, its prints logged."""
  result = workdir / "result.json"
  if result.exists():
    return json.loads(result.read_text())
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "log.txt", "a") as log, contextlib.redirect_stdout(log):
    figures = compute()
  partial = result.with_suffix(".partial")
  partial.write_text(json.dumps(figures))
  os.replace(partial, result)
  return figures


def chosen(parser: Any, asked: str, known: Sequence[str]) -> list[str]:
  """The comma-separated names of an option; one that is not known ends the command."""
  for name in asked.split(","):
    if name not in known:
      parser.error(f"there is no '{name}'; known: {', '.join(known)}")
  return asked.split(",")
