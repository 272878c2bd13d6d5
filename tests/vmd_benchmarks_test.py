"""The tables of VMD: what each cell trains and evaluates."""

import pytest

from benchmarks import text8_baselines, vmd_sudoku, vmd_tables, vmd_text8
from md4vmd import build, networks
from md4vmd.evaluators.likelihood import Scorer
from tests import shrunken


@pytest.mark.parametrize("model", vmd_sudoku.MODELS)
def test_only_vmd_solves_sudoku_with_a_latent(model, tmp_path):
  for puzzles in vmd_sudoku.PUZZLES:
    made = build.model(vmd_sudoku.config(vmd_sudoku.Job(puzzles, model, 3, tmp_path)))
    assert isinstance(made.network, networks.LatentNetwork) == (model == "vmd")
    assert made.seed == 3
    assert (made.dataset.entropy_nats("valid") > 0) == (puzzles == "several")


def test_a_row_of_sudoku_has_medians_over_the_seeds():
  shares = [(0.1, 0.2, 0.5), (0.3, 0.6, 0.9), (0.2, 0.1, 0.8)]
  runs = [
    {f"valid/solved_top_prob_nfe{n}": share for n, share in zip((1, 2, 5), each, strict=True)}
    | {"valid/coverage_top_prob_nfe5": each[0], "valid/coverage_exact": 0.7}
    | {"train_cpu_seconds": 60.0 * i}
    for i, each in enumerate(shares)
  ]
  row, figures = vmd_sudoku._summary(runs)
  assert row == [
    "20.0",
    "20.0",
    "80.0",
    "10.0/20.0/50.0 30.0/60.0/90.0 20.0/10.0/80.0",
    "20.0",
    "70.0",
    "2.0",
  ]
  assert figures["nfe5/solved"] == pytest.approx(80.0)
  del runs[0]["valid/coverage_exact"]
  assert vmd_sudoku._summary(runs)[0][4:6] == ["-", "-"]


@pytest.mark.parametrize("model", vmd_text8.MODELS)
def test_bounds_of_few_steps_are_those_of_their_samplers(model, tmp_path):
  text = shrunken.write_text(tmp_path)
  job = text8_baselines.Job(model, 0, 1.0, str(text), None, tmp_path, steps=100)
  for calls in (8, 64):
    made = vmd_text8.at_steps(vmd_text8.config(job), calls)
    built = build.model(made)
    assert f"T={calls}" in Scorer(built, 1).convention
    assert isinstance(built.network, networks.LatentNetwork) == (model == "vmd")


@pytest.mark.parametrize("latent", vmd_tables.LATENTS)
def test_every_cell_has_a_model(latent):
  jobs = {vmd_tables.Job(*vmd_tables._model(c, latent), latent, 0, None) for c in vmd_tables.CELLS}
  served = [(job.data, *cell) for job in jobs for cell in job.cells]
  assert sorted(served) == sorted(cell[1:4] for cell in vmd_tables.CELLS)
  for job in jobs:
    network = build.model(vmd_tables.config(job)).network
    assert isinstance(network, networks.LatentNetwork) == (latent not in ("none", "matched"))
