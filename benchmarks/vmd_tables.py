"""VMD's synthetic tables: accuracy and exact KL of few-call decoding, by latent.

Trains every model that the cells need, three seeds each, and prints the medians beside the
published figures (riccizz.github.io/VMD). b is the number of blocks, decoded from left to right;
nfe the network calls in all. Cells of one b share a model. Tokens are drawn at temperature 1;
`argmax` takes the most probable tokens given the latent. The KL is exact over data and orders and
averaged over at least 100,000 latent draws, exact for codes and for models without a latent.

Finished models are kept in --folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing, trainings
from configs import synthetic

LATENTS = ("none", "matched", "gaussian", "mixture", "categorical")


class Cell(NamedTuple):
  """A cell of the tables: the data, its blocks, the calls, and what was published as (%, nats)."""

  name: str
  data: str
  blocks: int
  calls: int
  mdm: tuple[float, float] | None = None
  vmd: tuple[float, float] | None = None


CELLS = (
  Cell("pairs/uniform/nfe1", "pairs", 1, 1),
  Cell("pairs/skewed/nfe1", "pairs_skewed", 1, 1),
  Cell("d1/b2/nfe4", "d1", 2, 4, (99.4, 0.007), (100.0, 0.012)),
  Cell("d1/b2/nfe2", "d1", 2, 2, (10.1, 2.298), (94.2, 0.068)),
  Cell("d1/b1/nfe4", "d1", 1, 4, (99.3, 0.010), (100.0, 0.033)),
  Cell("d1/b1/nfe1", "d1", 1, 1, (0.1, 9.422), (87.3, 0.165)),
  Cell("d2/b2/nfe4", "d2", 2, 4, (99.3, 0.018), (100.0, 0.018)),
  Cell("d2/b2/nfe2", "d2", 2, 2, (1.1, 7.656), (88.6, 0.148)),
  Cell("d2/b1/nfe4", "d2", 1, 4, (99.1, 0.015), (100.0, 0.475)),
  Cell("d2/b1/nfe1", "d2", 1, 1, (1.1, 7.493), (80.0, 0.268)),
)


class Job(NamedTuple):
  """One model to train and evaluate."""

  data: str
  blocks: int
  latent: str
  seed: int
  folder: pathlib.Path

  @property
  def workdir(self) -> pathlib.Path:
    """Where the run lives."""
    return self.folder / f"{self.data}-b{self.blocks}-{self.latent}-seed{self.seed}"

  @property
  def calls(self) -> list[int]:
    """The calls of its cells."""
    return [cell.calls for cell in CELLS if (cell.data, cell.blocks) == self[:2]]


def config(job: Job) -> Any:
  """The shipped config of VMD on the job's data, with its latent, blocks and seed."""
  made = synthetic.get_config(f"vmd-{job.data}")
  made.seed = job.seed
  made.objective.blocks = job.blocks
  made.evaluators = {"blocks": {"cells": tuple((job.blocks, calls) for calls in job.calls)}}
  made.run.then = ()
  if job.latent in ("none", "matched"):
    made.objective.samples = 1
    made.latent.update({"none": {"name": "none"}, "matched": {"switched_off": True}}[job.latent])
  else:
    made.latent.name = job.latent
  modes = 100 if (job.data, job.blocks) == ("d2", 1) else 10
  if job.latent == "mixture":
    made.latent.components = modes // 2 - 1  # fewer than half the modes
  if job.latent == "categorical":
    _with_codes(made, job, modes)
  return made


