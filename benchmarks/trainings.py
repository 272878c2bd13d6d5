"""Trainings of a results table: several at a time, a core each, and none of them twice."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import timing
from md4vmd import build, data, evaluate, partitioning, train, train_state


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


def steps_in(minutes: float, configs: Mapping[str, Any], folder: pathlib.Path) -> dict[str, int]:
  """How many training steps of each model fit into so many minutes of one core.

  They are measured in turns, so that a busy machine slows all models alike, and kept in the folder;
  only those that are not there are measured.
  """
  plan = folder / f"steps-{minutes:g}min.json"
  steps_of = json.loads(plan.read_text()) if plan.exists() else {}
  new = {name: made for name, made in configs.items() if name not in steps_of}
  for _, seconds in on_cores(seconds_per_step, [new] if new else [], processes=1):
    steps_of |= {name: round(60 * minutes / each) for name, each in seconds.items()}
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps(steps_of))
  return steps_of


def seconds_per_step(configs: Mapping[str, Any], steps_at_once: int = 10) -> dict[str, float]:
  """CPU seconds of a training step of every config's model, measured in turns."""

  def stepper(made: Any) -> Callable[[], Any]:
    model = build.model(made)
    examples = model.dataset.split(model.dataset.train_split)
    arrays = next(data.evaluation_batches(examples, batch_size=model.run.batch_size))
    with partitioning.use(model.mesh):
      state, batch = train_state.initial(model), partitioning.put_batch(model.mesh, arrays)
      compiled = train.compiled_step(model).lower(state, batch).compile()

    def take() -> Any:
      nonlocal state
      for _ in range(steps_at_once):
        state, sums = compiled(state, batch)
      return sums

    return take

  functions = {name: stepper(made) for name, made in configs.items()}
  seconds = timing.interleave(functions, rounds=5, clock=time.process_time)
  return {name: float(np.median(each)) / steps_at_once for name, each in seconds.items()}


def finished(
  made: Any, workdir: pathlib.Path, others: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Figures of a config's trained model, by all its evaluators: those on disk, or new ones.

  A training that was stopped goes on where it was; its prints are in workdir/log.txt. CPU seconds
  are those of this process, so they lack what a stopped one had used.

  Args:
    made: the config.
    workdir: of the run.
    others: configs of the same network that evaluate it once more; their names are put before the
      names of their figures.
  """
  result = workdir / "result.json"
  if result.exists():
    return json.loads(result.read_text())
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "log.txt", "a") as log, contextlib.redirect_stdout(log):
    start = time.process_time()
    train.train(made, workdir)
    trained = time.process_time()
    figures: dict[str, Any] = {}
    for prefix, judge in {"": made, **(others or {})}.items():
      evaluate.evaluate(judge, workdir)
      for name in judge.evaluators:
        record = json.loads((workdir / "eval" / f"{made.run.steps}-{name}.json").read_text())
        figures |= {prefix + key: value for key, value in record.items()}
  figures |= {
    "steps": made.run.steps,
    "train_cpu_seconds": trained - start,
    "evaluate_cpu_seconds": time.process_time() - trained,
  }
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
