import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import build, data, networks, partitioning, train_state
from md4vmd.data import sudoku_rules
from md4vmd.evaluators import Exact, Likelihood, Sudoku
from tests import shrunken, toys

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Fake:
  """A network that is one of the toys' denoisers."""

  fns: Any

  def apply(self, variables, zt_BxL, t_BxG, *, label_B=None, deterministic=True, rngs=None):
    del variables, label_B, deterministic, rngs
    return self.fns.denoise(zt_BxL, t_BxG)


def run(evaluator, params=None):
  with partitioning.use(evaluator.model.mesh):
    return evaluator.run(0, params if params is not None else {})


# The exact evaluator.


@pytest.fixture(scope="module")
def skewed(make_network):
  """A model of pairs_skewed with a random network that sees the time, and its parameters."""
  network, params = make_network(length=2, vocab_size=10, seed=3)
  model = build.model(shrunken.config("synthetic", "pairs_skewed"))
  return dataclasses.replace(model, network=network), params


@pytest.fixture(scope="module")
def log_mu(skewed):
  """A function (state zt_L, time) -> log mu_LxV."""
  model, params = skewed

  @jax.jit
  def predict(zt_BxL, t_BxG):
    logits = networks.bind(model.network, params).denoise(zt_BxL, t_BxG).logits()
    return jax.nn.log_softmax(logits)

  return lambda zt_L, t: np.asarray(
    predict(jnp.asarray([zt_L]), jnp.full((1, 1), t))[0], np.float64
  )


def test_one_step_draws_tokens_from_the_product_of_the_marginals(skewed, log_mu):
  model, params = skewed
  figures = run(Exact(model, steps=(1,)), params)
  words = "ancestral sampler at T steps on the uniform grid, exact by enumeration"
  assert figures["convention"] == words
  log_mu_LxV = log_mu([10, 10], 1.0)
  chance = {k: (k + 1) / 55 for k in range(10)}
  log_p = {k: log_mu_LxV[0, k] + log_mu_LxV[1, (k + 1) % 10] for k in range(10)}
  entropy = -sum(q * math.log(q) for q in chance.values())
  nats = -sum(chance[k] * log_p[k] for k in range(10))
  assert figures["exact/entropy_nats"] == pytest.approx(entropy)
  assert figures["exact/T1_nats"] == pytest.approx(nats, rel=1e-5)
  assert figures["exact/T1_kl_nats"] == pytest.approx(nats - entropy, rel=1e-5)
  accuracy = sum(math.exp(value) for value in log_p.values())
  assert figures["exact/T1_accuracy"] == pytest.approx(accuracy, rel=1e-5)


def test_two_steps_reveal_each_token_in_either_step_with_probability_one_half(skewed, log_mu):
  model, params = skewed
  figures = run(Exact(model, steps=(2,)), params)
  first_LxV = log_mu([10, 10], 1.0)
  second_LxV = log_mu([10, 10], 0.5)
  nats = 0.0
  for k in range(10):
    a, b = k, (k + 1) % 10
    ways = [
      first_LxV[0, a] + first_LxV[1, b],
      first_LxV[0, a] + log_mu([a, 10], 0.5)[1, b],
      first_LxV[1, b] + log_mu([10, b], 0.5)[0, a],
      second_LxV[0, a] + second_LxV[1, b],
    ]
    nats -= (k + 1) / 55 * math.log(sum(math.exp(way) for way in ways) / 4)
  assert figures["exact/T2_nats"] == pytest.approx(nats, rel=1e-5)


def test_the_true_denoiser_gets_all_right_in_many_steps_and_a_tenth_in_one():
  model = build.model(shrunken.config("synthetic", "pairs"))
  dataset = model.dataset
  fns = toys.posterior(dataset.support_MxL, dataset.probabilities_M, 10)
  model = dataclasses.replace(model, network=Fake(fns))
  figures = run(Exact(model, steps=(1, 64)))
  assert figures["exact/T1_accuracy"] == pytest.approx(0.1, rel=1e-4)
  assert figures["exact/T1_kl_nats"] == pytest.approx(math.log(10), rel=1e-4)
  # Both tokens fall into one of 64 steps with probability 1/64; then a tenth is right.
  assert figures["exact/T64_accuracy"] == pytest.approx(1 - 0.9 / 64, rel=1e-4)


