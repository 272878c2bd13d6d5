"""The any-order evaluator against sums over all orders, on spaces small enough to enumerate."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import build, metrics, partitioning, rngs
from md4vmd.evaluators import any_order
from md4vmd.schedules import TABLE
from md4vmd.schedules.cosine import Cosine
from tests import shrunken, toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V = 4, 3
X_L = np.array([2, 0, 1, 1])
ORDERS = list(itertools.permutations(range(L)))


@dataclasses.dataclass(frozen=True)
class Fake:
  """A network that is one of the toys' denoisers."""

  fns: object
  time_conditioning: bool = False

  def apply(self, variables, zt_BxL, t_BxG, *, label_B=None, deterministic=True, rngs=None):
    del variables, label_B, deterministic, rngs
    return self.fns.denoise(zt_BxL, t_BxG)


def uniforms(orders, length):
  """Uniforms that stand for these orders of positions, [N, L]; the other positions come last."""
  uniform_NxL = np.full((len(orders), length), 0.999)
  for row, order in enumerate(orders):
    uniform_NxL[row, list(order)] = np.arange(len(order)) / length
  return jnp.asarray(uniform_NxL)


def nats_of(fns, schedule, x_L, orders, **fields):
  """order_nats of one sequence in every order."""
  rows = {name: np.tile(value, (len(orders), 1)) for name, value in fields.items()}
  batch = toys.make_batch(np.tile(x_L, (len(orders), 1)), **rows)
  nats = functools.partial(any_order.order_nats, fns, schedule, vocab_size=V)
  return np.asarray(jax.jit(nats)(batch, uniforms(orders, len(x_L))))


def by_hand(fns, schedule, x_L, order):
  """-log p(x | order): one unbatched prediction per token of the order."""
  zt_L = np.array(x_L)
  zt_L[list(order)] = V
  nats = 0.0
  for k, n in enumerate(order):
    t = schedule.alpha_inverse(jnp.asarray(k / len(order)))
    logits_LxV = fns.denoise(jnp.asarray(zt_L[None]), t[None, None]).logits()[0]
    nats -= float(jax.nn.log_softmax(logits_LxV[n])[x_L[n]])
    zt_L[n] = x_L[n]
  return nats


def test_the_mean_over_all_orders_is_the_counting_form_of_the_bound(x64):
  fns = toys.random(L, V, sees_time=False)
  nll_SxL = toys.masked_nll(fns, X_L, [0.5], V)[0]
  masked_S = (nll_SxL != 0).sum(-1)
  bound = sum(nll_SxL[masked_S == k].sum(-1).mean() / k for k in range(1, L + 1))
  assert nats_of(fns, Cosine(), X_L, ORDERS).mean() == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("name", TABLE)
def test_every_order_predicts_token_by_token_at_the_time_of_its_visible_share(name, x64):
  fns, schedule, orders = toys.random(L, V, sees_time=True), TABLE[name](), ORDERS[::5]
  expected = [by_hand(fns, schedule, X_L, order) for order in orders]
  np.testing.assert_allclose(nats_of(fns, schedule, X_L, orders), expected, rtol=1e-12)


def test_the_probabilities_of_all_sequences_sum_to_one_in_every_order(x64):
  fns, all_MxL = toys.random(3, V, sees_time=True), toys.sequences(3, V)
  for order in ([0, 1, 2], [2, 0, 1]):
    batch = toys.make_batch(all_MxL)
    nats = functools.partial(any_order.order_nats, fns, Cosine(), vocab_size=V)
    nats_M = jax.jit(nats)(batch, uniforms([order] * len(all_MxL), 3))
    assert jnp.exp(-nats_M).sum() == pytest.approx(1.0, abs=1e-12)


