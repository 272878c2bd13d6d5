"""VMD on text8 beside MD4, and beside MD4 with VMD's parameters but no latent.

Each model trains for --minutes of one core's time at the size of `benchmarks.text8_baselines`.
Then, for samplers of 8, 16, 32 and 64 steps on the uniform grid: the bound on -log p of that
sampler, and its samples: the share of words that the training text has, different words over all,
and bits under 5-grams of the training text, which samples of one frequent word would have few of.
Bounds at so few steps are far above that of continuous time: the tokens of a step are drawn apart.

    python -m benchmarks.vmd_text8 --path text8.gz --minutes 8 --processes 2

Finished models are kept in --folder, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

from typing import Any

from benchmarks import text8_baselines, timing, trainings

MODELS = ("md4", "matched", "vmd")
CALLS = (8, 16, 32, 64)


def config(job: text8_baselines.Job) -> Any:
  """The config of a model, with the evaluators of its samples and its latent."""
  made = text8_baselines.config(job)
  made.sampler.grid = "uniform"
  if job.model != "md4":
    made.objective.grid = "uniform"
  use = {"latent": {}} if job.model == "vmd" else {}
  made.evaluators = {"text_samples": {"calls": CALLS, "count": 256}, **use}
  if job.model == "vmd" and job.steps is not None:
    # A short training, too, charges the divergence in full for most of its steps.
    made.objective.update({"kl_hold": job.steps // 20, "kl_warmup": job.steps // 4})
  return made


def at_steps(made: Any, calls: int) -> Any:
  """A copy that evaluates the bound of the sampler with so many steps."""
  made = made.copy_and_resolve_references()
  made.evaluators = {"likelihood": {"split": "valid", "draws": 16, "limit": 1000}}
  made.sampler.steps = calls
  if made.objective.name == "md4" or made.latent.switched_off:
    made.objective.update({"estimator": "steps", "steps": calls})
  return made


def finish(job: text8_baselines.Job) -> dict[str, Any]:
  """Figures of a job: of its samples and its latent, and T<calls>/ of its bounds."""
  made = config(job)
  bounds = {f"T{calls}/": at_steps(made, calls) for calls in CALLS}
  return trainings.finished(made, job.workdir, bounds)


HEADER = (
  "model", "T", "bits/char", "s.e.", "of it KL", "valid words %", "different %", "5-gram bits",
  "network calls",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  text8_baselines.add_options(parser)
  parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names")
  options = parser.parse_args(arguments)
  models = trainings.chosen(parser, options.models, MODELS)
  timing.say(timing.machine())
  jobs = text8_baselines.planned(options, models, seeds=1)
  rows: list[list[Any]] = []
  found: dict[str, float] = {"minutes": options.minutes}
  text: list[str] = []
  for job, figures in trainings.on_cores(finish, jobs, processes=options.processes):
    timing.say(f"{job.model}: {figures['steps']} steps, {figures['parameters']:,} parameters")
    for calls in CALLS:
      key = f"T{calls}/valid/nelbo_bits_per_character"
      kl = figures.get(f"T{calls}/valid/part_kl_bits_per_token")
      bound = (f"{figures[key]:.3f}", f"{figures[f'{key}_standard_error']:.3f}")
      shown = (*bound, "-" if kl is None else f"{kl:.4f}", *_words(figures, f"T{calls}"))
      rows.append([job.model, calls, *shown, f"{figures[f'T{calls}/network_calls_mean']:.1f}"])
    text = _words(figures, "valid")
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    found |= {f"{job.model}/{name}": value for name, value in numbers.items()}
  rows.append(["validation text", "-", "-", "-", "-", *text, "-"])
  timing.say("\nbounds on 1000 pieces of the validation part, 16 draws each; 256 samples")
  timing.say(timing.table(HEADER, rows))
  timing.finish(found, options.json)


def _words(figures: dict[str, Any], name: str) -> list[str]:
  """The cells about words and n-grams."""
  shares = [f"{100 * figures[f'{name}/{share}_words']:.1f}" for share in ("valid", "different")]
  return [*shares, f"{figures[f'{name}/ngram_bits_per_character']:.3f}"]


if __name__ == "__main__":
  main()
