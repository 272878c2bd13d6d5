import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import forward
from md4vmd.schedules import TABLE, Poly

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "md4_schedules.npz")
SCHEDULES = {name: make() for name, make in TABLE.items()} | {
  "poly0.5": Poly(0.5),
  "poly3": Poly(3.0),
}
EPS = 1e-4  # the reference's alpha is (1 - 2 eps) alpha + eps
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@every_schedule
def test_dalpha_is_the_derivative_of_alpha(schedule, x64):
  t = jnp.linspace(0.01, 0.99, 99)
  np.testing.assert_allclose(schedule.dalpha(t), jax.vmap(jax.grad(schedule.alpha))(t), rtol=1e-9)


@every_schedule
def test_alpha_inverse_undoes_alpha_both_ways(schedule, x64):
  t = jnp.linspace(0.02, 0.98, 49)
  np.testing.assert_allclose(schedule.alpha_inverse(schedule.alpha(t)), t, rtol=1e-8)
  a = jnp.linspace(0.02, 0.98, 49)
  np.testing.assert_allclose(schedule.alpha(schedule.alpha_inverse(a)), a, rtol=1e-10)


@every_schedule
def test_alpha_inverse_of_any_probability_is_a_time(schedule):
  t = schedule.alpha_inverse(jnp.array([0.0, 1e-30, 0.5, 1.0 - 2.0**-24, 1.0]))
  assert (t >= 0).all() and (t <= 1).all() and (jnp.diff(t) <= 0).all()


@every_schedule
def test_the_weight_is_minus_dalpha_over_one_minus_alpha(schedule, x64):
  t = jnp.linspace(0.01, 1.0, 100)
  weight = -schedule.dalpha(t) / (1.0 - schedule.alpha(t))
  np.testing.assert_allclose(schedule.weight(t), weight, rtol=1e-9, atol=1e-15)


@every_schedule
def test_alpha_never_rises_and_no_weight_is_negative_in_float32(schedule):
  t = jnp.linspace(0.001, 1.0, 1000)
  assert (jnp.diff(schedule.alpha(t)) <= 0).all()
  assert (schedule.dalpha(t) <= 0).all()
  assert (schedule.weight(t) >= 0).all() and jnp.isfinite(schedule.weight(t)).all()


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "geometric"])
def test_alpha_is_exactly_one_at_0_and_zero_at_1(name):
  assert SCHEDULES[name].alpha(jnp.array([0.0, 1.0])).tolist() == [1.0, 0.0]


def test_geometric_ends_where_its_betas_say(x64):
  ends = TABLE["geometric"](beta_min=0.01, beta_max=3.0).alpha(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(ends, np.exp([-0.01, -3.0]), rtol=1e-14)


@every_schedule
def test_a_schedule_acts_elementwise_on_any_shape(schedule):
  t = jnp.linspace(0.1, 0.9, 6)
  for name in ("alpha", "masked", "dalpha", "alpha_inverse", "weight"):
    function = getattr(schedule, name)
    table = function(t.reshape(2, 3))
    assert table.shape == (2, 3)
    np.testing.assert_array_equal(table.reshape(6), function(t))
    assert function(t[0]).shape == ()


def test_poly_takes_one_power_per_token(x64):
  power = jnp.array([0.5, 1.0, 4.0])
  t = jnp.array([[0.2], [0.7]])
  alpha = Poly(power[None, :]).alpha(t)
  np.testing.assert_allclose(alpha, 1 - np.array([[0.2], [0.7]]) ** np.array(power), rtol=1e-14)


@pytest.mark.parametrize("golden", ["linear", "cosine", "poly2", "poly3", "poly0.5"])
def test_schedules_are_those_of_the_reference_after_its_eps(golden, x64):
  schedule = SCHEDULES[golden.replace("poly2", "poly")]
  t = jnp.asarray(GOLDEN["t"], float)
  alpha = (1 - 2 * EPS) * schedule.alpha(t) + EPS
  dalpha = (1 - 2 * EPS) * schedule.dalpha(t)
  np.testing.assert_allclose(alpha, GOLDEN[f"{golden}/alpha"], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(dalpha, GOLDEN[f"{golden}/dalpha"], rtol=1e-5, atol=1e-6)
  weight, reference = -dalpha / (1 - alpha), -GOLDEN[f"{golden}/dgamma_times_alpha"]
  digits = 1e-5 + 2.0**-23 / (1 - alpha)  # the reference rounds alpha to float32
  is_finite = np.isfinite(weight)
  assert (np.isinf(reference) == ~is_finite).all()
  error = np.abs(weight - reference)[is_finite]
  assert (error <= (weight * digits)[is_finite] + 1e-6).all()


@every_schedule
def test_masked_is_one_minus_alpha_with_all_its_digits(schedule, x64):
  t = jnp.concatenate([jnp.zeros(1), jnp.logspace(-12, 0, 49)])
  np.testing.assert_allclose(schedule.masked(t), 1.0 - schedule.alpha(t), rtol=0, atol=1e-15)
  # Where alpha rounds to 1: the integral of -alpha' over s = t v^4, v by Gauss and Legendre.
  node_K, weight_K = np.polynomial.legendre.leggauss(80)
  v_K = (node_K + 1) / 2
  slope_TxK = -schedule.dalpha(t[1:, None] * v_K[None] ** 4) * (2 * weight_K * v_K**3)[None]
  start = 1.0 - schedule.alpha(t[0])  # which is rounded unless it is 0
  masked_T = start + t[1:] * slope_TxK.sum(1)
  atol = 2e-16 if start else 0
  np.testing.assert_allclose(schedule.masked(t[1:]), masked_T, rtol=1e-12, atol=atol)


def test_reveal_probabilities_have_their_digits_where_alpha_rounds_to_one():
  i = jnp.arange(1.0, 6.0)
  revealed = forward.reveal_probability(Poly(3.0), i / 1000, (i - 1) / 1000)
  np.testing.assert_allclose(revealed, 1 - ((i - 1) / i) ** 3, rtol=1e-5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Poly(0.0), "power is 0.0; it must be positive"),
    (lambda: Poly(-2), "power is -2; it must be positive"),
    (lambda: TABLE["geometric"](beta_min=0.0), "beta_min 0.0 .* needs 0 < beta_min < beta_max"),
    (lambda: TABLE["geometric"](beta_max=1e-6), "beta_max 1e-06; it needs"),
  ],
)
def test_a_parameter_without_meaning_is_refused_with_its_value_and_the_rule(make, message):
  with pytest.raises(ValueError, match=message):
    make()