def test_exact_figures_need_data_that_can_be_listed():
  model = build.model(shrunken.config("sudoku", "4x4"))
  with pytest.raises(ValueError, match="needs data whose support is known"):
    Exact(model)


# The likelihood evaluator.


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A model of characters whose last chunk and last batch are not full, and its parameters."""
  config = shrunken.config("text8", "small", folder=tmp_path_factory.mktemp("data"))
  model = build.model(config)
  with partitioning.use(model.mesh):
    params = train_state.initial(model).params
  return model, params | {"head": 30 * params["head"]}


def sized(model, batch_size):
  return dataclasses.replace(model, run=dataclasses.replace(model.run, batch_size=batch_size))


@pytest.fixture(scope="module")
def bounds(text):
  """The figures of the whole split in batches of 8 and of 4, and with 16 draws."""
  model, params = text
  few, many = Likelihood(sized(model, 4)), Likelihood(model, draws=16)
  return {"8": run(Likelihood(model), params), "4": run(few, params), "16 draws": run(many, params)}


def test_every_token_of_the_split_is_scored_once(text, bounds):
  source = text[0].dataset.split("valid")
  scored = [source[i]["scored"].sum() for i in range(len(source))]
  assert len(source) % 8 and len(source) % 4 and scored[-1] < 16
  for name in ("8", "4", "16 draws"):
    assert bounds[name]["valid/tokens"] == sum(scored)
    assert bounds[name]["valid/examples"] == len(source)


def test_the_bound_does_not_depend_on_the_batch_size(bounds):
  assert bounds["8"].keys() == bounds["4"].keys()
  for key, value in bounds["8"].items():
    if isinstance(value, float):
      near = {"rel": 0, "abs": 1e-5} if "nats_per_token" in key else {"rel": 1e-5}
      assert value == pytest.approx(bounds["4"][key], **near), key


def test_more_draws_reduce_the_standard_error_and_agree_within_it(bounds):
  mean, error = "valid/nelbo_nats_per_token", "valid/nelbo_nats_per_token_standard_error"
  assert 0 < bounds["16 draws"][error] < 0.7 * bounds["8"][error]
  distance = abs(bounds["16 draws"][mean] - bounds["8"][mean])
  assert 0 < distance < 4 * bounds["8"][error]


def test_a_uniform_prediction_costs_the_log_of_the_vocabulary_for_every_token(text):
  model, params = text
  figures = run(Likelihood(model), params | {"head": 0 * params["head"]})
  assert figures["valid/nelbo_nats_per_token"] == pytest.approx(math.log(27), rel=1e-6)
  assert figures["valid/nelbo_bits_per_character"] == pytest.approx(math.log2(27), rel=1e-6)
  assert figures["valid/nelbo_nats_per_token_standard_error"] < 1e-6


def test_a_limit_scores_the_first_examples_alone(text):
  model, params = text
  figures = run(Likelihood(model, limit=3), params)
  assert (figures["valid/examples"], figures["valid/tokens"]) == (3, 48)


def test_settings_of_the_likelihood_that_mean_nothing_are_refused(text):
  with pytest.raises(ValueError, match="draws is 0; it must be at least 1"):
    Likelihood(text[0], draws=0)
  with pytest.raises(ValueError, match="split 'vaild' does not exist: use one of train, valid"):
    Likelihood(text[0], split="vaild")


# The Sudoku evaluator.


@pytest.fixture(scope="module")
def puzzles():
  """A model of puzzles of one solution each, 30 in valid: no multiple of the batch size."""
  return build.model(shrunken.config("sudoku", "4x4"))


def solver(puzzles, grids, **settings):
  """The evaluator of a network that knows these grids and no others."""
  fns = toys.posterior(grids, np.ones(len(grids)), 4)
  return Sudoku(dataclasses.replace(puzzles, network=Fake(fns)), **settings)


def test_a_perfect_solver_solves_every_puzzle_in_every_order(puzzles):
  orders = ("margin", "top_prob", "entropy", "ancestral")
  figures = run(solver(puzzles, sudoku_rules.all_grids_4x4(), orders=orders, calls=(3,)))
  for order in orders:
    assert figures[f"valid/solved_{order}_nfe3"] == 1.0


def test_a_solver_that_knows_one_digit_solves_nothing(puzzles):
  logits_LxV = np.zeros((16, 4)) + [5.0, 0.0, 0.0, 0.0]
  model = dataclasses.replace(puzzles, network=Fake(toys.constant(logits_LxV)))
  figures = run(Sudoku(model, orders=("margin",), calls=(1,)))
  assert figures["valid/solved_margin_nfe1"] == 0.0


def test_the_solved_share_is_that_of_the_grids_that_the_solver_knows(puzzles):
  grids = sudoku_rules.all_grids_4x4()[::3]
  known = {grid_L.tobytes() for grid_L in grids}
  source = puzzles.dataset.split("valid")
  items = [source[i] for i in range(len(source))]
  assert len(items) == 30 and 30 % puzzles.run.batch_size
  hits = [item["x"].astype(np.uint8).tobytes() in known for item in items]
  assert 0 < sum(hits) < 30
  figures = run(solver(puzzles, grids, orders=("margin",), calls=(1,)))
  assert figures["valid/solved_margin_nfe1"] == pytest.approx(np.mean(hits))
  assert figures["valid/puzzles"] == 30
  assert figures["valid/clues_mean"] == pytest.approx(np.mean([i["given"].sum() for i in items]))


def test_a_limit_scores_the_first_puzzles_alone(puzzles):
  figures = run(
    solver(puzzles, sudoku_rules.all_grids_4x4(), orders=("margin",), calls=(1,), limit=5)
  )
  assert figures["valid/puzzles"] == 5


@pytest.fixture(scope="module")
def several():
  """A model of puzzles of three clues, each in valid once per solution."""
  config = shrunken.config("sudoku", "4x4-several")
  return build.model(config)


def test_the_coverage_of_one_answer_per_puzzle_is_one_over_its_solutions(several):
  figures = run(solver(several, sudoku_rules.all_grids_4x4(), orders=("margin",), calls=(12,)))
  source = several.dataset.split("valid")
  puzzles = [
    np.where(item["given"], item["x"], 4).tobytes()
    for item in map(source.__getitem__, range(len(source)))
  ]
  rows = np.array([puzzles.count(puzzle) for puzzle in dict.fromkeys(puzzles)])
  assert rows.max() > rows.min() > 1
  assert figures["valid/puzzles"] == len(rows)
  assert figures["valid/solved_margin_nfe12"] == 1.0
  assert figures["valid/coverage_margin_nfe12"] == pytest.approx(np.mean(1 / rows))


def test_draws_from_the_data_cover_what_is_expected_of_them(several):
  settings = {"orders": ("ancestral",), "calls": (200,), "temperature": 1.0}
  figures = run(solver(several, sudoku_rules.all_grids_4x4(), **settings))
  assert figures["valid/solved_ancestral_nfe200"] > 0.9
  assert figures["valid/coverage_ancestral_nfe200"] == pytest.approx(
    figures["valid/coverage_exact"], abs=0.1
  )


def test_a_split_without_clues_is_refused(puzzles):
  grids = data.TABLE["sudoku"](size=4)
  model = dataclasses.replace(
    puzzles, dataset=grids, network=Fake(toys.constant(np.zeros((16, 4))))
  )
  with pytest.raises(ValueError, match="the split 'valid' has no clues"):
    Sudoku(model, orders=("margin",), calls=(1,))


def test_only_boards_are_solved(text):
  with pytest.raises(ValueError, match="needs Sudoku boards"):
    Sudoku(text[0])
