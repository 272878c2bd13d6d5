"""VMD on Sudoku 4x4, beside the plain model and the one with VMD's parameters but no latent.

Two sets of puzzles: `several`, three clues and all their solutions, where cells of one call depend
on each other; and `one`, six clues and one solution, where a latent can carry nothing. Share of
valid completions by network calls, cells filled in the order of top_prob, the most probable digits
given the latent: medians over the seeds. `coverage`: a puzzle is filled as often as it has
solutions; different ones found over all there are, beside that of draws from the data.

    python -m benchmarks.vmd_sudoku --seeds 3 --processes 2

Finished models are kept in --folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing, trainings
from configs import sudoku

PUZZLES: dict[str, dict[str, Any]] = {
  "several": {"clues_min": 3, "clues_max": 3, "unique": False},
  "one": {"clues_min": 6, "clues_max": 6, "unique": True},
}
MODELS: dict[str, dict[str, Any]] = {
  "plain": {"name": "none"},
  "matched": {"switched_off": True},
  "vmd": {},
}
CALLS = (1, 2, 5)


class Job(NamedTuple):
  """One model to train and evaluate."""

  puzzles: str
  model: str
  seed: int
  folder: pathlib.Path

  @property
  def workdir(self) -> pathlib.Path:
    """Where the run lives."""
    return self.folder / f"{self.puzzles}-{self.model}-seed{self.seed}"


def config(job: Job) -> Any:
  """The shipped config of VMD on the puzzles, with the model's latent."""
  made = sudoku.get_config("vmd")
  made.seed = job.seed
  made.data.update(PUZZLES[job.puzzles])
  made.latent.update(MODELS[job.model])
  made.evaluators = {
    "sudoku": {"splits": ("valid",), "orders": ("top_prob",), "calls": CALLS, "limit": None}
  }
  made.run.then = ()
  return made


def finish(job: Job) -> dict[str, Any]:
  """Figures of a job, see `trainings.finished`."""
  return trainings.finished(config(job), job.workdir)


HEADER = (
  "puzzles", "model", *(f"nfe {calls}, %" for calls in CALLS), "each", "coverage, %", "exact, %",
  "CPU min",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--puzzles", default=",".join(PUZZLES), help="comma-separated names")
  parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/vmd_sudoku"))
  parser.add_argument("--processes", type=int, default=1, help="trainings at the same time")
  options = parser.parse_args(arguments)
  puzzles = trainings.chosen(parser, options.puzzles, list(PUZZLES))
  models = trainings.chosen(parser, options.models, list(MODELS))
  timing.say(timing.machine())
  jobs = [
    Job(name, model, seed, options.folder)
    for seed, name, model in itertools.product(range(options.seeds), puzzles, models)
  ]
  done: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for job, figures in trainings.on_cores(finish, jobs, processes=options.processes):
    done.setdefault((job.puzzles, job.model), []).append(figures)
    timing.say(f"{job.workdir.name}: {figures['train_cpu_seconds']:.0f} CPU seconds to train")
  rows: list[list[str]] = []
  found: dict[str, float] = {"cores": timing.cores(), "seeds": options.seeds}
  for name, runs in done.items():
    row, figures = _summary(runs)
    rows.append([*name, *row])
    found |= {"/".join((*name, figure)): value for figure, value in figures.items()}
  timing.say("\nvalid completions of the puzzles that training does not show, medians over seeds")
  timing.say(timing.table(HEADER, rows))
  timing.finish(found, options.json)


def _summary(runs: list[dict[str, Any]]) -> tuple[list[str], dict[str, float]]:
  """The cells of a row, and its figures by name: percentages, medians over the seeds."""
  percent = lambda name: [100 * run[f"valid/{name}"] for run in runs]
  solved = [percent(f"solved_top_prob_nfe{calls}") for calls in CALLS]
  figures = {
    f"nfe{calls}/solved": float(np.median(each)) for calls, each in zip(CALLS, solved, strict=True)
  }
  row = [f"{value:.1f}" for value in figures.values()]
  row.append(
    " ".join("/".join(f"{share:.1f}" for share in run) for run in zip(*solved, strict=True))
  )
  if "valid/coverage_exact" in runs[0]:
    coverage = {
      f"nfe{CALLS[-1]}/coverage": percent(f"coverage_top_prob_nfe{CALLS[-1]}"),
      "coverage_exact": percent("coverage_exact"),
    }
    figures |= {name: float(np.median(each)) for name, each in coverage.items()}
    row += [f"{figures[name]:.1f}" for name in coverage]
  else:
    row += ["-", "-"]
  minutes = max(run["train_cpu_seconds"] for run in runs) / 60
  return [*row, f"{minutes:.1f}"], figures | {"train_cpu_minutes": minutes}


if __name__ == "__main__":
  main()
