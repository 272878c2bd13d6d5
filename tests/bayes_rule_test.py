"""Bayes' rule as prior and posterior of codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import latents, networks, rngs, samplers
from md4vmd.evaluators.enumeration import exact_log_prob
from md4vmd.objectives import VMD
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V, J = 3, 3, 6
X_NxL = toys.sequences(L, V)


@pytest.fixture(scope="module")
def bayes():
  """A network with two codes, 2 and 3 classes' worth of values, whose prior is Bayes' rule."""
  denoiser = networks.Transformer(
    V, width=16, depth=1, heads=2, condition_width=8, time_conditioning=False, adaln_zero=False
  )
  family = latents.CategoricalFamily(codes=1, classes=J, scale=2.0, prior="bayes")
  network = networks.with_latent(denoiser, family)
  return networks.bind(network, toys.random_params(network, jnp.zeros((1, L), int)))


def losses(objective, fns, x_BxL, key):
  batch = toys.make_batch(x_BxL)
  draws = objective.draw(rngs.batch_noise(key, len(x_BxL)), batch)
  return objective.loss(fns, batch, draws, step=jnp.zeros((), int))


def one_step(fns):
  """log p(z) and log mu(x_n | all masked, z) of a model, [J] and [J, L, V]."""
  masked_1xL = jnp.full((1, L), V)
  support = fns.prior(masked_1xL).support()
  z_Jx1xZ = support.z_JxZ[:, None]
  logits = fns.denoise(
    jnp.tile(masked_1xL, (len(z_Jx1xZ), 1)), jnp.ones((len(z_Jx1xZ), 1)), latent_BxGxZ=z_Jx1xZ
  ).logits()
  return np.asarray(support.log_p_BxGxJ[0, 0]), np.asarray(jax.nn.log_softmax(logits))


@pytest.mark.parametrize("visible", [[], [1], [0, 2], [0, 1, 2]])
def test_a_bayes_prior_weighs_values_by_what_they_make_of_the_visible_tokens(bayes, visible):
  log_p_J, log_mu_JxLxV = one_step(bayes)
  assert np.ptp(log_p_J) > 0.1
  zt_NxL = np.full_like(X_NxL, V)
  zt_NxL[:, visible] = X_NxL[:, visible]
  for x_L, got_J in zip(
    X_NxL, np.asarray(bayes.prior(jnp.asarray(zt_NxL)).support().log_p_BxGxJ[:, 0]), strict=True
  ):
    joint_J = np.exp(log_p_J) * np.prod(
      [np.exp(log_mu_JxLxV[:, n, x_L[n]]) for n in visible], axis=0
    )
    np.testing.assert_allclose(np.exp(got_J), joint_J / joint_J.sum(), rtol=2e-5)


def test_drawn_values_give_the_exact_likelihood_of_one_step(bayes):
  """Every draw of the exact posterior has the weight p(z) mu(x | z) / q(z | x) = p(x)."""
  log_p_J, log_mu_JxLxV = one_step(bayes)
  nats_N = [
    -np.logaddexp.reduce(log_p_J + log_mu_JxLxV[:, np.arange(L), x_L].sum(-1)) for x_L in X_NxL
  ]
  for samples in (1, 3):
    objective = VMD(Linear(), V, "jump", all_masked=1.0, samples=samples, sum_values=False)
    got_N = losses(objective, bayes, X_NxL, jax.random.key(samples)).nelbo_B
    np.testing.assert_allclose(got_N, nats_N, rtol=2e-5)


@pytest.mark.parametrize(("form", "refresh"), [("step", "step"), ("global", "once")])
def test_drawn_values_bound_the_exact_law_of_several_steps(bayes, form, refresh):
  times, x_L = samplers.times("uniform", 3), X_NxL[5]
  law = exact_log_prob(bayes, Linear(), times, jnp.asarray(x_L[None]), V, latent_refresh=refresh)
  own = {"step": {"step_counts": (3,), "samples": 2}, "global": {"estimator": "steps", "steps": 3}}
  objective = VMD(Linear(), V, form, sum_values=False, **own[form])
  nats_B = np.asarray(losses(objective, bayes, np.tile(x_L, (8192, 1)), jax.random.key(0)).nelbo_B)
  error = nats_B.std(ddof=1) / np.sqrt(len(nats_B))
  assert -law[0] - 3 * error < nats_B.mean() < -law[0] + 1.0
  bound = objective.bound(3, "uniform")
  assert bound.sum_values == (form == "step")
  assert losses(bound, bayes, X_NxL, jax.random.key(0)).nelbo_B is not None


def test_bayes_rule_is_refused_where_it_has_no_table():
  with pytest.raises(ValueError, match="not enumerated"):
    latents.CategoricalFamily(codes=2, classes=4, enumerated=False, prior="bayes")
  for family in (latents.GaussianFamily, latents.MixtureFamily):
    with pytest.raises(ValueError, match="latent prior 'bayes' of a"):
      family(prior="bayes")
  denoiser = networks.Transformer(V, width=16, depth=1, heads=2, classes=2)
  with pytest.raises(ValueError, match="no place for blocks or labels"):
    networks.with_latent(denoiser, latents.CategoricalFamily(classes=4, prior="bayes"))
