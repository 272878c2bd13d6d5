"""From config sections to objects. No other module reads settings out of a ConfigDict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from md4vmd import (
  config_record,
  data,
  latents,
  networks,
  objectives,
  partitioning,
  samplers,
  schedules,
  sections,
)
from md4vmd.config_record import Config
from md4vmd.interfaces import Objective, SamplerStep, Schedule
from md4vmd.optim import Optimizer

SECTIONS = (
  "data",
  "schedule",
  "network",
  "latent",
  "objective",
  "sampler",
  "optimizer",
  "mesh",
  "run",
  "evaluators",
)
_COUNTS = ("calls", "cells", "count", "draws", "limit", "order", "paths", "steps")  # of evaluators
_READER_KEYS = ("reader_depth", "reader_width", "reader_heads")


@dataclasses.dataclass(frozen=True)
class Run:
  """How long a run is and what it writes when.

  Attributes:
    steps: training steps.
    batch_size: examples of the global batch, in training and evaluation.
    microbatches: slices of a batch that are processed one after another.
    log_every: steps between lines of metrics.
    checkpoint_every: steps between checkpoints.
    evaluate_every: steps between evaluations in training; 0 for none.
    keep: checkpoints kept, the newest.
    keep_every: checkpoints at multiples of it are kept too; None for no others.
    best: a figure of the evaluations in training, such as
      likelihood/valid/nelbo_bits_per_token, whose best step is kept too; "" for none.
    best_is: what the best value of it is, "smallest" or "largest".
    initial: a safetensors file of --mode=export to start from; "" for random parameters.
    calibrate: draws of a latent by which the temperature of the averaged parameters is fitted at
      the end, see `calibration`; 0 for no fit. A run that goes on after it averages on from there.
    then: jobs that follow a finished training, of "evaluate" and "sample".
    evaluators: those of config.evaluators that run; empty for all.
  """

  steps: int
  batch_size: int
  microbatches: int = 1
  log_every: int = 50
  checkpoint_every: int = 1000
  evaluate_every: int = 0
  keep: int = 2
  keep_every: int | None = None
  best: str = ""
  best_is: str = "smallest"
  initial: str = ""
  calibrate: int = 0
  then: tuple[str, ...] = ()
  evaluators: tuple[str, ...] = ()

  def __post_init__(self):
    for key, value in dataclasses.asdict(self).items():
      least = int(key not in ("evaluate_every", "calibrate"))
      if isinstance(value, int) and value < least:
        raise ValueError(f"run.{key} is {value}; it must be at least {least}")
    if self.batch_size % self.microbatches:
      raise ValueError(
        f"run.batch_size {self.batch_size} is not a multiple of "
        f"run.microbatches {self.microbatches}"
      )
    if self.best_is not in ("smallest", "largest"):
      raise ValueError(f"run.best_is is '{self.best_is}'; it must be 'smallest' or 'largest'")
    if self.best and not self.evaluate_every:
      raise ValueError(
        f"run.best is '{self.best}', a figure of evaluations in training; set run.evaluate_every"
      )
    for job in self.then:
      if job not in ("evaluate", "sample"):
        raise ValueError(f"run.then names '{job}'; it may name 'evaluate' and 'sample'")


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How samples are made.

  Attributes:
    step: the rule of unmasking.
    times: the grid of times.
    grid: its name.
    count: number of samples; with a prompt, of each prompt.
    prompt: text with `[MASK:n]` where n tokens are to be filled, or a board; "" for none.
    prompts_file: jsonl of {"prompt": ...}; "" for none.
    split: where the clues come from, for data that has clues, and the images that are in-painted.
    inpaint: the region of images that is filled, "left", "right", "top", "bottom" or "center"; ""
      for whole images.
    labels: classes of the samples of class-conditional models, in turn; empty for all in turn, or
      those of the images that are in-painted.
    latent_refresh: when a latent is drawn, "once", in every "block" or at every "step".
    length: tokens of a sample.
  """

  step: SamplerStep
  times: jax.Array
  grid: str
  count: int
  prompt: str
  prompts_file: str
  split: str
  inpaint: str
  labels: tuple[int, ...]
  latent_refresh: str
  length: int


@dataclasses.dataclass(frozen=True)
class Model:
  """Everything that a job works with, built from one config."""

  dataset: data.Dataset
  schedule: Schedule
  network: nn.Module
  objective: Objective
  optimizer: Optimizer
  sampling: Sampling
  run: Run
  mesh: Mesh
  seed: int
  evaluators: dict[str, dict[str, Any]]
  config: dict[str, Any]
  config_hash: str

  def filling(self, **changes: Any) -> dict[str, Any]:
    """The settings of `steps.sample_step` that config.sampler gives, but for the changes."""
    return {
      "network": self.network,
      "schedule": self.schedule,
      "sampler": self.sampling.step,
      "times": self.sampling.times,
      "vocab_size": self.dataset.vocab_size,
      "latent_refresh": self.sampling.latent_refresh,
    } | changes


