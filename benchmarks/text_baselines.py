"""Small models of text in GPT-2's tokens at equal compute, and their zero-shot perplexities.

configs/owt.py:small, its data prepared by md4vmd.data.prepare_text. Each model trains for --minutes
of one core's time; how many steps that is is measured first, for all models in turns. Then the
bound on the held-out documents, and on every set in both conventions of packing. AR's figures are
exact, VMD's are of the sampler with 64 steps.

    python -m benchmarks.text_baselines --data data/text --minutes 6 \\
      --sets wikitext2=wiki.valid.tokens.gz,lambada_tokenized=lambada_development_plain_text.txt.gz

Finished models are kept in --folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import pathlib
from typing import Any, NamedTuple

from benchmarks import timing, trainings
from configs import owt

_SEES_TIME = {"network.time_conditioning": True, "network.condition_width": 64}
MODELS: dict[str, dict[str, Any]] = {
  "ar": {"objective.name": "ar", "objective.estimator": None},
  "md4": {},
  "genmd4": _SEES_TIME | {"objective.name": "genmd4", "sampler.name": "token_ancestral"},
  "vmd": {
    "objective.estimator": None,
    "network.condition_width": 64,
    "network.open_gates": True,
    "latent.name": "gaussian",
    "latent.width": 32,
    "latent.reader_depth": 1,
    "objective.name": "vmd",
    "objective.form": "step",
    "objective.grid": "cosine",  # the sampler's
    "objective.step_counts": (8, 16, 32, 64),
    "objective.kl_warmup": 50,
  },
}


class Job(NamedTuple):
  """One model to train and evaluate."""

  model: str
  minutes: float
  data: str
  length: int
  sets: tuple[str, ...]
  limit: int
  draws: int
  folder: pathlib.Path
  steps: int | None = None

  @property
  def workdir(self) -> pathlib.Path:
    """Where the run lives."""
    return self.folder / f"{self.model}-{self.minutes:g}min"


def config(job: Job) -> Any:
  """The shipped small config as the model needs it."""
  made = owt.get_config("small")
  made.update_from_flattened_dict(MODELS[job.model])
  made.data.update({"path": job.data, "length": job.length})
  made.optimizer.warmup_steps = 20
  made.run.update({"batch_size": 8, "then": (), "log_every": 20})
  if job.steps is not None:
    made.run.update({"steps": job.steps, "checkpoint_every": max(1, job.steps // 8)})
  # AR's likelihood is exact; a draw of VMD's bound is one of its sampler's 64 steps.
  draws = {"ar": 1, "vmd": 16 * job.draws}.get(job.model, job.draws)
  scored = {"draws": draws, "limit": job.limit}
  made.evaluators.likelihood.update(scored)
  made.evaluators.zero_shot.update(scored | {"sets": job.sets})
  return made


def finish(job: Job) -> dict[str, Any]:
  """Figures of a job, see `trainings.finished`."""
  return trainings.finished(config(job), job.workdir)


HEADER = ("model", "text", "perplexity", "+-", "bits/token", "ppl/word", "scored", "dropped")


def _row(model: str, prefix: str, figures: dict[str, Any]) -> list[Any]:
  get = lambda name: figures.get(f"{prefix}/{name}", "-")
  perplexity = math.exp(get("nelbo_nats_per_token"))
  return [
    model,
    prefix,
    f"{perplexity:.1f}",
    f"{perplexity * get('nelbo_nats_per_token_standard_error'):.1f}",
    f"{get('nelbo_bits_per_token'):.3f}",
    get("perplexity_per_word"),
    get("tokens"),
    get("tokens_dropped"),
  ]


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--data", required=True, help="folder of prepared text")
  parser.add_argument("--length", type=int, default=128, help="tokens that it was cut into")
  parser.add_argument("--sets", default="", help="name=path of zero-shot sets, with commas between")
  parser.add_argument("--minutes", type=float, default=6.0, help="of one core, per model")
  parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names")
  parser.add_argument("--limit", type=int, default=300, help="chunks of each set that are scored")
  parser.add_argument("--draws", type=int, default=2, help="per chunk; VMD takes 16 times as many")
  parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/text_baselines"))
  parser.add_argument("--processes", type=int, default=1, help="trainings at the same time")
  options = parser.parse_args(arguments)
  models = trainings.chosen(parser, options.models, list(MODELS))
  timing.say(timing.machine())
  sets = tuple(filter(None, options.sets.split(",")))
  place = (options.data, options.length, sets, options.limit, options.draws, options.folder)
  configs = {model: config(Job(model, options.minutes, *place)) for model in models}
  steps_of = trainings.steps_in(options.minutes, configs, options.folder)
  jobs = [Job(model, options.minutes, *place, steps_of[model]) for model in models]
  rows: list[list[Any]] = []
  costs: list[list[Any]] = []
  found: dict[str, float] = {"minutes": options.minutes}
  for job, figures in trainings.on_cores(finish, jobs, processes=options.processes):
    suffix = "/nelbo_nats_per_token"
    prefixes = [key.removesuffix(suffix) for key in figures if key.endswith(suffix)]
    rows += [_row(job.model, prefix, figures) for prefix in prefixes]
    found |= {f"{job.model}/{prefix}{suffix}": figures[prefix + suffix] for prefix in prefixes}
    accuracy = next((figures[key] for key in figures if key.endswith("last_word_accuracy")), "-")
    cost = [figures[key] for key in ("parameters", "steps", "train_cpu_seconds")]
    costs.append([job.model, accuracy, *map(round, cost)])
    timing.say(f"{job.workdir.name}: done")
  rows.sort(key=lambda row: row[1])
  timing.say("\nperplexities; those of ar are exact, the others bounds")
  timing.say(timing.table(HEADER, rows))
  timing.say("\n" + timing.table(("model", "last word", "parameters", "steps", "CPU s"), costs))
  timing.finish(found, options.json)


if __name__ == "__main__":
  main()
