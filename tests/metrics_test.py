import math

import numpy as np
import pytest

from md4vmd import metrics


@pytest.fixture
def split():
  """(nats_N, tokens_N) of 400 examples of 3 to 40 tokens, 1.7 nats a token on average."""
  rng = np.random.default_rng(0)
  tokens_N = rng.integers(3, 41, 400).astype(np.float64)
  return tokens_N * rng.normal(1.7, 0.4, 400), tokens_N


def test_nats_and_bits_of_a_sum():
  figures = metrics.report("valid", "bound", nats=8 * math.log(2), tokens=4)
  assert figures == {
    "valid/bound_nats_per_token": pytest.approx(2 * math.log(2)),
    "valid/bound_bits_per_token": pytest.approx(2.0),
  }


def test_the_mean_is_of_tokens_and_not_of_examples():
  figures = metrics.likelihood_report(
    "valid", np.array([1.0, 30.0]), np.array([1.0, 9.0]), unit="token"
  )
  assert figures["valid/nelbo_nats_per_token"] == pytest.approx(3.1)
  assert (figures["valid/tokens"], figures["valid/examples"]) == (10, 2)


def test_the_standard_error_of_two_examples_by_hand():
  # mean 31/10; residuals 1 - 3.1 = -2.1 and 30 - 27.9 = 2.1; s^2 = 2 * 2.1^2; / tokens 10
  figures = metrics.likelihood_report(
    "valid", np.array([1.0, 30.0]), np.array([1.0, 9.0]), unit="token"
  )
  error = math.sqrt(2 * (2.1**2 + 2.1**2)) / 10
  assert figures["valid/nelbo_nats_per_token_standard_error"] == pytest.approx(error)


def test_the_standard_error_is_that_of_a_mean_where_all_examples_are_as_long():
  nats_N = np.random.default_rng(1).normal(20.0, 3.0, 50)
  figures = metrics.likelihood_report("valid", nats_N, np.full(50, 8.0), unit="token")
  expected = np.std(nats_N / 8, ddof=1) / math.sqrt(50)
  assert figures["valid/nelbo_nats_per_token_standard_error"] == pytest.approx(expected)


def test_the_standard_error_is_the_spread_over_resampled_splits(split):
  nats_N, tokens_N = split
  rng = np.random.default_rng(2)
  chosen_RxN = rng.integers(0, len(nats_N), (4000, len(nats_N)))
  spread = np.std(nats_N[chosen_RxN].sum(1) / tokens_N[chosen_RxN].sum(1))
  error = metrics.likelihood_report("x", nats_N, tokens_N, unit="token")[
    "x/nelbo_nats_per_token_standard_error"
  ]
  assert error == pytest.approx(spread, rel=0.06)


def test_a_bound_that_is_the_same_for_every_token_has_no_error(split):
  _, tokens_N = split
  figures = metrics.likelihood_report("x", 1.25 * tokens_N, tokens_N, unit="token")
  assert figures["x/nelbo_nats_per_token"] == pytest.approx(1.25)
  assert figures["x/nelbo_nats_per_token_standard_error"] == pytest.approx(0.0, abs=1e-12)


def test_bits_and_perplexity_are_those_of_the_nats(split):
  figures = metrics.likelihood_report("x", *split, unit="token")
  bits = figures["x/nelbo_bits_per_token"]
  assert bits == pytest.approx(figures["x/nelbo_nats_per_token"] / math.log(2))
  assert figures["x/perplexity_bound"] == pytest.approx(2**bits)
  ratio = figures["x/nelbo_bits_per_token_standard_error"] / bits
  nats = figures["x/nelbo_nats_per_token"]
  assert ratio == pytest.approx(figures["x/nelbo_nats_per_token_standard_error"] / nats)


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary():
  tokens_N = np.array([5.0, 7.0])
  figures = metrics.likelihood_report("x", tokens_N * math.log(27), tokens_N, unit="token")
  assert figures["x/perplexity_bound"] == pytest.approx(27)


def test_characters_and_dims_are_named_as_such(split):
  assert not any("per_dim" in key for key in metrics.likelihood_report("x", *split, unit="token"))
  figures = metrics.likelihood_report("x", *split, unit="character")
  assert figures["x/nelbo_bits_per_character"] == figures["x/nelbo_bits_per_token"]
  assert figures["x/nelbo_bits_per_character_standard_error"] > 0


def test_bits_per_dimension_are_those_of_256_equal_values_by_hand():
  tokens_N = np.array([12.0, 12.0])
  nats_N = tokens_N * np.array([8.0, 6.0]) * math.log(2)
  figures = metrics.likelihood_report("x", nats_N, tokens_N, unit="dim")
  assert figures["x/nelbo_bits_per_dim"] == pytest.approx(7.0)
  # Two equal sizes: the deviation sqrt(2) of 8 and 6 bits over sqrt(2).
  assert figures["x/nelbo_bits_per_dim_standard_error"] == pytest.approx(1.0)
  assert not any("per_character" in key for key in figures)


@pytest.mark.parametrize("draws", [1, 2, 3, 5, 6, 7])
def test_draws_that_are_all_equal_have_no_noise(split, draws):
  nats_N, tokens_N = split
  nats_NxK = np.repeat(nats_N[:, None], draws, axis=1)
  assert metrics.draws_report("x", nats_NxK, tokens_N) == {}
  nats_NxK[0, 0] += 1e-6
  assert (metrics.draws_report("x", nats_NxK, tokens_N) != {}) == (draws > 1)


def test_a_hopeless_bound_has_a_finite_perplexity():
  figures = metrics.likelihood_report("x", np.array([1e6]), np.array([1.0]), unit="token")
  assert math.isfinite(figures["x/perplexity_bound"])


def test_a_span_of_training_is_averaged_over_its_tokens_and_steps():
  sums = {"loss_nats": 60.0, "nelbo_nats": 40.0, "gradient_norm": 6.0, "tokens": 20.0}
  sums |= {"parameter_norm": 9.0, "part_diffusion_nats": 30.0}
  figures = metrics.train_report(sums, tokens=20.0, steps=3)
  assert figures == {
    "train/loss_nats_per_token": 3.0,
    "train/gradient_norm": 2.0,
    "train/parameter_norm": 3.0,
    "train/diffusion_nats_per_token": 1.5,
    "train/nelbo_nats_per_token": 2.0,
    "train/nelbo_bits_per_token": pytest.approx(2.0 / math.log(2)),
  }