def model(
  config: Config, *, stand_in: data.Dataset | None = None, devices: Sequence[Any] | None = None
) -> Model:
  """Builds all sections of a config.

  Args:
    config: the sections.
    stand_in: takes the place of what config.data describes, which is then not read.
    devices: those of the mesh, for programs that are compiled for another machine; None for all
      that this run has.

  Raises:
    ValueError: a section, name, key or value that means nothing, with the nearest one that does.
  """
  for key in config:
    if key not in (*SECTIONS, "seed"):
      raise ValueError(f"config has no section '{key}'{sections.nearest(key, SECTIONS)}")
  if not 0 <= config.seed < 2**32:
    raise ValueError(f"config.seed is {config.seed}; it must be in [0, 2**32)")
  dataset: data.Dataset = stand_in or sections.from_table(data.TABLE, config.data, "data")
  schedule = sections.from_table(schedules.TABLE, config.schedule, "schedule")
  vocab_size = dataset.vocab_size
  run = sections.call(Run, sections.given(config.run), "run")
  mesh = sections.call(partitioning.make_mesh, sections.given(config.mesh), "mesh", devices=devices)
  partitioning.check_batch(mesh, run.batch_size // run.microbatches)
  partitioning.check_length(mesh, dataset.length)
  objective = sections.from_table(
    objectives.TABLE, config.objective, "objective", schedule=schedule, vocab_size=vocab_size
  )
  network = _network(config, dataset, objective)
  defaults = {"latent_refresh": objective.latent_refresh, "length": dataset.length}
  sampling = sections.call(_sampling, defaults | sections.given(config.sampler), "sampler")
  _check_length(dataset.length, sampling.length, network)
  unfit = "once" if sees(network) == "blocks" else "block"
  if isinstance(network, networks.LatentNetwork) and sampling.latent_refresh == unfit:
    raise ValueError(
      f"sampler.latent_refresh is '{unfit}'; with objective.block_size every block has a latent of "
      "its own and it may be 'block' or 'step', without one it may be 'once' or 'step'"
    )
  if sampling.step.is_by_token != isinstance(network, networks.TokenPowerNetwork):
    raise ValueError(
      f"objective '{config.objective.name}' and sampler '{config.sampler.name}' do not fit: "
      "'genmd4' is sampled by 'token_ancestral', and nothing else is"
    )
  return Model(
    dataset=dataset,
    schedule=schedule,
    network=network,
    objective=objective,
    optimizer=sections.call(
      Optimizer, sections.given(config.optimizer), "optimizer", steps=run.steps
    ),
    sampling=sampling,
    run=run,
    mesh=mesh,
    seed=config.seed,
    evaluators=_evaluators(config, run),
    config=config_record.plain(config),
    config_hash=config_record.config_hash(config),
  )


def _evaluators(config: Config, run: Run) -> dict[str, dict[str, Any]]:
  """Settings of the evaluators that run, by name."""
  for name in run.evaluators:
    if name not in config.evaluators:
      raise ValueError(f"run.evaluators names '{name}'{sections.nearest(name, config.evaluators)}")
  chosen = run.evaluators or tuple(config.evaluators)
  return {name: sections.given(config.evaluators[name]) for name in chosen}


def _network(config: Config, dataset: data.Dataset, objective: Objective) -> nn.Module:
  """The network, with its latent if there is one; the objective says what its tokens see."""
  attends = getattr(objective, "attends", "all")
  network = sections.from_table(
    networks.TABLE,
    config.network,
    "network",
    vocab_size=dataset.vocab_size,
    image_shape=dataset.image_shape,
    classes=dataset.classes,
    attends=attends,
    block_size=getattr(objective, "block_size", None),
  )
  if sees(network) != attends:
    raise ValueError(
      f"objective '{config.objective.name}' needs tokens that see '{attends}' and network "
      f"'{config.network.name}' cannot do that; set network.name=transformer"
    )
  if getattr(network, "classes", 0) != dataset.classes:
    raise ValueError(
      f"network '{config.network.name}' takes no labels and the data has {dataset.classes} "
      "classes; set data.class_conditional=False"
    )
  if attends == "left" and network.time_conditioning:
    raise ValueError(
      f"objective '{config.objective.name}' has no time; set network.time_conditioning=False"
    )
  if config.latent.name != "none" and not isinstance(objective, objectives.VMD):
    raise ValueError(
      f"objective '{config.objective.name}' trains no latent and latent.name is "
      f"'{config.latent.name}'; set latent.name=none, or objective.name=vmd"
    )
  if isinstance(objective, objectives.GenMD4):
    if not getattr(network, "time_conditioning", True):
      raise ValueError(
        "objective 'genmd4' has predictions that depend on t; set network.time_conditioning=True"
      )
    return networks.TokenPowerNetwork(network, objective.initial_power)
  if config.latent.name == "none":
    return network
  settings = sections.given(config.latent)
  reader = {
    key.removeprefix("reader_"): settings.pop(key) for key in _READER_KEYS if key in settings
  }
  inputs = {
    "tokens": settings.pop("tokens", 0),
    "switched_off": settings.pop("switched_off", False),
  }
  family = sections.from_table(latents.TABLE, settings, "latent")
  return networks.with_latent(network, family, **inputs, **reader)


def _check_length(trained: int, sampled: int, network: nn.Module) -> None:
  """Refuses lengths that the network cannot decode."""
  attends, block_size = sees(network), getattr(network, "block_size", None)
  if sampled != trained and (attends == "all" or getattr(network, "absolute_positions", False)):
    raise ValueError(
      f"sampler.length is {sampled} and this network knows sequences of {trained} tokens; leave "
      "sampler.length unset, or train objective 'ar' or one with a block_size, without "
      "absolute_positions"
    )
  for key, length in {"data": trained, "sampler": sampled}.items():
    if block_size is not None and length % block_size:
      raise ValueError(
        f"objective.block_size {block_size} does not divide {key}.length {length}; make it a "
        f"multiple of {block_size}"
      )


def sees(network: nn.Module) -> str:
  """What a network's tokens see: "all", "left" or "blocks"."""
  return getattr(network, "attends", "all")


def require_all(built: Model, where: str) -> None:
  """Refuses, for an evaluator, networks whose tokens do not see all others.

  Raises:
    ValueError: the network decodes from left to right.
  """
  if sees(built.network) != "all":
    raise ValueError(
      f"{where} fills positions in any order and this network decodes from left to right; set "
      "run.evaluators to the others"
    )


def require_one_schedule(built: Model, where: str) -> None:
  """Refuses, for an evaluator, models with a schedule for each token.

  Raises:
    ValueError: the model is GenMD4.
  """
  if isinstance(built.network, networks.TokenPowerNetwork):
    raise ValueError(
      f"{where} reveals tokens by one schedule and objective 'genmd4' has one for each token; "
      "set run.evaluators to the others"
    )


def evaluators(built: Model, table: Mapping[str, Any]) -> dict[str, Any]:
  """The evaluators that the config asks for, by name; their splits and counts are checked here."""
  made = {}
  for name, settings in built.evaluators.items():
    where = f"evaluators.{name}"
    sections.check_name(name, table, "evaluators")
    sections.check_counts(settings, _COUNTS, where)
    _check_splits(built.dataset, settings, where)
    made[name] = sections.call(table[name], settings, where, model=built)
  return made


def _check_splits(dataset: data.Dataset, settings: Mapping[str, Any], where: str) -> None:
  for key in ("split", "splits"):
    for split in np.ravel(settings.get(key, ())).tolist():
      try:
        dataset.split(split)
      except ValueError as error:
        raise ValueError(f"{where}.{key}: {error}") from error


def _sampling(
  name: str,
  grid: str,
  steps: int,
  count: int,
  length: int,
  split: str = "valid",
  prompt: str = "",
  prompts_file: str = "",
  inpaint: str = "",
  labels: tuple[int, ...] = (),
  latent_refresh: str = "once",
  **settings: Any,
) -> Sampling:
  for key, value in {"count": count, "length": length}.items():
    if value < 1:
      raise ValueError(f"sampler.{key} is {value}; it must be at least 1")
  times = samplers.times(grid, steps)
  if latent_refresh not in samplers.REFRESHES:
    raise ValueError(
      f"sampler.latent_refresh is '{latent_refresh}'; it must be one of "
      f"{', '.join(samplers.REFRESHES)}"
    )
  step = sampler(name, **settings)
  return Sampling(
    step,
    times,
    grid,
    count,
    prompt,
    prompts_file,
    split,
    inpaint,
    tuple(labels),
    latent_refresh,
    length,
  )


def sampler(name: str, **settings: Any) -> SamplerStep:
  """A rule of unmasking by the name of its TABLE entry."""
  sections.check_name(name, samplers.TABLE, "sampler")
  return sections.call(samplers.TABLE[name], settings, f"sampler '{name}'")