def _with_codes(made: Any, job: Job, modes: int) -> None:
  """Sets up codes of which every one is a forward pass of its own.

  Large codes drown out visible tokens; a prior that is learned at once gives codes up that modes
  could still have had to themselves.
  """
  made.latent.update({"prior": "conditional", "scale": 1.5})
  made.run.batch_size = 24
  if job.data == "d2":
    made.objective.update({"all_masked": 0.3, "kl_hold": 1500, "kl_warmup": 500})
  else:
    made.objective.update({"kl_hold": made.run.steps * 2 // 3, "kl_warmup": made.run.steps // 10})
    made.objective.all_masked = 0.6 if max(job.calls) == 1 else 0.2
  if modes == 100:
    made.latent.update({"codes": 2, "classes": 12, "scale": 3.0})
    made.objective.update({"all_masked": 0.4, "kl_hold": 2000, "kl_warmup": 1000})
    made.run.update({"batch_size": 12, "steps": 5000})


def finish(job: Job) -> dict[str, Any]:
  """Figures of a job, see `trainings.finished`."""
  return trainings.finished(config(job), job.workdir)


def measure(
  cells: list[Cell], latents: list[str], seeds: int, folder: pathlib.Path, processes: int
) -> dict[Job, dict[str, Any]]:
  """Figures of every job that the cells need, `processes` at a time."""
  models = dict.fromkeys((cell.data, cell.blocks) for cell in cells)
  jobs = [
    Job(*model, latent, seed, folder)
    for seed, latent, model in itertools.product(range(seeds), latents, models)
  ]
  done = {}
  for job, figures in trainings.on_cores(finish, jobs, processes=processes):
    done[job] = figures
    timing.say(f"{job.workdir.name}: {figures['train_cpu_seconds']:.0f} CPU seconds to train")
  return done


HEADER = (
  "cell", "latent", "accuracy %", "lowest", "argmax %", "KL", "s.e.", "published MDM",
  "published VMD", "CPU s",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  names = [cell.name for cell in CELLS]
  parser.add_argument("--cells", default=",".join(names), help="comma-separated names")
  parser.add_argument("--latents", default=",".join(LATENTS), help="comma-separated names")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/vmd_tables"))
  parser.add_argument("--processes", type=int, default=1, help="trainings at the same time")
  options = parser.parse_args(arguments)
  cells = [CELLS[names.index(name)] for name in trainings.chosen(parser, options.cells, names)]
  latents = trainings.chosen(parser, options.latents, LATENTS)
  timing.say(timing.machine())
  done = measure(cells, latents, options.seeds, options.folder, options.processes)
  rows: list[list[Any]] = []
  figures: dict[str, float] = {"cores": timing.cores(), "seeds": options.seeds}
  for cell, latent in itertools.product(cells, latents):
    runs = [
      found
      for job, found in done.items()
      if (job.data, job.blocks, job.latent) == (cell.data, cell.blocks, latent)
    ]
    each = functools.partial(_each, runs, f"blocks/b{cell.blocks}_nfe{cell.calls}_")
    accuracies = [100 * share for share in each("accuracy")]
    accuracy, kl = float(np.median(accuracies)), float(np.median(each("kl_nats")))
    argmax = 100 * float(np.median(each("accuracy_argmax")))
    error = float(max(each("kl_nats_standard_error")))
    cost = float(max(run["train_cpu_seconds"] for run in runs))
    published = ["-" if pair is None else f"{pair[0]} / {pair[1]}" for pair in (cell.mdm, cell.vmd)]
    shown = [f"{accuracy:.2f}", f"{min(accuracies):.2f}", f"{argmax:.2f}", f"{kl:.4f}"]
    rows.append([cell.name, latent, *shown, f"{error:.4f}", *published, round(cost)])
    name = f"{cell.name}/{latent}"
    figures |= {f"{name}/accuracy": accuracy, f"{name}/accuracy_argmax": argmax, f"{name}/kl": kl}
    figures |= {f"{name}/kl_standard_error": error, f"{name}/train_cpu_seconds": cost}
  timing.say("\nmedians over seeds; accuracy and KL with tokens drawn, argmax beside them")
  timing.say(timing.table(HEADER, rows))
  timing.say(
    "\nThe codes of `categorical` can hold every mode of these spaces, so it is the exact "
    "yardstick here and no evidence that codes scale."
  )
  timing.finish(figures, options.json)


def _each(runs: list[dict[str, Any]], prefix: str, name: str) -> list[float]:
  return [run[prefix + name] for run in runs]


if __name__ == "__main__":
  main()
