import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from md4vmd import partitioning, samplers
from md4vmd.evaluators.enumeration import exact_log_prob
from md4vmd.interfaces import ModelFns
from md4vmd.networks import head
from md4vmd.samplers import tokens
from md4vmd.samplers.confidence import SCORES
from md4vmd.schedules import TABLE as SCHEDULES
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V = 3, 3
_LINEAR = Linear()
every_sampler = pytest.mark.parametrize("name", samplers.TABLE)


@functools.cache
def _compiled(fns, schedule, step, vocab_size):
  @jax.jit
  def run(key, times, tokens_BxL, free_BxL, index_B):
    return samplers.sample(
      key,
      fns,
      schedule,
      step,
      times,
      tokens_BxL=tokens_BxL,
      free_BxL=free_BxL,
      vocab_size=vocab_size,
      index_B=index_B,
    )

  return run


def _sample(
  fns, step, times, tokens_BxL, free_BxL, *, schedule=_LINEAR, vocab_size=V, seed=0, index_B=None
):
  index_B = np.arange(len(tokens_BxL)) if index_B is None else index_B
  run = _compiled(fns, schedule, step, vocab_size)
  result = run(jax.random.key(seed), times, *map(jnp.asarray, (tokens_BxL, free_BxL, index_B)))
  return jax.tree.map(np.asarray, result)


def _from_nothing(fns, step, times, *, batch, length=L, **rest):
  shape = (batch, length)
  return _sample(fns, step, times, np.zeros(shape, int), np.ones(shape, bool), **rest)


def _headed(length, vocab_size):
  """A denoiser that sees t, with the prediction of the real networks."""
  rng = np.random.default_rng(0)
  table_LxVxD = rng.normal(size=(length, vocab_size + 1, 8))
  kernel_DxP = rng.normal(size=(8, head.padded(vocab_size)))

  def denoise(zt_BxL, t_BxG, **_):
    is_token_BxLxV = jax.nn.one_hot(zt_BxL, vocab_size + 1)
    hidden_BxD = jnp.einsum("blv,lvd->bd", is_token_BxLxV, jnp.asarray(table_LxVxD)) + 2 * t_BxG
    turns_1xLxD = jnp.arange(length * 8.0).reshape(1, length, 8)
    hidden_BxLxD = jnp.sin(hidden_BxD[:, None, :] + turns_1xLxD)
    return head.HeadPrediction(hidden_BxLxD, jnp.asarray(kernel_DxP), vocab_size)

  return ModelFns(denoise)


# --- the law ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("schedule", "grid", "steps", "fns"),
  [
    ("linear", "uniform", 2, toys.random(L, V, sees_time=True)),
    ("cosine", "cosine", 3, _headed(L, V)),
    ("poly", "uniform", 8, toys.random(L, V, sees_time=False)),
    ("geometric", "cosine", 3, toys.random(L, V, sees_time=True)),
  ],
  ids=["linear", "cosine", "poly", "geometric"],
)
def test_ancestral_samples_have_the_exact_law(schedule, grid, steps, fns):
  times = samplers.times(grid, steps)
  schedule, draws = SCHEDULES[schedule](), 30_000
  samples = _from_nothing(fns, samplers.Ancestral(), times, batch=draws, schedule=schedule)
  x_XxL = toys.sequences(L, V)
  log_p_X = jax.jit(lambda times: exact_log_prob(fns, schedule, times, jnp.asarray(x_XxL), V))(
    times
  )
  expected_X = draws * np.exp(np.asarray(log_p_X, np.float64))
  observed_X = np.bincount(samples.x_BxL @ V ** np.arange(L)[::-1], minlength=V**L)
  is_rare_X = expected_X < 5
  gather = lambda count_X: np.append(count_X[~is_rare_X], count_X[is_rare_X].sum())
  observed, expected = gather(observed_X), gather(expected_X)
  expected = np.maximum(expected, 1e-9) * observed.sum() / expected.sum()
  assert (~is_rare_X).sum() > 8
  assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("steps", [2, 1000])
