"""Every shipped config, shrunken, through the trainer, the evaluators and the sampler."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

import numpy as np
import PIL.Image
import pytest

from md4vmd import build, evaluate, sample, train, writers
from tests import shrunken

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Configs that run on real data where there is any, and on files made here where there is none.
DATA = os.environ.get("MD4VMD_DATA")
REAL = {
  ("cifar10", "class"): "cifar10/cifar10_lossless_train3000_valid400.npz",
  ("sudoku", "9x9"): "sudoku/null_expert*.csv.gz",
  ("text8", "small"): "text8_prefix/text8_valid.txt.gz",
}
REQUIRED = ("checkpoint", "step", "config_hash", "seed", "parameters", "convention")


@dataclasses.dataclass
class Finished:
  """A run of STEPS steps that was continued for 3 more, then evaluated and sampled."""

  config: Any
  workdir: pathlib.Path
  first_state: list[str]

  @functools.cached_property
  def model(self):
    return build.model(self.config)

  @property
  def last_step(self):
    return shrunken.STEPS + 3


def finish(config, workdir):
  train.train(config, workdir)
  saved = sorted(path.name for path in (workdir / "checkpoints").iterdir())
  config.run.steps += 3
  train.train(config, workdir)
  evaluate.evaluate(config, workdir)
  sample.sample(config, workdir)
  return Finished(config, workdir, saved)


@pytest.fixture(scope="module", params=shrunken.shipped(), ids=lambda param: ":".join(param))
def run(request, tmp_path_factory):
  folder, real = tmp_path_factory.mktemp("run"), REAL.get(request.param)
  path = str(pathlib.Path(DATA) / real) if DATA and real else ""
  return finish(shrunken.config(*request.param, folder=folder, path=path), folder / "workdir")


def check_figures(run):
  for name in run.config.evaluators:
    path = run.workdir / "eval" / f"{run.last_step}-{name}.json"
    figures = json.loads(path.read_text())
    assert set(REQUIRED) <= set(figures)
    assert figures["evaluator"] == name
    assert figures["step"] == run.last_step
    assert pathlib.Path(figures["checkpoint"]).is_dir()
    assert figures["config_hash"] == run.model.config_hash
    numbers = {key: value for key, value in figures.items() if "/" in key}
    assert numbers
    assert all(math.isfinite(value) for value in numbers.values()), numbers


def check_samples(run):
  model, stem = run.model, run.workdir / "samples" / str(run.last_step)
  arrays = np.load(f"{stem}.npz")
  x_BxL, free_BxL = arrays["x_BxL"], arrays["free_BxL"]
  assert x_BxL.shape == (run.config.sampler.count, model.dataset.length)
  assert x_BxL.min() >= 0 and x_BxL.max() < model.dataset.vocab_size
  source = model.dataset.split(run.config.sampler.split)
  has_clues = "given" in source[0]
  assert has_clues == (run.config.data.name in ("sudoku", "sudoku_csv"))
  if has_clues:
    mask = model.dataset.vocab_size
    puzzles = [
      np.where(source[i]["given"], source[i]["x"], mask).tolist()
      for i in range(min(50, len(source)))
    ]
    distinct = [puzzle for i, puzzle in enumerate(puzzles) if puzzle not in puzzles[:i]]
    shown = np.where(free_BxL, mask, x_BxL).tolist()
    assert shown == distinct[: len(shown)]  # the first puzzles of the split, each once
  else:
    assert free_BxL.all()
  assert PIL.Image.open(f"{stem}.png").size > (1, 1)
  if model.dataset.image_shape is not None:
    assert PIL.Image.open(f"{stem}-film.png").size > (1, 1)
    assert PIL.Image.open(f"{stem}.gif").n_frames > 1
    return
  text = pathlib.Path(f"{stem}.txt").read_text()
  shown = [model.dataset.decode(x_L) for x_L in x_BxL]
  assert text == "\n\n".join(shown) + "\n"


def test_a_run_saves_where_it_was_told_to(run):
  assert run.first_state == ["3", "6"]


def test_a_continued_run_goes_on_to_the_new_end(run):
  assert {path.name for path in (run.workdir / "checkpoints").iterdir()} == {"3", "6", "9"}
  lines = writers.read_metrics(run.workdir)
  trained = [line for line in lines if "train/loss_nats_per_token" in line]
  # Step 7 is the first of the second run, which writes at even steps and at its end.
  assert [line["step"] for line in trained] == [2, 4, 6, 8, 9]
  assert all(math.isfinite(value) for line in lines for value in line.values())


def test_every_evaluator_writes_finite_figures_and_what_they_were_measured_on(run):
  check_figures(run)


def test_samples_keep_the_clues_and_are_read_as_text_or_pictures(run):
  check_samples(run)


def test_only_what_is_decoded_from_left_to_right_is_sampled_at_another_length(run, tmp_path):
  config, length = run.config.copy_and_resolve_references(), run.model.dataset.length
  if build.sees(run.model.network) == "all":
    config.sampler.length = 2 * length
    with pytest.raises(ValueError, match="this network knows sequences of"):
      build.model(config)
    return
  (tmp_path / "checkpoints").symlink_to(run.workdir / "checkpoints")
  for other in (length // 2, 3 * length // 2):
    config.sampler.length = other
    sample.sample(config, tmp_path)
    arrays = np.load(tmp_path / "samples" / f"{run.last_step}.npz")
    assert arrays["x_BxL"].shape == (config.sampler.count, other) and arrays["free_BxL"].all()
    assert arrays["x_BxL"].min() >= 0 and arrays["x_BxL"].max() < run.model.dataset.vocab_size
    assert arrays["call_BxL"].min() >= 0  # of the calls that filled a position; -1 where none did


def test_the_configs_that_ship_are_all_here():
  files = {path.stem for path in (shrunken.ROOT / "configs").glob("[!_]*.py")} - {"common"}
  assert {name for name, _ in [*shrunken.shipped(), *shrunken.LIKE_ANOTHER]} == files
  assert {"cifar10", "mnist", "quickstart", "sudoku", "synthetic", "text8"} <= files
