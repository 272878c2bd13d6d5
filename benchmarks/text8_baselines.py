"""Small models of text8 at equal compute: every objective, the same network, data and time.

Each model trains for --minutes of one core's time. How many steps that is is measured first, for
all models in turns, so that the learning rate falls to the end; every seed takes as many. 2 layers
x 128, 64 characters, batch 64. Then its bound on the validation part, in bits per character with
the standard error over examples; over seeds, the mean with the spread. The published
order at full size is AR < block 4 < block 8 < block 16 < GenMD4 <= MD4 < SEDD < D3PM.

    python -m benchmarks.text8_baselines --path text8.gz --minutes 8 --seeds 3 --processes 2

Finished models are kept in --folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing, trainings
from configs import text8

_SEES_TIME = {"network.time_conditioning": True, "network.condition_width": 64}
_INTEGRAL = _SEES_TIME | {"objective.estimator": "time"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  "ar": ("ar", {}),
  "block4": ("block4", {}),
  "block8": ("block8", {}),
  "block16": ("block16", {}),
  "genmd4": ("genmd4", {}),
  "md4": ("small", {"objective.estimator": "count"}),
  "md4_tilted": ("small", {"objective.estimator": "tilted"}),
  "md4_linear": ("small", _INTEGRAL),
  "md4_cosine": ("small", _INTEGRAL | {"schedule.name": "cosine"}),
  "md4_poly": ("small", _INTEGRAL | {"schedule.name": "poly", "schedule.power": 2.0}),
  "sedd": ("sedd", {}),
  "d3pm": ("d3pm", {}),
}
# For `benchmarks.vmd_text8`.
WITH_LATENT: dict[str, tuple[str, dict[str, Any]]] = {
  "vmd": ("vmd", {}),
  # `global` without a latent is MD4.
  "matched": ("vmd", {"latent.switched_off": True, "objective.form": "global"}),
}
ABOUT = {
  "md4": "count, does not see t",
  "md4_tilted": "tilted, does not see t",
  "md4_linear": "time, sees t",
  "md4_cosine": "time, sees t",
  "md4_poly": "time, w = 2, sees t",
  "genmd4": "w from 1, two masked sets",
  "sedd": "count, does not see t",
  "d3pm": "T = 1000, auxiliary .01, sees t",
}


class Job(NamedTuple):
  """One model to train and evaluate; no steps where their number is not measured yet."""

  model: str
  seed: int
  minutes: float
  path: str
  valid_path: str | None
  folder: pathlib.Path
  steps: int | None = None

  @property
  def workdir(self) -> pathlib.Path:
    """Where the run lives."""
    return self.folder / f"{self.model}-{self.minutes:g}min-seed{self.seed}"


def config(job: Job) -> Any:
  """The shipped config of the model's variant at the benchmark's size."""
  variant, changes = (MODELS | WITH_LATENT)[job.model]
  made = text8.get_config(variant)
  made.seed = job.seed
  made.data.update({"path": job.path, "valid_path": job.valid_path, "length": 64})
  made.network.update({"width": 128, "depth": 2, "heads": 2})
  made.optimizer.warmup_steps = 50
  made.run.update({"batch_size": 64, "then": (), "log_every": 200})
  made.evaluators = {"likelihood": {"split": "valid", "draws": 4, "limit": 2000}}
  for key, value in changes.items():
    section, name = key.split(".")
    made[section][name] = value
  if job.steps is not None:
    made.run.update({"steps": job.steps, "checkpoint_every": max(1, job.steps // 8)})
  return made


def add_options(parser: argparse.ArgumentParser) -> None:
  """The options that say which trainings are meant."""
  parser.add_argument("--path", required=True, help="text8, or the training part of it")
  parser.add_argument("--valid-path", help="its validation part, where it is a file of its own")
  parser.add_argument("--minutes", type=float, default=8.0, help="of one core, per model and seed")
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/text8_baselines"))
  parser.add_argument("--processes", type=int, default=1, help="trainings at the same time")


def planned(options: argparse.Namespace, models: Sequence[str], seeds: int) -> list[Job]:
  """A job per seed and model, with the steps that fit into the minutes."""
  place = (options.minutes, options.path, options.valid_path, options.folder)
  configs = {model: config(Job(model, 0, *place)) for model in models}
  steps_of = trainings.steps_in(options.minutes, configs, options.folder)
  return [
    Job(model, seed, *place, steps_of[model])
    for seed, model in itertools.product(range(seeds), models)
  ]


def finish(job: Job) -> dict[str, Any]:
  """Figures of a job, see `trainings.finished`."""
  return trainings.finished(config(job), job.workdir)


HEADER = ("model", "bits/char", "s.e.", "over seeds", "steps", "CPU s", "note")


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  add_options(parser)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names")
  options = parser.parse_args(arguments)
  models = trainings.chosen(parser, options.models, list(MODELS))
  timing.say(timing.machine())
  jobs = planned(options, models, options.seeds)
  done: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
  for job, figures in trainings.on_cores(finish, jobs, processes=options.processes):
    done[job.model].append(figures)
    timing.say(f"{job.workdir.name}: {_bits(figures):.3f} bits per character")
  rows: list[list[Any]] = []
  found: dict[str, float] = {"minutes": options.minutes, "seeds": options.seeds}
  for model, runs in done.items():
    bits = [_bits(run) for run in runs]
    error = float(np.mean([run[f"{_KEY}_standard_error"] for run in runs]))
    spread = f"{np.std(bits, ddof=1):.3f}" if len(bits) > 1 else "-"
    steps_taken, cost = (
      float(np.mean([run[k] for run in runs])) for k in ("steps", "train_cpu_seconds")
    )
    shown = (f"{np.mean(bits):.3f}", f"{error:.3f}", spread, round(steps_taken), round(cost))
    rows.append([model, *shown, ABOUT.get(model, "")])
    found |= {
      f"{model}/bits_per_character": float(np.mean(bits)),
      f"{model}/bits_per_character_standard_error": error,
      f"{model}/steps": steps_taken,
    }
  timing.say("\nbounds on the validation part; that of ar is exact")
  timing.say(timing.table(HEADER, rows))
  timing.finish(found, options.json)


_KEY = "valid/nelbo_bits_per_character"


def _bits(figures: dict[str, Any]) -> float:
  return figures[_KEY]


if __name__ == "__main__":
  main()