def test_ancestral_calls_the_network_once_per_step_that_reveals_something(steps):
  calls = []

  def denoise(zt_BxL, t_BxG, **rest):
    jax.debug.callback(lambda _: calls.append(1), t_BxG)
    return toys.random(L, V, sees_time=True).denoise(zt_BxL, t_BxG, **rest)

  times = samplers.times("uniform", steps)
  samples = _from_nothing(ModelFns(denoise), samplers.Ancestral(), times, batch=4000)
  jax.effects_barrier()
  assert len(calls) == samples.calls_B.max() <= min(steps, L)
  for calls_of_row, call_L in zip(samples.calls_B, samples.call_BxL, strict=True):
    assert sorted(set(call_L)) == list(range(calls_of_row))
  # Each position picks a step on its own: the number of distinct ones, in the mean.
  share_K = -np.diff(np.asarray(times, np.float64))
  mean = np.sum(1 - (1 - share_K) ** L)
  error = max(samples.calls_B.std() / np.sqrt(4000), 1e-3)
  assert abs(samples.calls_B.mean() - mean) < 4 * error


def test_ancestral_draws_uniformly_at_loose_ends_of_a_schedule():
  schedule = SCHEDULES["geometric"](beta_min=0.7, beta_max=1.2)
  mu_V = np.array([0.9, 0.1, 1e-9])
  fns, times = toys.constant(np.log([mu_V] * L)), samplers.times("uniform", 4)
  samples = _from_nothing(fns, samplers.Ancestral(), times, batch=4000, schedule=schedule)
  loose = 1 - (np.exp(-0.7) - np.exp(-1.2))
  expected_V = samples.x_BxL.size * ((1 - loose) * mu_V / mu_V.sum() + loose / V)
  observed_V = np.bincount(samples.x_BxL.ravel(), minlength=V)
  assert scipy.stats.chisquare(observed_V, expected_V).pvalue > 1e-3


# --- every sampler ----------------------------------------------------------------------------

TOKENS_BxL = np.tile([2, 4, 0, 1, 4, 3], (16, 1))  # 4 is the mask
SIX = toys.random(6, 4, sees_time=True)
SIX_BY_TOKEN = SIX._replace(token_power=lambda: jnp.linspace(0.7, 1.6, 4))
FREE_BxL = np.tile([False, True, True, False, False, True], (16, 1))  # position 4: unknown, stays


def _six(name, tokens_BxL=TOKENS_BxL, free_BxL=FREE_BxL, **rest):
  step, times = samplers.TABLE[name](temperature=1.0), samplers.times("cosine", 2)
  fns = SIX_BY_TOKEN if step.is_by_token else SIX
  return _sample(fns, step, times, tokens_BxL, free_BxL, vocab_size=4, **rest)


@every_sampler
def test_only_free_positions_change_and_all_of_them_are_filled(name):
  samples = _six(name)
  np.testing.assert_array_equal(samples.x_BxL[~FREE_BxL], TOKENS_BxL[~FREE_BxL])
  assert (samples.x_BxL[FREE_BxL] < 4).all() and (samples.x_BxL >= 0).all()
  assert (samples.call_BxL[~FREE_BxL] == -1).all() and (samples.call_BxL[FREE_BxL] >= 0).all()
  np.testing.assert_array_equal(samples.calls_B, samples.call_BxL.max(-1) + 1)
  assert samples.calls_B.max() == 2


@every_sampler
def test_what_stands_at_free_positions_before_sampling_does_not_matter(name):
  other_BxL = np.where(FREE_BxL, 3 - np.minimum(TOKENS_BxL, 3), TOKENS_BxL)
  assert (other_BxL != TOKENS_BxL).any()
  np.testing.assert_array_equal(_six(name).x_BxL, _six(name, other_BxL).x_BxL)


@every_sampler
def test_a_sample_depends_on_its_index_and_not_on_its_place_in_the_batch(name):
  order_B = np.random.default_rng(0).permutation(len(TOKENS_BxL)) + 3
  first, second = _six(name, index_B=order_B), _six(name, index_B=order_B[::-1])
  np.testing.assert_array_equal(first.x_BxL, second.x_BxL[::-1])
  assert len(np.unique(first.x_BxL, axis=0)) > 4


@every_sampler
def test_a_given_token_is_seen(name):
  other_BxL = np.where(FREE_BxL | (TOKENS_BxL == 4), TOKENS_BxL, (TOKENS_BxL + 1) % 4)
  assert (_six(name).x_BxL != _six(name, other_BxL).x_BxL)[FREE_BxL].any()


