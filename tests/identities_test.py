"""MATHS: the bound, its estimators and the sampler's exact law, by enumeration in float64.

An expectation over masks is a sum over all 2^L of them; one over times is a Gauss-Legendre sum.
`toys.Script` hands the objective its draws, so what is summed is the code that training runs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from md4vmd import networks, rngs, samplers
from md4vmd.evaluators.enumeration import exact_log_prob, subsets
from md4vmd.objectives import MD4
from md4vmd.schedules import TABLE
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V = 3, 3
X_L = np.array([2, 0, 1])
NODES, WEIGHTS = (a / 2 for a in np.polynomial.legendre.leggauss(40))
NODES = NODES + 0.5
ROWS = 512
LEFT_S = subsets(L).sum(-1)  # number of masked positions of every set
every_schedule = pytest.mark.parametrize("schedule", [make() for make in TABLE.values()], ids=TABLE)
either_net = pytest.mark.parametrize("sees_time", [False, True], ids=["time-free", "sees-t"])
UNIFORM = toys.constant(np.zeros((L, V)))


@pytest.fixture
def net(sees_time):
  return toys.random(L, V, sees_time=sees_time)


def _ends(schedule):
  """Masking rates (r0, r1) at t=0 and t=1: exactly 0 and 1 unless the schedule has loose ends."""
  return tuple(1.0 - np.asarray(schedule.alpha(jnp.array([0.0, 1.0]))))


def _rates(schedule, *, whole):
  """Quadrature over masking rates: times t_J, rates r_J and weights dr_J.

  It covers [r0, r1]; with `whole` all of [0, 1], where t is 0 below r0 and 1 above r1.
  """
  r0, r1 = _ends(schedule)
  t_J, dr_J = NODES, -np.asarray(schedule.dalpha(jnp.asarray(NODES))) * WEIGHTS
  r_J = 1.0 - np.asarray(schedule.alpha(jnp.asarray(NODES)))
  if not whole or (r0, r1) == (0.0, 1.0):
    return t_J, r_J, dr_J
  t_J = np.concatenate([0 * NODES, t_J, 0 * NODES + 1])
  r_J = np.concatenate([r0 * NODES, r_J, r1 + (1 - r1) * NODES])
  return t_J, r_J, np.concatenate([r0 * WEIGHTS, dr_J, (1 - r1) * WEIGHTS])


def _chance(r_J):
  """P(masked set | rate): [J, S]."""
  r_Jx1 = np.asarray(r_J)[:, None]
  return r_Jx1**LEFT_S * (1 - r_Jx1) ** (L - LEFT_S)


def _exact_bound(schedule, fns, x_L=X_L, *, whole=True):
  """L = integral of dr / r E CE(masked set, t), in numpy: what every estimator must average to."""
  t_J, r_J, dr_J = _rates(schedule, whole=whole)
  ce_JxS = toys.masked_nll(fns, x_L, t_J, V).sum(-1)
  return np.sum((dr_J / r_J)[:, None] * _chance(r_J) * ce_JxS)


def _exact_steps(schedule, fns, times, x_L=X_L):
  """NELBO_T over a grid of times in numpy, with both end terms."""
  t_J, alpha_K = np.asarray(times[:-1]), np.asarray(schedule.alpha(times))
  u_J = (alpha_K[1:] - alpha_K[:-1]) / (1 - alpha_K[:-1])
  ce_JxS = toys.masked_nll(fns, x_L, t_J, V).sum(-1)
  loose = L * np.log(V) * (alpha_K[0] + 1 - alpha_K[-1])
  return np.sum(u_J[:, None] * _chance(1 - alpha_K[:-1]) * ce_JxS) + loose


def _expected(objective, fns, x_L=X_L):
  """E nelbo of one draw of our objective, over its own laws of times, counts and masks."""
  schedule = objective.schedule
  if objective.estimator in ("count", "tilted"):
    _, r_J, dr_J = _rates(schedule, whole=True)
    j, s = (index.ravel() for index in np.indices((len(r_J), 2**L)))
    j, s = j[LEFT_S[s] > 0], s[LEFT_S[s] > 0]
    k, power = LEFT_S[s], 0.5 if objective.estimator == "tilted" else 1.0
    first_B, last_B = ((k - 1) / L) ** power, (k / L) ** power  # the places that mean k tokens
    chance_B = scipy.stats.beta.pdf(r_J[j], k, L - k + 1) * dr_J[j] / scipy.special.comb(L, k)
    chance_B, u_B, rate_B = chance_B * (last_B - first_B), (first_B + last_B) / 2, r_J[j]
  else:
    if objective.estimator == "time":
      t_J, weight_J = NODES, WEIGHTS
      u_J = 1.0 - t_J
    else:
      t_J = (np.arange(objective.steps) + 1) / objective.steps
      weight_J, u_J = np.full(len(t_J), 1 / len(t_J)), t_J - 0.5 / len(t_J)
    chance_JxS = _chance(1.0 - np.asarray(schedule.alpha(jnp.asarray(t_J))))
    # A set that cannot be masked at rate 1 has chance 0 and is left out.
    j, s = np.nonzero(chance_JxS)
    chance_B = (weight_J[:, None] * chance_JxS)[j, s]
    u_B, rate_B = u_J[j], np.ones(len(j))
  np.testing.assert_allclose(chance_B.sum(), 1.0, rtol=1e-9)
  rows = np.resize(np.arange(len(s)), -(-len(s) // ROWS) * ROWS)  # few shapes, few compilations
  chance_B = np.where(np.arange(len(rows)) < len(s), chance_B[rows], 0.0)
  x_BxL = np.broadcast_to(x_L, (len(rows), L))
  terms = toys.forced_loss_terms(
    objective, fns, x_BxL, u_B[rows], subsets(L)[s[rows]], rate_B[rows]
  )
  return float(np.sum(chance_B * np.asarray(terms.nelbo_B)))


def _mean_over_orders(fns):
  """Mean over all orders of the NLL of revealing one token after another."""
  nll_SxL = toys.masked_nll(fns, X_L, np.array([0.5]), V)[0]
  row = {
    tuple(np.flatnonzero(masked)): nll_L for masked, nll_L in zip(subsets(L), nll_SxL, strict=True)
  }
  orders = list(itertools.permutations(range(L)))
  return np.mean(
    [sum(row[tuple(sorted(order[i:]))][order[i]] for i in range(L)) for order in orders]
  )


# --- the continuous bound ---------------------------------------------------------------------


@every_schedule
@either_net
def test_counts_and_times_average_to_the_exact_bound(schedule, net, x64):
  exact = _exact_bound(schedule, net)
  assert _expected(MD4(schedule, V, "count"), net) == pytest.approx(exact, rel=1e-9)
  assert _expected(MD4(schedule, V, "tilted"), net) == pytest.approx(exact, rel=1e-9)
  loose = L * np.log(V) * sum(abs(np.array(_ends(schedule)) - (0, 1)))
  between_ends = _exact_bound(schedule, net, whole=False)
  time = _expected(MD4(schedule, V, "time"), net)
  assert time == pytest.approx(between_ends + loose, rel=1e-9)


@every_schedule
def test_a_time_free_denoiser_has_the_same_bound_under_every_schedule(schedule, x64):
  net = toys.random(L, V, sees_time=False)
  bound = _exact_bound(Linear(), net)
  assert _expected(MD4(schedule, V, "count"), net) == pytest.approx(bound, rel=1e-9)
  r0, r1 = _ends(schedule)
  worst = L * max(np.log(V), toys.masked_nll(net, X_L, np.array([0.5]), V).max())
  # `time` differs by what happens outside [r0, r1] alone: nothing, for exact ends.
  ends = worst * (r0 + (1 - r1))
  assert abs(_expected(MD4(schedule, V, "time"), net) - bound) <= ends + 1e-9


@pytest.mark.parametrize("estimator", ["count", "time"])
def test_a_denoiser_that_sees_t_has_a_bound_that_depends_on_the_schedule(estimator, x64):
  net = toys.random(L, V, sees_time=True)
  bounds = [_expected(MD4(TABLE[name](), V, estimator), net) for name in ("linear", "cosine")]
  assert abs(bounds[0] - bounds[1]) > 1e-2


def test_the_counting_form_is_the_mean_over_all_orders(x64):
  net = toys.random(L, V, sees_time=False)
  orders = _mean_over_orders(net)
  ce_S = toys.masked_nll(net, X_L, np.array([0.5]), V)[0].sum(-1)
  counting = sum(ce_S[k == LEFT_S].mean() / k for k in range(1, L + 1))
  assert counting == pytest.approx(orders, rel=1e-12)
  assert _expected(MD4(Linear(), V, "count"), net) == pytest.approx(orders, rel=1e-9)
  assert _exact_bound(Linear(), net) == pytest.approx(orders, rel=1e-9)


# --- the bound of T steps ---------------------------------------------------------------------


@every_schedule
@either_net
@pytest.mark.parametrize("steps", [1, 5])
def test_steps_average_to_the_bound_of_the_grid(schedule, steps, net, x64):
  exact = _exact_steps(schedule, net, samplers.times("uniform", steps))
  assert _expected(MD4(schedule, V, "steps", steps), net) == pytest.approx(exact, rel=1e-9)


@every_schedule
@either_net
def test_the_bound_of_t_steps_tends_to_the_continuous_bound_at_rate_1_over_t(schedule, net, x64):
  limit = _expected(MD4(schedule, V, "time"), net)
  at = lambda steps: _exact_steps(schedule, net, samplers.times("uniform", steps))
  gaps = np.abs([at(steps) - limit for steps in (256, 512, 1024)])
  assert gaps[2] < 0.02
  np.testing.assert_allclose(gaps[1:] / gaps[:-1], 0.5, atol=0.05)


@functools.cache
def _compiled_law(sees_time, schedule):
  fns, x_XxL = toys.random(L, V, sees_time=sees_time), jnp.asarray(toys.sequences(L, V))
  return jax.jit(lambda times: -exact_log_prob(fns, schedule, times, x_XxL, V))


@every_schedule
@either_net
@pytest.mark.parametrize("grid", samplers.GRIDS)
def test_exact_nll_is_normalised_and_below_the_bound(schedule, sees_time, net, grid, x64):
  times = samplers.times(grid, 4)
  nll_X = np.asarray(_compiled_law(sees_time, schedule)(times))
  assert np.exp(-nll_X).sum() == pytest.approx(1.0, abs=1e-12)
  bound_X = np.array([_exact_steps(schedule, net, times, x_L) for x_L in toys.sequences(L, V)])
  assert (bound_X - nll_X).min() > 1e-6
  assert (bound_X - nll_X).max() < 5.0


@every_schedule
def test_the_law_of_one_step_is_a_product_given_what_is_visible_at_1(schedule, x64):
  net, times = toys.random(L, V, sees_time=True), samplers.times("uniform", 1)
  nll_X = np.asarray(_compiled_law(True, schedule)(times))
  r0, r1 = _ends(schedule)  # a token is uniform if it is visible at t=1 or masked at t=0
  by_hand_X = []
  for x_L in toys.sequences(L, V):
    mu_SxL = np.exp(-toys.masked_nll(net, x_L, [1.0], V)[0])
    revealed_SxL = (1 - r0 / r1) * mu_SxL + r0 / r1 / V
    given_SxL = np.where(subsets(L), revealed_SxL, 1 / V)
    by_hand_X.append(-np.log(np.sum(_chance([r1])[0] * given_SxL.prod(-1))))
  np.testing.assert_allclose(nll_X, by_hand_X, rtol=1e-12)
  bound_X = np.array([_exact_steps(schedule, net, times, x_L) for x_L in toys.sequences(L, V)])
  if (r0, r1) == (0.0, 1.0):
    np.testing.assert_allclose(bound_X, nll_X, rtol=1e-12)
  else:
    assert (bound_X - nll_X).min() > 0


def test_linear_schedule_on_a_cosine_grid_is_cosine_schedule_on_a_uniform_grid(x64):
  def both(sees_time):
    for schedule, grid in [("linear", "cosine"), ("cosine", "uniform")]:
      yield _compiled_law(sees_time, TABLE[schedule]())(samplers.times(grid, 4))

  np.testing.assert_allclose(*both(sees_time=False), rtol=1e-10)
  first_X, second_X = both(sees_time=True)
  assert jnp.abs(first_X - second_X).max() > 1e-2  # mu sees other times


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_the_law_of_a_real_network_is_normalised_and_depends_on_t(make_network, time_conditioning):
  network, params = make_network(length=L, vocab_size=V, time_conditioning=time_conditioning)
  fns = networks.bind(network, params)
  x_XxL = jnp.asarray(toys.sequences(L, V))
  log_p = jax.jit(lambda times: exact_log_prob(fns, Linear(), times, x_XxL, V))
  log_p_X = np.asarray(log_p(jnp.array([1.0, 0.5, 0.0])), np.float64)
  assert np.exp(log_p_X).sum() == pytest.approx(1.0, abs=1e-5)
  assert log_p_X.std() > 0.1
  zt_BxL = jnp.full((2, L), V)
  predict = jax.jit(lambda t_BxG: fns.denoise(zt_BxL, t_BxG).logits())
  logits_BxLxV = predict(jnp.array([[1.0], [0.5]]))
  assert (logits_BxLxV[0] != logits_BxLxV[1]).any() == time_conditioning


def test_sequences_too_long_to_enumerate_are_refused():
  x_NxL = jnp.zeros((1, 11), int)
  with pytest.raises(ValueError, match=r"L=11 is above 10: use the likelihood evaluator"):
    exact_log_prob(UNIFORM, Linear(), samplers.times("uniform", 2), x_NxL, V)


# --- denoisers whose bound is known -----------------------------------------------------------

SUPPORT_MxL = np.array([[0, 1, 2], [0, 1, 0], [2, 2, 1], [1, 0, 0], [2, 1, 2]])
PROBABILITIES_M = np.array([0.35, 0.05, 0.25, 0.2, 0.15])
ENTROPY = -np.sum(PROBABILITIES_M * np.log(PROBABILITIES_M))


@every_schedule
def test_the_true_denoiser_has_the_entropy_as_its_mean_bound(schedule, x64):
  true = toys.posterior(SUPPORT_MxL, PROBABILITIES_M, V)
  mean = lambda objective: sum(
    p * _expected(objective, true, x_L) for p, x_L in zip(PROBABILITIES_M, SUPPORT_MxL, strict=True)
  )
  assert mean(MD4(schedule, V, "count")) == pytest.approx(ENTROPY, rel=1e-9)
  # Outside [r0, r1] `time` pays ln V per token instead of the exact cost.
  ends = L * np.log(V) * (1 - np.subtract(*_ends(schedule)[::-1]))
  assert ENTROPY - 1e-9 <= mean(MD4(schedule, V, "time")) <= ENTROPY + ends + 1e-9


def test_the_true_denoisers_bound_of_t_steps_falls_to_the_entropy(x64):
  true = toys.posterior(SUPPORT_MxL, PROBABILITIES_M, V)
  bounds = []
  for steps in (1, 2, 4, 8, 64):
    times = samplers.times("uniform", steps)
    each = [_exact_steps(Linear(), true, times, x_L) for x_L in SUPPORT_MxL]
    bounds.append(PROBABILITIES_M @ each)
  assert (np.diff(bounds) < 0).all() and bounds[-1] > ENTROPY
  marginals = [PROBABILITIES_M @ np.eye(V)[SUPPORT_MxL[:, i]] for i in range(L)]
  assert bounds[0] == pytest.approx(sum(map(scipy.stats.entropy, marginals)), rel=1e-12)


@every_schedule
@pytest.mark.parametrize(
  ("estimator", "steps"), [("count", None), ("tilted", None), ("time", None), ("steps", 7)]
)
def test_a_uniform_denoiser_costs_log_v_per_token(schedule, estimator, steps, x64):
  bound = _expected(MD4(schedule, V, estimator, steps), UNIFORM)
  assert bound == pytest.approx(L * np.log(V), rel=1e-9)


# --- random draws -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "estimator", "steps", "sees_time"),
  [
    ("linear", "count", None, False),
    ("poly", "count", None, True),
    ("cosine", "tilted", None, True),
    ("geometric", "time", None, True),
    ("cosine", "steps", 3, True),
  ],
)
def test_real_draws_average_to_the_enumerated_bound(name, estimator, steps, sees_time):
  net, batch_size = toys.random(L, V, sees_time=sees_time), 32
  objective = MD4(TABLE[name](), V, estimator, steps)
  batch = toys.make_batch(np.tile(X_L, (batch_size, 1)))

  @jax.jit
  @jax.vmap
  def estimate(key):
    draws = objective.draw(rngs.batch_noise(key, batch_size), batch)
    terms = objective.loss(net, batch, draws, step=jnp.zeros((), int))
    return terms.loss / batch_size, terms.nelbo_B.mean()

  loss_K, nelbo_K = map(np.asarray, estimate(jax.random.split(jax.random.key(0), 400)))
  with jax.enable_x64(True):
    bound = _expected(objective, net)
    loose = sum(abs(np.array(_ends(objective.schedule)) - (0, 1))) if name == "geometric" else 0
  error = nelbo_K.std(ddof=1) / np.sqrt(len(nelbo_K))
  assert 0 < error < 0.05 * bound
  assert abs(nelbo_K.mean() - bound) < 4 * error
  assert abs(loss_K.mean() + L * np.log(V) * loose - bound) < 4 * error
