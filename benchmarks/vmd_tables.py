"""VMD's synthetic tables: accuracy and exact KL of few-call decoding, by latent.

Trains every model that the cells need, three seeds each, and prints the medians beside the
published figures (riccizz.github.io/VMD). b is the number of blocks, decoded from left to right;
nfe the network calls in all. Cells of one b share a model, with codes those of all b. Tokens are
drawn at temperature 1; `argmax` takes the most probable tokens given the latent. The KL is exact
over data and orders and averaged over at least 100,000 latent draws, exact for codes and for models
without a latent.

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
  def cells(self) -> tuple[tuple[int, int], ...]:
    """Blocks and calls of the cells that it serves."""
    return tuple(
      (cell.blocks, cell.calls) for cell in CELLS if _model(cell, self.latent) == self[:2]
    )


def _model(cell: Cell, latent: str) -> tuple[str, int]:
  """Data and blocks of the model that serves a cell; codes tie whole sequences together."""
  return cell.data, 1 if latent == "categorical" else cell.blocks


def config(job: Job) -> Any:
  """The shipped config of VMD on the job's data, with its latent, blocks and seed."""
  made = synthetic.get_config(f"vmd-{job.data}")
  made.seed = job.seed
  made.objective.blocks = job.blocks
  made.evaluators = {"blocks": {"cells": job.cells}}
  made.run.then = ()
  if job.latent in ("none", "matched"):
    made.objective.samples = 1
    made.run.calibrate = 0
    made.latent.update({"none": {"name": "none"}, "matched": {"switched_off": True}}[job.latent])
  else:
    made.latent.name = job.latent
  if job.latent == "mixture":  # of fewer than half the modes
    made.latent.components = 49 if (job.data, job.blocks) == ("d2", 1) else 4
  if job.latent == "categorical":
    # On D1 some of 256 codes, which no mode had taken, kept a thousandth of the probability.
    classes = 8 if job.data == "d1" else 16
    made.latent.update({"prior": "bayes", "codes": 2, "classes": classes, "scale": 3.0})
    made.objective.update({"sum_values": False, "samples": 4, "kl_warmup_masks": "all"})
    # Until then the codes count as equally probable, or modes would come to share one.
    made.objective.update({"kl_hold": 1000, "kl_warmup": 100})
    made.run.update({"steps": 2400, "calibrate": 0})
  return made


def finish(job: Job) -> dict[str, Any]:
  """Figures of a job, see `trainings.finished`."""
  return trainings.finished(config(job), job.workdir)


def measure(
  cells: list[Cell], latents: list[str], seeds: int, folder: pathlib.Path, processes: int
) -> dict[Job, dict[str, Any]]:
  """Figures of every job that the cells need, `processes` at a time."""
  jobs = dict.fromkeys(
    Job(*_model(cell, latent), latent, seed, folder)
    for seed, latent, cell in itertools.product(range(seeds), latents, cells)
  )
  done = {}
  for job, figures in trainings.on_cores(finish, list(jobs), processes=processes):
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
    runs = [found for job, found in done.items() if job[:3] == (*_model(cell, latent), latent)]
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