def test_clues_are_seen_from_the_first_call_and_padding_is_not_scored(x64):
  fns = toys.random(L, V, sees_time=True)
  given_L, scored_L = np.array([False, True, False, False]), np.array([True, True, True, False])
  orders = [[0, 2], [2, 0]]
  found = nats_of(fns, Cosine(), X_L, orders, given_BxL=given_L, scored_BxL=scored_L)
  expected = [by_hand(fns, Cosine(), X_L, order) for order in orders]
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_row_that_fills_the_batch_and_a_row_without_free_tokens_cost_nothing(x64):
  batch = toys.make_batch(
    np.tile(X_L, (3, 1)), weight_B=[1.0, 0.0, 1.0], given_BxL=np.arange(3)[:, None] == [2] * L
  )
  fns = toys.random(L, V, sees_time=True)
  nats_B = any_order.order_nats(fns, Cosine(), batch, uniforms([ORDERS[3]] * 3, L), V)
  assert nats_B[0] == pytest.approx(by_hand(fns, Cosine(), X_L, ORDERS[3]), rel=1e-12)
  assert nats_B[1:].tolist() == [0.0, 0.0]


def test_the_importance_weighted_value_of_three_orders_by_hand():
  found = metrics.importance_nats(-np.log([[0.5, 0.3, 0.1], [0.2, 0.2, 0.2]]))
  np.testing.assert_allclose(found, [-math.log(0.3), -math.log(0.2)], rtol=1e-12)


# The evaluator, on a split of digits in pairs.


@pytest.fixture(scope="module")
def pairs():
  """A model of pairs whose network is random and sees the time."""
  model = build.model(shrunken.config("synthetic", "pairs"))
  fake = Fake(toys.random(2, 10, sees_time=True), time_conditioning=True)
  return dataclasses.replace(model, network=fake)


def run(model, **settings):
  evaluator = any_order.AnyOrder(model, **settings)
  with partitioning.use(model.mesh):
    return evaluator.run(0, {})


def test_both_bounds_are_those_of_the_orders_drawn_for_each_example(pairs):
  figures = run(pairs, orders=3)
  source, fns = pairs.dataset.split("valid"), pairs.network.fns
  x_NxL = np.stack([source[i]["x"] for i in range(len(source))])
  key, nats = rngs.stream(pairs.seed, 0, "any_order"), []
  for k in range(3):
    noise = rngs.example_noise(key, jnp.arange(len(source)), k, 3)
    first_N = np.argmin(np.asarray(noise.uniform("order", (2,))), axis=-1)
    nats_N = 0.0
    for predicted_N, t in ((first_N, 1.0), (1 - first_N, 0.5)):
      is_masked_NxL = (np.arange(2) == predicted_N[:, None]) | (t == 1.0)
      zt_NxL = jnp.asarray(np.where(is_masked_NxL, 10, x_NxL))
      logits_NxLxV = fns.denoise(zt_NxL, jnp.full((len(source), 1), t)).logits()
      log_mu_NxLxV = np.asarray(jax.nn.log_softmax(logits_NxLxV), np.float64)
      rows = np.arange(len(source))
      nats_N -= log_mu_NxLxV[rows, predicted_N, x_NxL[rows, predicted_N]]
    nats.append(nats_N)
  nats_NxK = np.stack(nats, axis=-1)
  weighted_N = -np.log(np.mean(np.exp(-nats_NxK), axis=1))
  name = "valid/any_order_{}_nats_per_token".format
  assert figures[name("nelbo")] == pytest.approx(nats_NxK.mean() / 2, rel=1e-5)
  assert figures[name("importance")] == pytest.approx(weighted_N.mean() / 2, rel=1e-5)
  assert figures[name("importance")] < figures[name("nelbo")]
  error = np.std(weighted_N / 2, ddof=1) / math.sqrt(len(source))
  assert figures[name("importance") + "_standard_error"] == pytest.approx(error, rel=1e-4)
  assert (figures["valid/examples"], figures["valid/tokens"]) == (10, 20)


def test_the_record_says_how_many_orders_and_at_which_times(pairs):
  figures = run(pairs, orders=3, limit=4)
  assert figures["orders"] == 3 and figures["valid/examples"] == 4
  assert "K=3 orders" in figures["convention"] and "the network sees t" in figures["convention"]


def test_settings_and_networks_that_mean_nothing_are_refused(pairs):
  with pytest.raises(ValueError, match="orders is 0; it must be at least 1"):
    any_order.AnyOrder(pairs, orders=0)
  with pytest.raises(ValueError, match=r"with a latent .* is an integral over it"):
    any_order.AnyOrder(build.model(shrunken.config("synthetic", "vmd-pairs")))
