"""Weights of paths average to the exact law of the sampler, with and without a latent."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import build, metrics, partitioning, samplers, train_state
from md4vmd.evaluators import importance_weighted
from md4vmd.evaluators.enumeration import exact_log_prob
from md4vmd.evaluators.importance_weighted import EVERY_STEP, Latents, path_nats
from md4vmd.interfaces import ModelFns
from md4vmd.schedules import TABLE
from md4vmd.schedules.linear import Linear
from tests import shrunken, toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V, J = 3, 3, 4
X_L = np.array([2, 0, 1])
PATHS = 32_768
LATENT = toys.random_latent(L, V, values=J)
LISTED = ModelFns(LATENT.denoise, None, LATENT.prior)  # summed over z, without a posterior


def nats_of(fns, schedule, steps, latents=EVERY_STEP, paths=PATHS, **fields):
  """path_nats of many paths to one sequence."""
  rows = {name: np.tile(value, (paths, *[1] * np.ndim(value))) for name, value in fields.items()}
  batch = toys.make_batch(np.tile(X_L, (paths, 1)), **rows)
  times = samplers.times("uniform", steps)
  nats = functools.partial(path_nats, fns, schedule, vocab_size=V, latents=latents)
  key_B = jax.random.split(jax.random.key(0), paths)
  return np.asarray(jax.jit(nats)(times, batch, key_B))


def exact(fns, schedule, steps, refresh="step"):
  """p_T(x) of that sequence by dynamic programming."""
  law = functools.partial(exact_log_prob, fns, schedule, vocab_size=V, latent_refresh=refresh)
  return math.exp(float(jax.jit(law)(samplers.times("uniform", steps), X_L[None])[0]))


def assert_mean_weight(nats_B, expected):
  """The mean of w is p_T(x), within 4 standard errors that are small."""
  weight_B = np.exp(-nats_B)
  error = weight_B.std(ddof=1) / math.sqrt(len(weight_B))
  assert error < 0.05 * expected
  assert abs(weight_B.mean() - expected) < 4 * error + 1e-9 * expected


@pytest.mark.parametrize("name", ["linear", "geometric"])  # with exact ends and with loose ones
def test_weights_without_a_latent_average_to_the_law(name, x64):
  fns, schedule = toys.random(L, V, sees_time=True), TABLE[name]()
  assert_mean_weight(nats_of(fns, schedule, 3), exact(fns, schedule, 3))


@pytest.mark.parametrize("refresh", ["once", "step"])
@pytest.mark.parametrize("reads", ["revealed", "clean"])
def test_weights_with_draws_of_a_posterior_average_to_the_law(refresh, reads, x64):
  nats_B = nats_of(LATENT, Linear(), 2, Latents(refresh, reads))
  assert_mean_weight(nats_B, exact(LISTED, Linear(), 2, refresh))


@pytest.mark.parametrize("refresh", ["once", "step"])
def test_weights_summed_over_a_listed_latent_average_to_the_law(refresh, x64):
  nats_B = nats_of(LISTED, Linear(), 2, Latents(refresh))
  assert_mean_weight(nats_B, exact(LISTED, Linear(), 2, refresh))
  drawn_B = nats_of(LATENT, Linear(), 2, Latents(refresh))
  assert np.exp(-nats_B).std() < np.exp(-drawn_B).std()


@pytest.mark.parametrize("refresh", ["once", "step"])
def test_one_step_with_a_listed_latent_is_the_law_itself(refresh, x64):
  nats_B = nats_of(LISTED, Linear(), 1, Latents(refresh), paths=2)
  np.testing.assert_allclose(np.exp(-nats_B), exact(LISTED, Linear(), 1), rtol=1e-12)


def test_clues_are_seen_and_neither_clues_padding_nor_filling_rows_are_scored(x64):
  fns = toys.random(L, V, sees_time=True)
  given_L, scored_L = np.array([True, False, False]), np.array([True, True, False])
  nats_B = nats_of(fns, Linear(), 1, paths=1, given_BxL=given_L, scored_BxL=scored_L)
  zt_BxL = jnp.asarray([[X_L[0], V, X_L[2]]])
  log_mu_LxV = jax.nn.log_softmax(fns.denoise(zt_BxL, jnp.ones((1, 1))).logits()[0])
  assert nats_B[0] == pytest.approx(-float(log_mu_LxV[1, X_L[1]]), rel=1e-12)
  assert nats_of(fns, Linear(), 1, paths=1, weight_B=0.0)[0] == 0.0


def test_more_paths_are_tighter_and_a_path_alone_is_looser_than_the_law(x64):
  nats_B, law = nats_of(LATENT, Linear(), 2), -math.log(exact(LISTED, Linear(), 2))
  bounds = [metrics.importance_nats(nats_B.reshape(-1, paths)).mean() for paths in (1, 8, 64)]
  assert bounds[0] > bounds[1] > bounds[2] > law - 0.01


# The evaluator.


def run(model, **settings):
  evaluator = importance_weighted.ImportanceWeighted(model, **settings)
  with partitioning.use(model.mesh):
    return evaluator.run(0, train_state.initial(model).params)


def test_the_evaluator_reports_both_bounds_and_says_what_they_are():
  figures = run(build.model(shrunken.config("synthetic", "vmd-pairs")), paths=4, limit=6)
  name = "valid/{}_nats_per_token".format
  assert figures[name("importance_weighted")] < figures[name("one_path")]
  assert (figures["valid/examples"], figures["valid/tokens"], figures["paths"]) == (6, 12, 4)
  for words in ("T=3 steps", "K=4 paths", "a latent every step"):
    assert words in figures["convention"]


def test_what_cannot_be_walked_is_refused():
  model = build.model(shrunken.config("synthetic", "vmd-d1"))
  with pytest.raises(ValueError, match="paths is 0; it must be at least 1"):
    importance_weighted.ImportanceWeighted(model, paths=0)
  config = shrunken.config("synthetic", "vmd-d1")
  config.objective.blocks = 2
  with pytest.raises(ValueError, match=r"blocks is 2; use evaluators.blocks"):
    importance_weighted.ImportanceWeighted(build.model(config))