@every_sampler
def test_a_sample_depends_on_its_key_and_nothing_is_called_to_fill_nothing(name):
  assert (_six(name, seed=0).x_BxL != _six(name, seed=1).x_BxL).any()
  idle = _six(name, free_BxL=np.zeros_like(FREE_BxL))
  np.testing.assert_array_equal(idle.x_BxL, TOKENS_BxL)
  assert (idle.calls_B == 0).all()


# --- confidence orders ------------------------------------------------------------------------

# Which position comes first: every score prefers another one.
CANDIDATES_LxV = np.array([[0.505, 0.485, 0.01], [0.55, 0.40, 0.05], [0.50, 0.25, 0.25]])
FIRST = {"top_prob": 1, "margin": 2, "entropy": 0}


@pytest.mark.parametrize("score", SCORES)
def test_the_surest_position_comes_first(score):
  step = samplers.Confidence(score)
  fns = toys.constant(np.log(CANDIDATES_LxV))
  samples = _from_nothing(fns, step, samplers.times("uniform", 3), batch=2)
  np.testing.assert_array_equal(np.argmin(samples.call_BxL, axis=-1), [FIRST[score]] * 2)
  np.testing.assert_array_equal(samples.x_BxL, [[0, 0, 0]] * 2)  # temperature 0: the best token


def test_margin_on_two_tokens_is_the_difference_of_their_probabilities():
  logits_KxV = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]))
  np.testing.assert_allclose(SCORES["margin"](logits_KxV), [0.8, 0.0, 0.4], atol=1e-6)
  np.testing.assert_allclose(SCORES["top_prob"](logits_KxV), [0.9, 0.5, 0.7], atol=1e-6)
  entropy = [-scipy.stats.entropy([p, 1 - p]) for p in (0.9, 0.5, 0.3)]
  np.testing.assert_allclose(SCORES["entropy"](logits_KxV), entropy, rtol=1e-5)


def test_the_entropy_score_is_finite_with_an_impossible_token():
  logits_KxV = jnp.array([[0.0, 0.0, -jnp.inf]])
  np.testing.assert_allclose(SCORES["entropy"](logits_KxV), [-np.log(2)], rtol=1e-6)


@pytest.mark.parametrize(
  ("score", "length", "steps", "revealed"),
  [
    *((score, 8, 4, [2, 2, 2, 2]) for score in SCORES),
    ("margin", 8, 3, [3, 2, 3]),  # round(8/3), round(5/2) to even, the rest
    ("margin", 3, 10, [1, 1, 1]),  # at least one per step, then it stops
  ],
)
def test_a_step_reveals_its_share_and_at_least_one(score, length, steps, revealed):
  fns, times = toys.random(length, V, sees_time=False), samplers.times("uniform", steps)
  samples = _from_nothing(fns, samplers.Confidence(score), times, batch=3, length=length)
  for call_L in samples.call_BxL:
    np.testing.assert_array_equal(np.bincount(call_L), revealed)


# --- tokens -----------------------------------------------------------------------------------

MU_V = np.array([0.5, 0.0, 0.125, 0.25, 0.125])
LOGITS_V = np.log(np.maximum(MU_V, 1e-300))
LOGITS_V[1] = -np.inf


def _draw(logits_V, u_K, **settings):
  logits_KxV = np.tile(np.float32(logits_V), (len(u_K), 1))
  return np.asarray(
    jax.jit(functools.partial(tokens.draw, **settings))(logits_KxV, np.float32(u_K))
  )


def _shares(logits_V, **settings):
  u_K = (np.arange(4096) + 0.5) / 4096
  return np.bincount(_draw(logits_V, u_K, **settings), minlength=len(logits_V)) / 4096


def test_a_draw_is_the_inverse_of_the_distribution_function():
  np.testing.assert_allclose(_shares(LOGITS_V), MU_V, atol=1 / 4096)
  np.testing.assert_array_equal(_draw(LOGITS_V, [0.1, 0.49, 0.51, 0.64, 0.9]), [0, 0, 2, 3, 4])


def test_temperature_divides_the_logits_and_zero_takes_the_best():
  colder_V = MU_V**2 / np.sum(MU_V**2)
  np.testing.assert_allclose(_shares(LOGITS_V, temperature=0.5), colder_V, atol=1 / 4096)
  np.testing.assert_array_equal(_shares(LOGITS_V, temperature=0.0), [1, 0, 0, 0, 0])


