"""What MD4's loss scores of clues, padding and filling rows, its parts, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from md4vmd.interfaces import ModelFns
from md4vmd.objectives import MD4
from md4vmd.schedules import TABLE
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

V = 3
GIVEN_BxL = np.array([[False, True, False, False, False]] * 3)
SCORED_BxL = np.array([[True, True, True, True, False]] * 3)
X_BxL = np.array([[0, 1, 2, 0, 1], [2, 2, 1, 1, 0], [1, 0, 0, 2, 2]])
FIELDS = {"given_BxL": GIVEN_BxL, "scored_BxL": SCORED_BxL}


def _watched(fns):
  """The denoiser, and a list of the inputs that it has seen."""
  seen = []

  def denoise(zt_BxL, t_BxG, **rest):
    seen.append(np.asarray(zt_BxL))
    return fns.denoise(zt_BxL, t_BxG, **rest)

  return ModelFns(denoise), seen


@pytest.mark.parametrize(("estimator", "steps"), [("count", None), ("time", None), ("steps", 4)])
def test_clues_and_padding_are_shown_and_never_scored(estimator, steps, x64):
  logits_LxV = np.random.default_rng(0).normal(size=(5, V))
  fns, seen = _watched(toys.constant(logits_LxV))
  objective = MD4(TABLE["geometric"](), V, estimator, steps)
  u_B = np.array([0.0, 0.5, 0.97])
  batch = toys.make_batch(X_BxL, **FIELDS)
  draws = objective.draw(
    toys.Script(jnp.asarray(u_B)[:, None], jnp.zeros((3, 5)), jnp.full((3, 1), 0.5)), batch
  )
  terms = objective.loss(fns, batch, draws, step=jnp.zeros((), int))
  (zt_BxL,) = seen
  np.testing.assert_array_equal(zt_BxL[:, [1, 4]], X_BxL[:, [1, 4]])
  if estimator == "count":
    np.testing.assert_array_equal((zt_BxL == V).sum(-1), [1, 2, 3])  # of 3 free tokens
    np.testing.assert_allclose(draws.weight_BxG, [[3 / 1], [3 / 2], [3 / 3]])
  log_mu_LxV = scipy.special.log_softmax(logits_LxV, axis=-1)
  nll_BxL = -np.take_along_axis(log_mu_LxV[None], X_BxL[:, :, None], axis=-1)[:, :, 0]
  masked_nats_B = np.sum(nll_BxL * (zt_BxL == V), axis=-1)
  diffusion_B = np.asarray(draws.weight_BxG)[:, 0] * masked_nats_B
  np.testing.assert_allclose(terms.parts["diffusion"], diffusion_B, rtol=1e-12)
  np.testing.assert_allclose(terms.loss, diffusion_B.sum(), rtol=1e-12)
  np.testing.assert_array_equal(terms.tokens_B, [3, 3, 3])


@pytest.mark.parametrize(("estimator", "steps"), [("count", None), ("time", None), ("steps", 4)])
def test_the_parts_sum_to_the_bound_with_ends_of_free_tokens(estimator, steps, x64):
  schedule = TABLE["geometric"](beta_min=0.05, beta_max=2.0)
  terms = toys.forced_loss_terms(
    MD4(schedule, V, estimator, steps), toys.constant(np.ones((5, V))), X_BxL,
    np.array([0.1, 0.5, 0.9]), np.ones((3, 5), bool) if estimator != "count" else
    np.array([[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0]], bool),
    np.full(3, 0.5), **FIELDS,
  )  # fmt: skip
  np.testing.assert_allclose(sum(terms.parts.values()), terms.nelbo_B, rtol=1e-14)
  if estimator != "count":
    np.testing.assert_allclose(terms.parts["prior"], 3 * np.log(V) * np.exp(-2.0), rtol=1e-12)
    loss_at_0 = 3 * np.log(V) * (1 - np.exp(-0.05))
    np.testing.assert_allclose(terms.parts["reconstruction"], loss_at_0, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["count", "time"])
def test_a_row_that_only_fills_the_batch_adds_nothing(estimator, x64):
  net = toys.random(5, V, sees_time=True)
  objective = MD4(TABLE["geometric"](beta_min=0.05), V, estimator)
  batch = toys.make_batch(X_BxL, weight_B=[1.0, 0.0, 1.0])
  noise = toys.Script(
    jnp.full((3, 1), 0.5),
    jnp.asarray(np.random.default_rng(1).random((3, 5))),
    jnp.full((3, 1), 0.5),
  )
  draws = objective.draw(noise, batch)
  slices = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (batch, draws)) for i in range(3)]
  loss = jax.jit(functools.partial(objective.loss, net, step=0))
  whole, apart = loss(batch, draws), [loss(*rows) for rows in slices]
  assert (apart[1].loss, apart[1].nelbo_B[0], whole.nelbo_B[1], whole.tokens_B[1]) == (0, 0, 0, 0)
  assert apart[0].loss > 0 and apart[2].loss > 0
  np.testing.assert_allclose(whole.loss, apart[0].loss + apart[2].loss, rtol=1e-13)


@pytest.mark.parametrize("estimator", ["count", "time"])
def test_a_row_without_free_tokens_costs_nothing(estimator, x64):
  objective = MD4(Linear(), V, estimator)
  batch = toys.make_batch(X_BxL[:1], given_BxL=np.ones((1, 5), bool))
  noise = toys.Script(jnp.full((1, 1), 0.5), jnp.zeros((1, 5)), jnp.full((1, 1), 0.5))
  draws = objective.draw(noise, batch)
  terms = objective.loss(toys.constant(np.ones((5, V))), batch, draws, step=jnp.zeros((), int))
  assert (terms.loss, terms.nelbo_B[0], terms.tokens_B[0]) == (0, 0, 0)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"estimator": "eps"}, "estimator is 'eps'; it must be one of count, tilted, time, steps"),
    ({"estimator": "steps"}, "estimator 'steps' and steps None"),
    ({"estimator": "count", "steps": 4}, "estimator 'count' and steps 4"),
    ({"estimator": "steps", "steps": 0}, "steps is 0; it must be at least 1"),
  ],
)
def test_settings_without_meaning_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    MD4(Linear(), V, **settings)


def test_the_tilted_estimator_is_for_training_and_the_value_is_by_count():
  tilted = MD4(Linear(), V, "tilted", block_size=2)
  assert tilted.bound(8, "uniform") == MD4(Linear(), V, block_size=2)
  assert MD4(Linear(), V, "time").bound(8, "uniform") == MD4(Linear(), V, "time")
