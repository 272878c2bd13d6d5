"""The evaluation job: every configured evaluator on a checkpoint, one JSON file each."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from md4vmd import build, evaluators, partitioning, provenance, train_state
from md4vmd.interfaces import Evaluator
from md4vmd.writers import Writers, say


def evaluate(
  config: build.Config, workdir: pathlib.Path, step: train_state.Step = "latest"
) -> None:
  """Evaluates the averaged parameters of a checkpoint of the workdir, the newest by default.

  Writes eval/<step>-<evaluator>.json: the figures, and what they were measured on.

  Raises:
    FileNotFoundError: the workdir has no such checkpoint.
  """
  model = build.model(config)
  with partitioning.use(model.mesh):
    made = make_evaluators(model)
    restored = train_state.load_average(model, workdir, step)
    writers = Writers(workdir, active=jax.process_index() == 0)
    hash_then = restored.meta["config_hash"]
    params = restored.state["ema"]
    run_all(made, model, writers, restored.step, params, trained_config_hash=hash_then)
    writers.close()


def make_evaluators(model: build.Model) -> dict[str, Evaluator]:
  """The evaluators that the config asks for."""
  return build.evaluators(model, evaluators.TABLE)


def run_all(
  made: Mapping[str, Evaluator],
  model: build.Model,
  writers: Writers,
  step: int,
  params: Any,
  **about: Any,
) -> dict[str, float]:
  """Runs evaluators on one set of parameters, writes one JSON file each and shows the figures.

  Returns:
    All numbers, as evaluator/figure, for a training log.
  """
  numbers = {}
  for name, evaluator in made.items():
    figures = dict(evaluator.run(step, params))
    picture = figures.pop("picture", None)
    record = {
      "checkpoint": provenance.source(writers.workdir, step, model.run.initial),
      "step": step,
      "evaluator": name,
      "config_hash": model.config_hash,
      "seed": model.seed,
      "parameters": train_state.count_parameters(params),
      "jax": jax.__version__,
      **about,
      **figures,
    }
    path = writers.write_evaluation(step, name, record)
    say(f"\n{name} at step {step} ({figures.get('convention', '')}), written to {path}")
    if picture is not None and jax.process_index() == 0:
      picture.save(path.with_suffix(".png"))
    for key, value in figures.items():
      if isinstance(value, int | float):
        numbers[f"{name}/{key}"] = value
        say(f"  {key:<50} {value:,.6g}")
      elif key != "convention":
        say(f"  {key}: {value}")
  return numbers
