"""GenMD4: its bound and gradient by enumeration in float64, its sampler against the exact law."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from md4vmd import networks, rngs, row_losses, samplers
from md4vmd.evaluators.enumeration import exact_log_prob, subsets
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import MD4, GenMD4
from md4vmd.objectives.genmd4 import _Sets
from md4vmd.schedules import TABLE
from md4vmd.schedules.poly import Poly
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V = 3, 3
X_L = np.array([2, 0, 1])
POWER_V = np.array([0.6, 1.0, 1.9])
MASKS_SxL = subsets(L)
NODES, WEIGHTS = (a / 2 for a in np.polynomial.legendre.leggauss(60))
NODES = NODES + 0.5


def _fns(power_V, seed=0):
  return toys.random(L, V, sees_time=True, seed=seed)._replace(token_power=lambda: power_V)


def _time_rule():
  """Nodes and weights of an integral over t in (0, 1), dense near 0."""
  return NODES**4, 4 * NODES**3 * WEIGHTS


def _chance(power_L, t_J):
  """q(S | t): [J, S]."""
  rate_JxL = jnp.asarray(t_J)[:, None] ** jnp.asarray(power_L)[None, :]
  return jnp.prod(jnp.where(MASKS_SxL, rate_JxL[:, None], 1.0 - rate_JxL[:, None]), axis=-1)


def _integrand(fns, power_V, x_L):
  """Sum over masked tokens of b_n, [J, S], from all logits at once."""
  t_J, _ = _time_rule()
  zt_RxL = np.tile(np.where(MASKS_SxL, V, x_L), (len(t_J), 1))
  t_Rx1 = np.repeat(t_J, len(MASKS_SxL))[:, None]
  logits = fns.denoise(jnp.asarray(zt_RxL), jnp.asarray(t_Rx1)).logits()
  x_RxL = jnp.tile(jnp.asarray(x_L), (len(zt_RxL), 1))
  b_RxL = toys.PLAIN_ROW_LOSSES[toys.row_losses.power_weighted](logits, x_RxL, power_V)
  return jnp.where(MASKS_SxL, b_RxL.reshape(len(t_J), -1, L), 0.0).sum(-1)


def _exact_bound(power_V, fns=None, x_L=X_L):
  """int dt/t sum_S q(S | t) sum_n b_n."""
  t_J, weight_J = _time_rule()
  integrand_JxS = _integrand(fns or _fns(power_V), power_V, x_L)
  per_time_J = jnp.sum(_chance(power_V[x_L], t_J) * integrand_JxS, axis=-1)
  return jnp.sum(jnp.asarray(weight_J / t_J) * per_time_J)


@dataclasses.dataclass(frozen=True)
class Written(GenMD4):
  """GenMD4 whose times and sets the test writes down."""

  sets: _Sets | None = None

  def _sets(self, batch, draws, power_BxL):
    return self.sets


def _every_pair(power_V):
  """(probability_B, `_Sets`) of all times of the rule and all pairs of sets that are not empty."""
  t_J, weight_J = _time_rule()
  power_L = power_V[X_L]
  biased_JxS = np.asarray(_chance(power_L, t_J)) * (MASKS_SxL @ power_L)
  law_J = biased_JxS.sum(1)  # N t p(t)
  given_JxS = biased_JxS / law_J[:, None]
  j, a, b = (index.ravel() for index in np.indices((len(t_J), 2**L, 2**L)))
  keep = (a > 0) & (b > 0)
  j, a, b = j[keep], a[keep], b[keep]
  chance_B = weight_J[j] * law_J[j] / (L * t_J[j]) * given_JxS[j, a] * given_JxS[j, b]
  masks_BxKxL = jnp.asarray(np.stack([MASKS_SxL[a], MASKS_SxL[b]], axis=1))
  return chance_B, _Sets(jnp.log(t_J[j])[:, None], masks_BxKxL)


def _expected(power_V, chance_B, sets):
  """E of the loss over all its draws: the weight of an example is the probability of its draw."""
  count = len(chance_B)
  batch = _batch(count, weight_B=chance_B)
  objective = Written(TABLE["linear"](), V, sets=sets)
  draws = objective.draw(rngs.batch_noise(jax.random.key(0), count), batch)
  terms = objective.loss(_fns(power_V), batch, draws, step=jnp.zeros((), int))
  return terms.loss, terms.nelbo_B.sum()


def test_the_size_biased_estimate_averages_to_the_bound_and_its_gradient(x64):
  power_V = jnp.asarray(POWER_V)
  chance_B, sets = _every_pair(POWER_V)
  assert chance_B.sum() == pytest.approx(1.0, rel=1e-6)
  expected = functools.partial(_expected, chance_B=chance_B, sets=sets)
  gradient_V, nelbo = jax.jit(jax.grad(expected, has_aux=True))(power_V)
  exact, exact_gradient_V = jax.jit(jax.value_and_grad(_exact_bound))(power_V)
  np.testing.assert_allclose(nelbo, exact, rtol=1e-7)
  np.testing.assert_allclose(gradient_V, exact_gradient_V, rtol=1e-6)
  assert np.abs(exact_gradient_V).min() > 0.01


def test_tilted_draws_average_to_the_same_bound_and_gradient(x64):
  objective, batch = GenMD4(Poly(1.0), V, estimator="tilted"), _batch(256)

  def loss(power_V, key):
    draws = objective.draw(rngs.batch_noise(key, 256), batch)
    terms = objective.loss(_fns(power_V), batch, draws, step=jnp.zeros((), int))
    return terms.loss / 256, terms.nelbo_B.mean()

  slope = lambda key: jax.grad(loss, has_aux=True)(jnp.asarray(POWER_V), key)
  found = jax.jit(lambda key_K: jax.lax.map(slope, key_K))(jax.random.split(jax.random.key(0), 400))
  exact, exact_gradient_V = jax.value_and_grad(_exact_bound)(jnp.asarray(POWER_V))
  for each_K, true in zip(found, (exact_gradient_V, exact), strict=True):
    error = each_K.std(0, ddof=1) / np.sqrt(len(each_K))
    assert (error < 0.01 * np.abs(true).max()).all()
    assert (np.abs(each_K.mean(0) - true) < 4 * error).all()
  assert objective.bound(8, "cosine") == GenMD4(Poly(1.0), V, power="frozen")


def test_without_the_correction_the_gradient_would_be_wrong(x64):
  """The trap that the correction mends: a size-biased law has a score of mean other than 0."""
  chance_B, sets = _every_pair(POWER_V)
  score = lambda power_V: jnp.sum(
    chance_B
    * GenMD4(TABLE["linear"](), V)._score(
      jnp.ones((len(chance_B), L), bool),
      sets,
      jnp.broadcast_to(power_V[X_L], (len(chance_B), L)),
      jnp.stack([jnp.ones((len(chance_B), 1)), jnp.zeros((len(chance_B), 1))], axis=1),
      jnp.ones((len(chance_B), 1)),
    )
  )
  # E[1 s1] + E[0 s2] with the correction is 0.5 E[s1 + s2] = the mean of the score, which is not 0.
  assert np.abs(jax.grad(score)(jnp.asarray(POWER_V))).min() > 0.1


def test_times_and_sets_follow_the_density(x64):
  count = 20_000
  batch = _batch(count)
  objective = GenMD4(TABLE["linear"](), V)
  draws = objective.draw(rngs.batch_noise(jax.random.key(1), count), batch)
  sets = objective._sets(batch, draws, jnp.asarray(POWER_V)[batch.x_BxL])
  chance_B, every = _every_pair(POWER_V)
  code = lambda masks_BxKxL: np.asarray(masks_BxKxL) @ (1 << np.arange(L)) @ np.array([8, 1])
  seen = np.bincount(code(sets.is_masked_BxKxL), minlength=64)
  expected = np.bincount(code(every.is_masked_BxKxL), weights=chance_B, minlength=64) * count
  used = expected > 0
  assert (seen[~used] == 0).all()
  expected *= seen.sum() / expected.sum()
  assert scipy.stats.chisquare(seen[used], expected[used]).pvalue > 1e-3
  levels = lambda log_t_Bx1: np.exp(np.asarray(log_t_Bx1)[:, 0])
  mean = np.sum(chance_B * levels(every.log_t_BxG))
  assert levels(sets.log_t_BxG).mean() == pytest.approx(mean, abs=0.005)


def test_the_true_denoiser_reaches_the_entropy(x64):
  """It knows that a token which is masked late is the likelier one to be masked still."""
  support_MxL = np.array([[0, 1, 2], [2, 2, 0], [1, 0, 0], [0, 1, 1]])
  q_M = np.array([0.4, 0.3, 0.2, 0.1])
  is_token_MxLxV = np.eye(V)[support_MxL]

  def denoise(zt_BxL, t_BxG):
    is_masked_BxL = zt_BxL == V
    fits_BxM = (is_masked_BxL[:, None] | (zt_BxL[:, None] == support_MxL[None])).all(-1)
    masked_power_BxM = 1.0 * is_masked_BxL @ POWER_V[support_MxL].T
    mass_BxM = q_M[None] * fits_BxM * t_BxG**masked_power_BxM
    mass_BxLxV = jnp.einsum("bm,mlv->blv", mass_BxM, is_token_MxLxV)
    return toys.Logits(jnp.log(jnp.maximum(mass_BxLxV, 1e-300)))

  fns = ModelFns(jax.jit(denoise), token_power=lambda: jnp.asarray(POWER_V))
  bound = sum(
    q * _exact_bound(jnp.asarray(POWER_V), fns, x_L)
    for q, x_L in zip(q_M, support_MxL, strict=True)
  )
  assert bound == pytest.approx(-np.sum(q_M * np.log(q_M)), rel=1e-7)


def test_equal_powers_are_md4_on_the_same_masks(x64):
  power = 2.5
  batch = _batch(2**L - 1)
  masks_BxL = jnp.asarray(MASKS_SxL[1:])
  t_Bx1 = jnp.linspace(0.1, 0.9, len(masks_BxL))[:, None]
  sets = _Sets(jnp.log(t_Bx1), masks_BxL[:, None])
  objective = Written(Poly(power), V, power="frozen", sets=sets)
  noise = rngs.batch_noise(jax.random.key(0), len(masks_BxL))
  fns = _fns(jnp.full(V, power))
  loss = lambda objective: jax.jit(functools.partial(objective.loss, fns, step=jnp.zeros((), int)))
  ours = loss(objective)(batch, objective.draw(noise, batch))
  md4 = MD4(Poly(power), V)
  count_Bx1 = masks_BxL.sum(-1, keepdims=True)
  draws = dataclasses.replace(
    md4.draw(noise, batch),
    t_BxG=t_Bx1,
    weight_BxG=L / count_Bx1,
    count_BxG=count_Bx1,
    uniform_BxL=jnp.where(masks_BxL, 0.0, 1.0),
  )
  theirs = loss(md4)(batch, draws)
  np.testing.assert_allclose(ours.nelbo_B, theirs.nelbo_B, rtol=1e-12)


@functools.partial(jax.jit, static_argnums=1)
def _real_loss(power_V, objective, batch):
  noise = rngs.batch_noise(jax.random.key(3), len(batch.x_BxL))
  draws = objective.draw(noise, batch)
  terms = objective.loss(_fns(power_V), batch, draws, step=jnp.zeros((), int))
  return terms.loss, terms


def _batch(count=16, **fields):
  return toys.make_batch(np.broadcast_to(X_L, (count, L)), **fields)


def test_a_uniform_denoiser_costs_log_v_at_equal_powers(x64):
  fns = toys.constant(np.zeros((L, V)))._replace(token_power=lambda: jnp.full(V, 1.7))
  batch = _batch(8)
  objective = GenMD4(Poly(1.7), V)
  draws = objective.draw(rngs.batch_noise(jax.random.key(0), 8), batch)
  terms = jax.jit(functools.partial(objective.loss, fns, step=jnp.zeros((), int)))(batch, draws)
  np.testing.assert_allclose(terms.nelbo_B, L * np.log(V), rtol=1e-12)
  np.testing.assert_allclose(terms.loss, terms.nelbo_B.sum(), rtol=1e-12)  # no surrogate in the log


def test_frozen_powers_have_no_gradient(x64):
  frozen = GenMD4(Poly(1.0), V, power="frozen")
  slope_V, _ = jax.grad(_real_loss, has_aux=True)(jnp.asarray(POWER_V), frozen, _batch())
  assert (slope_V == 0).all()


def test_a_decay_is_charged_in_the_loss_and_not_in_the_bound(x64):
  pulled = GenMD4(Poly(1.0), V, power_decay=2.0)
  loss, terms = _real_loss(jnp.asarray(POWER_V), pulled, _batch())
  decay = 2.0 * 16 * L * np.mean(np.log(POWER_V) ** 2)
  np.testing.assert_allclose(loss - terms.nelbo_B.sum(), decay, rtol=1e-9)
  assert pulled.bound(8, "cosine") == GenMD4(Poly(1.0), V, power="frozen")


def test_clues_are_never_masked_and_examples_without_weight_or_free_tokens_cost_nothing(x64):
  given_BxL = np.zeros((16, L), bool)
  given_BxL[:, 1] = True
  given_BxL[3] = True
  weight_B = np.ones(16)
  weight_B[5] = 0.0
  objective = GenMD4(Poly(1.0), V)
  batch = _batch(given_BxL=given_BxL, weight_B=weight_B)
  grad = jax.value_and_grad(_real_loss, has_aux=True)
  (_, terms), gradient_V = grad(jnp.asarray(POWER_V), objective, batch)
  assert (np.asarray(terms.nelbo_B)[[3, 5]] == 0).all() and (terms.nelbo_B[:3] > 0).all()
  assert np.isfinite(gradient_V).all() and gradient_V[X_L[1]] != 0  # through E_mu[w] alone
  draws = objective.draw(rngs.batch_noise(jax.random.key(3), 16), batch)
  sets = objective._sets(batch, draws, jnp.asarray(POWER_V)[batch.x_BxL])
  assert not (np.asarray(sets.is_masked_BxKxL) & given_BxL[:, None]).any()
  assert sets.is_masked_BxKxL.any((1, 2)).sum() == 15


# --- the sampler ------------------------------------------------------------------------------


def test_the_exact_law_is_a_law_and_at_equal_powers_that_of_md4(x64):
  x_NxL = jnp.asarray(toys.sequences(L, V))
  times = samplers.times("cosine", 4)
  log_p = lambda fns, schedule: exact_log_prob(fns, schedule, times, x_NxL, V)
  ours = log_p(_fns(jnp.asarray(POWER_V)), Poly(1.0))
  np.testing.assert_allclose(np.exp(ours).sum(), 1.0, rtol=1e-12)
  equal = log_p(_fns(jnp.full(V, 1.4)), Poly(1.0))
  shared = log_p(toys.random(L, V, sees_time=True), Poly(1.4))
  np.testing.assert_allclose(equal, shared, rtol=1e-10)


def test_the_bound_lies_above_the_exact_law_of_many_steps(x64):
  fns = _fns(jnp.asarray(POWER_V))
  times = samplers.times("uniform", 200)
  exact = -exact_log_prob(fns, Poly(1.0), times, jnp.asarray(X_L)[None], V)[0]
  assert 0 < exact < _exact_bound(jnp.asarray(POWER_V))


@pytest.mark.parametrize("grid", ["cosine", "uniform"])
def test_samples_follow_the_exact_law(grid):
  fns, count, times = _fns(jnp.asarray(POWER_V)), 20_000, samplers.times(grid, 4)
  draw = jax.jit(
    lambda key: samplers.sample(
      key,
      fns,
      Poly(1.0),
      samplers.TokenAncestral(),
      times,
      tokens_BxL=jnp.zeros((count, L), int),
      free_BxL=jnp.ones((count, L), bool),
      vocab_size=V,
    )
  )
  samples = draw(jax.random.key(0))
  every_NxL = toys.sequences(L, V)
  log_p_N = exact_log_prob(fns, Poly(1.0), times, jnp.asarray(every_NxL), V)
  seen_N = np.bincount(
    np.asarray(samples.x_BxL) @ V ** np.arange(L)[::-1], minlength=len(every_NxL)
  )
  expected_N = np.exp(np.asarray(log_p_N, float))
  expected_N *= count / expected_N.sum()
  assert scipy.stats.chisquare(seen_N, expected_N).pvalue > 1e-3
  assert samples.calls_B.min() >= 1 and samples.calls_B.max() <= 4
  assert (samples.call_BxL < samples.calls_B[:, None]).all() and (samples.call_BxL >= 0).all()


def test_samplers_of_one_schedule_and_of_many_refuse_each_others_models():
  tokens = {
    "tokens_BxL": jnp.zeros((1, L), int),
    "free_BxL": jnp.ones((1, L), bool),
    "vocab_size": V,
  }
  times = samplers.times("cosine", 4)
  run = lambda fns, step: samplers.sample(jax.random.key(0), fns, Poly(1.0), step, times, **tokens)
  with pytest.raises(ValueError, match="token_ancestral"):
    run(_fns(jnp.asarray(POWER_V)), samplers.Ancestral())
  with pytest.raises(ValueError, match="token_ancestral"):
    run(toys.random(L, V, sees_time=True), samplers.TokenAncestral())


def test_the_network_starts_at_the_powers_of_the_schedule():
  denoiser = networks.Transformer(V, width=16, depth=1, heads=2, condition_width=8)
  network = networks.TokenPowerNetwork(denoiser, initial=1.3)
  params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, L), int), jnp.ones((1, 1)))[
    "params"
  ]
  fns = networks.bind(network, params)
  assert isinstance(fns, ModelFns)
  np.testing.assert_allclose(fns.token_power(), np.full(V, 1.3), rtol=1e-6)


@pytest.mark.parametrize(
  ("settings", "rule"),
  [
    ({"schedule": TABLE["cosine"]()}, "'linear' or 'poly', not 'cosine'"),
    ({"power": "fixed"}, "one of learned, frozen"),
    ({"estimator": "time"}, "'genmd4' must be one of count, tilted"),
    ({"power_decay": -1.0}, "power_decay is -1.0; it must be 0, or positive"),
    ({"power_decay": 1.0, "power": "frozen"}, "positive with power 'learned'"),
  ],
)
def test_settings_that_mean_nothing_are_refused(settings, rule):
  with pytest.raises(ValueError, match=rule):
    GenMD4(**{"schedule": TABLE["linear"](), "vocab_size": V} | settings)


@pytest.mark.parametrize("name", ["power_weighted", "power_gradient"])
def test_products_that_nearly_cancel_are_not_left_to_the_fast_ones_of_a_device(name):
  """Those of GenMD4's loss of a token and of its gradient in the powers."""
  ones = jnp.ones
  rows = row_losses.Rows(jnp.zeros(8, int), ones((8, 4)), ones(8), ones(8), ones(8), ones(4), 4)
  arguments = (rows.sum_K,) if name == "power_gradient" else ()
  program = str(jax.make_jaxpr(lambda: getattr(row_losses, name)(rows, *arguments))())
  assert program.count("dot_general") == 1
  assert "Precision.HIGHEST" in program
