import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from md4vmd import rngs


def _is_same(first, second):
  return bool((jax.random.key_data(first) == jax.random.key_data(second)).all())


def test_a_stream_is_a_function_of_seed_step_and_name_alone():
  key = rngs.stream(3, 5, "draws")
  jax.random.uniform(rngs.stream(0, 0, "other"))  # nothing drawn elsewhere changes it
  assert _is_same(key, rngs.stream(3, 5, "draws"))
  assert _is_same(key, jax.jit(lambda step: rngs.stream(3, step, "draws"))(jnp.int32(5)))
  for other in (rngs.stream(4, 5, "draws"), rngs.stream(3, 6, "draws"), rngs.stream(3, 5, "drop")):
    assert not _is_same(key, other)


def test_a_name_means_the_same_key_on_every_machine():
  expected = jax.random.fold_in(jax.random.key(0), 0xCBF43926)  # the CRC-32 of "123456789"
  assert _is_same(rngs.named(jax.random.key(0), "123456789"), expected)


@pytest.mark.parametrize(("batch", "groups"), [(10, 1), (328, 1), (6, 2), (5, 4)])
def test_each_stratum_of_the_grid_holds_exactly_one_place(batch, groups):
  u_BxG = jax.jit(lambda key: rngs.batch_noise(key, batch).grid("time", groups))(jax.random.key(1))
  assert u_BxG.shape == (batch, groups)
  strata = np.floor(np.asarray(u_BxG, float).ravel() * batch * groups).astype(int)
  assert sorted(strata) == list(range(batch * groups))


def test_every_place_of_the_grid_is_uniform_on_its_own():
  keys = jax.random.split(jax.random.key(2), 4000)
  u_KxBxG = jax.jit(jax.vmap(lambda key: rngs.batch_noise(key, 3).grid("time", 2)))(keys)
  assert (u_KxBxG >= 0).all() and (u_KxBxG < 1).all()
  for u_K in np.asarray(u_KxBxG).reshape(4000, -1).T:
    assert scipy.stats.kstest(u_K, "uniform").pvalue > 1e-3


def test_the_grid_never_reaches_one():
  noise = rngs.Noise(jax.random.key(0), None, jnp.linspace(0.0, 1.0, 100_001), jnp.float32(1e-5))
  u_BxG = noise.grid("time", 2)
  assert u_BxG.max() < 1 and u_BxG.min() >= 0


def test_names_of_a_batch_are_independent_streams():
  noise = rngs.batch_noise(jax.random.key(3), 4096)
  first, second = noise.uniform("mask", (2,)), noise.uniform("rate", (2,))
  for a, b in [(first[:, 0], first[:, 1]), (first[:, 0], second[:, 0])]:
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(4096)
  assert noise.grid("time", 1)[0, 0] != noise.grid("rate", 1)[0, 0]
  assert np.unique(first).size > 0.999 * first.size


def test_example_noise_depends_on_the_example_and_not_on_its_batch():
  @jax.jit
  def draw(index_B):
    noise = rngs.example_noise(jax.random.key(4), index_B, jnp.int32(1), 3)
    return noise.grid("time", 2), noise.uniform("mask", (5,))

  together = draw(jnp.array([7, 0, 123_456, 42]))
  apart = draw(jnp.array([42, 7]))
  for whole, part in zip(together, apart, strict=True):
    np.testing.assert_array_equal(whole[jnp.array([3, 0])], part)
    assert (whole[0] != whole[1]).all()


def test_the_draws_of_one_example_form_an_even_grid_with_independent_masks():
  draws = 8
  noises = [
    rngs.example_noise(jax.random.key(5), jnp.array([11]), jnp.int32(j), draws)
    for j in range(draws)
  ]
  places = sorted(float(noise.grid("time", 1)[0, 0]) for noise in noises)
  np.testing.assert_allclose(np.diff(places), 1 / draws, atol=1e-6)
  masks = {float(noise.uniform("mask", (1,))[0, 0]) for noise in noises}
  assert len(masks) == draws


def test_the_examples_of_an_evaluation_cover_the_grid_evenly():
  u_BxG = rngs.example_noise(jax.random.key(6), jnp.arange(1000), jnp.int32(0), 1).grid("time", 1)
  sorted_B = np.sort(np.asarray(u_BxG)[:, 0])
  discrepancy = np.abs(sorted_B - (np.arange(1000) + 0.5) / 1000).max()
  assert discrepancy < 0.005  # i.i.d. places would be at about 0.03


def test_beta_draws_follow_their_law_given_the_count():
  noise = rngs.batch_noise(jax.random.key(7), 4000)
  size = 6
  k_BxG = jnp.broadcast_to(jnp.array([[1, 4, 6]]), (4000, 3))
  rate_BxG = noise.beta("rate", 1.0 * k_BxG, 1.0 + size - k_BxG)
  for g, k in enumerate((1, 4, 6)):
    law = scipy.stats.beta(k, size - k + 1)
    assert scipy.stats.kstest(np.asarray(rate_BxG[:, g]), law.cdf).pvalue > 1e-3