@pytest.mark.parametrize(
  ("top_p", "kept_V"),
  [
    (0.4, [0.5, 0, 0, 0, 0]),
    (0.5, [0.5, 0, 0, 0, 0]),  # the first token holds the mass on its own
    (0.51, [0.5, 0, 0, 0.25, 0]),
    (0.75, [0.5, 0, 0, 0.25, 0]),
    (0.8, [0.5, 0, 0.125, 0.25, 0.125]),  # equally probable tokens are kept together
    (1.0, [0.5, 0, 0.125, 0.25, 0.125]),
  ],
)
def test_top_p_keeps_the_most_probable_tokens_of_that_mass(top_p, kept_V):
  kept_V = np.array(kept_V) / np.sum(kept_V)
  np.testing.assert_allclose(_shares(LOGITS_V, top_p=top_p), kept_V, atol=1 / 4096)


def test_a_token_of_probability_one_in_a_million_keeps_its_share():
  mu_V = np.array([0.5, 1e-6, 0.5 - 1e-6])
  u_K = 0.5 + np.linspace(-2e-6, 3e-6, 81)
  share = np.mean(_draw(np.log(mu_V), u_K) == 1)
  assert abs(share * 5e-6 - 1e-6) < 2.5e-7  # a float32 near 0.5 resolves 6e-8


@pytest.mark.parametrize(("size", "live"), [(5, 3), (1000, 600), (50257, 30000)])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_an_impossible_token_is_never_drawn_even_at_the_ends_of_u(size, live, top_p):
  logits_KxV = 2.0 * np.random.default_rng(0).normal(size=(32, size))
  logits_KxV[:, 0] = logits_KxV[:, live:] = -np.inf
  logits_KxV = jnp.asarray(logits_KxV, jnp.float32)
  draw = jax.jit(functools.partial(tokens.draw, top_p=top_p))
  for u in (0.0, 1e-38, 1 - 2.0**-24, 1.0):
    drawn_K = np.asarray(draw(logits_KxV, np.full(32, u, np.float32)))
    assert (drawn_K > 0).all() and (drawn_K < live).all()


# --- grids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", samplers.GRIDS)
@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_a_grid_falls_from_exactly_one_to_exactly_zero(grid, steps):
  times = np.asarray(samplers.times(grid, steps))
  assert times.shape == (steps + 1,) and (times[0], times[-1]) == (1.0, 0.0)
  assert (np.diff(times) < 0).all()


def test_grids_are_those_of_the_paper():
  np.testing.assert_allclose(samplers.times("uniform", 4), [1, 0.75, 0.5, 0.25, 0])
  cosine = np.cos(np.pi / 2 * np.arange(4) / 4)
  np.testing.assert_allclose(samplers.times("cosine", 4)[:-1], cosine, rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: samplers.times("sine", 4), "grid is 'sine'; it must be one of uniform, cosine"),
    (lambda: samplers.times("cosine", 0), "steps is 0; it must be at least 1"),
    *(
      (lambda make=make, settings=settings: make(**settings), message)
      for make in samplers.TABLE.values()
      for settings, message in [
        ({"temperature": -0.5}, "temperature is -0.5; it must be 0 (argmax) or positive"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be in (0, 1]"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be in (0, 1]"),
      ]
    ),
  ],
)
def test_settings_without_meaning_are_refused(make, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make()


# --- a mesh -----------------------------------------------------------------------------------


def sample_on_eight_devices_and_one():
  """Run by the test below."""
  fns, times = _headed(6, 4), samplers.times("cosine", 4)
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  for name in ("margin", "token_ancestral"):
    step = samplers.TABLE[name](temperature=1.0)
    if step.is_by_token:
      fns = fns._replace(token_power=lambda: jnp.linspace(0.7, 1.6, 4))
    run = functools.partial(_sample, fns, step, times, vocab_size=4)
    alone = run(TOKENS_BxL, FREE_BxL)
    _compiled.cache_clear()
    with partitioning.use(mesh):
      sharding = jax.sharding.NamedSharding(mesh, partitioning.BATCH)
      together = run(*jax.device_put((TOKENS_BxL, FREE_BxL), sharding))
    np.testing.assert_array_equal(alone.x_BxL, together.x_BxL)
    np.testing.assert_array_equal(alone.call_BxL, together.call_BxL)
    assert len(np.unique(alone.x_BxL, axis=0)) > 4


def test_eight_devices_sample_what_one_samples(on_eight_devices):
  on_eight_devices(sample_on_eight_devices_and_one)
