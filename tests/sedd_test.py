"""SEDD and D3PM: their bounds against MD4's on the same draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import rngs
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import MD4, SEDD
from md4vmd.schedules import TABLE
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V = 4, 3
BATCH = toys.make_batch(np.random.default_rng(0).integers(V, size=(8, L)))
CASES = [(name, "time") for name in TABLE] + [("cosine", "count")]


@functools.partial(jax.jit, static_argnums=0)
def _terms(objective, logits_shift):
  """LossTerms and draws of a random network whose logits are all moved by a number."""
  base = toys.random(L, V, sees_time=True)

  def denoise(zt_BxL, t_BxG, **inputs):
    logits_BxLxV = base.denoise(zt_BxL, t_BxG, **inputs).logits()
    normalised_BxLxV = jax.nn.log_softmax(logits_BxLxV) + jnp.log(1.0 * V)
    return toys.Logits(normalised_BxLxV + logits_shift)

  draws = objective.draw(rngs.batch_noise(jax.random.key(0), 8), BATCH)
  return objective.loss(ModelFns(denoise), BATCH, draws, step=jnp.zeros((), int)), draws


@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_score_entropy_is_md4_and_the_price_of_the_normaliser(name, estimator, x64):
  """Per masked token, MD4's weight times c - 1 - log c."""
  schedule, shift = TABLE[name](), 0.7
  md4, draws = _terms(MD4(schedule, V, estimator), shift)
  sedd, _ = _terms(SEDD(schedule, V, estimator), shift)
  is_masked_BxL = MD4(schedule, V, estimator).is_masked(BATCH, draws)
  price_B = (draws.weight_BxG * is_masked_BxL.sum(-1, keepdims=True))[:, 0]
  price_B *= np.exp(shift) - 1 - shift
  np.testing.assert_allclose(sedd.nelbo_B, md4.nelbo_B + price_B, rtol=1e-9)
  np.testing.assert_allclose(sedd.parts["normalised"], md4.parts["diffusion"], rtol=1e-9)
  np.testing.assert_allclose(sum(sedd.parts.values()), sedd.nelbo_B, rtol=1e-12)


def test_score_entropy_from_its_definition(x64):
  """int sigma' [sum_j s_j - r log s_x + r (log r - 1)], r = alpha / (1 - alpha), at the drawn t."""
  schedule, shift = TABLE["cosine"](), -0.4
  sedd, draws = _terms(SEDD(schedule, V, "time"), shift)
  t_Bx1 = draws.t_BxG
  r_Bx1 = schedule.alpha(t_Bx1) / (1.0 - schedule.alpha(t_Bx1))
  rate_Bx1 = -schedule.dalpha(t_Bx1) / schedule.alpha(t_Bx1)
  is_masked_BxL = SEDD(schedule, V, "time").is_masked(BATCH, draws)
  zt_BxL = jnp.where(is_masked_BxL, V, BATCH.x_BxL)
  logits_BxLxV = toys.random(L, V, sees_time=True).denoise(zt_BxL, t_Bx1).logits()
  score_BxLxV = r_Bx1[..., None] * jax.nn.softmax(logits_BxLxV) * np.exp(shift)
  score_BxL = jnp.take_along_axis(score_BxLxV, BATCH.x_BxL[..., None], axis=-1)[..., 0]
  entropy_BxL = score_BxLxV.sum(-1) - r_Bx1 * jnp.log(score_BxL) + r_Bx1 * (jnp.log(r_Bx1) - 1.0)
  nats_B = jnp.sum(jnp.where(is_masked_BxL, rate_Bx1 * entropy_BxL, 0.0), axis=-1)
  np.testing.assert_allclose(sedd.nelbo_B, nats_B, rtol=1e-9)


def test_sedd_has_no_discrete_time():
  with pytest.raises(ValueError, match="no estimator 'steps'"):
    SEDD(TABLE["linear"](), V, "steps", 4)


def test_the_auxiliary_cross_entropy_is_in_the_loss_and_not_in_the_bound(x64):
  d3pm = MD4(TABLE["linear"](), V, "steps", 10, auxiliary=0.25)
  with_auxiliary, draws = _terms(d3pm, 0.0)
  plain, _ = _terms(dataclasses.replace(d3pm, auxiliary=0.0), 0.0)
  np.testing.assert_array_equal(with_auxiliary.nelbo_B, plain.nelbo_B)
  # A step of T, scaled by T as the bound is: T * auxiliary for every masked token's nats.
  unweighted_B = plain.nelbo_B / draws.weight_BxG[:, 0]
  extra = with_auxiliary.loss - plain.loss
  np.testing.assert_allclose(extra, 10 * 0.25 * unweighted_B.sum(), rtol=1e-9)


def test_a_bound_in_discrete_time_says_which_sampler_it_is_of():
  figure = MD4(TABLE["linear"](), V, "steps", 1000).convention
  sampler = "the sampler with T=1000 steps on the uniform grid"
  assert figure == f"MD4 bound on -log p of {sampler}, estimator 'steps'"
  blocks = MD4(TABLE["linear"](), V, "steps", 8, block_size=2).convention
  assert "T=8 steps on the uniform grid in blocks of 2," in blocks
  assert "grid" not in MD4(TABLE["linear"](), V).convention


@pytest.mark.parametrize(
  "settings", [{"auxiliary": 0.1}, {"auxiliary": -1.0, "estimator": "steps"}]
)
def test_an_auxiliary_term_that_means_nothing_is_refused(settings):
  with pytest.raises(ValueError, match="objective auxiliary"):
    MD4(TABLE["linear"](), V, **settings, **({"steps": 3} if "estimator" in settings else {}))
