import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from md4vmd import forward, rngs
from tests import toys


def test_group_to_token_repeats_each_value_for_its_consecutive_tokens():
  values_BxG = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  expected_BxL = [[1.0, 1.0, 1.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.0, 4.0, 4.0, 4.0]]
  np.testing.assert_array_equal(forward.group_to_token(values_BxG, 6), expected_BxL)
  np.testing.assert_array_equal(forward.group_to_token(values_BxG[:, :1], 2), [[1, 1], [3, 3]])


def test_group_sizes_count_the_free_tokens_of_each_group():
  free_BxL = jnp.array([[True, True, False, True], [False, False, True, True]])
  np.testing.assert_array_equal(forward.group_sizes(free_BxL, 2), [[2, 1], [0, 2]])
  np.testing.assert_array_equal(forward.group_sizes(free_BxL, 1), [[3], [2]])


def test_free_tokens_are_neither_clues_nor_padding():
  batch = toys.make_batch(
    np.zeros((2, 3), int),
    given_BxL=[[True, False, False], [False, False, False]],
    scored_BxL=[[True, True, False], [True, True, True]],
    weight_B=[1.0, 0.0],
  )
  np.testing.assert_array_equal(batch.free_BxL, [[False, True, False], [True, True, True]])
  np.testing.assert_array_equal(batch.tokens_B, [1.0, 0.0])


def test_masked_by_count_masks_exactly_that_many_free_tokens_of_every_group():
  rng = np.random.default_rng(0)
  free_BxL = jnp.asarray(rng.random((200, 8)) < 0.6)
  size_BxG = forward.group_sizes(free_BxL, 2)
  count_BxG = jnp.asarray(rng.integers(0, 10, size=(200, 2)) % (np.asarray(size_BxG) + 1))
  uniform_BxL = jnp.asarray(rng.random((200, 8)))
  is_masked_BxL = forward.masked_by_count(count_BxG, uniform_BxL, free_BxL)
  assert not (is_masked_BxL & ~free_BxL).any()
  np.testing.assert_array_equal(forward.group_sizes(is_masked_BxL, 2), count_BxG)


def test_masked_by_count_draws_every_subset_of_the_free_tokens_equally_often():
  draws, free_L = 6000, jnp.array([True, False, True, True, True])
  uniform_BxL = jax.random.uniform(jax.random.key(0), (draws, 5))
  is_masked_BxL = forward.masked_by_count(
    jnp.full((draws, 1), 2), uniform_BxL, jnp.broadcast_to(free_L, (draws, 5))
  )
  subsets = list(itertools.combinations((0, 2, 3, 4), 2))
  found = [tuple(np.flatnonzero(row)) for row in np.asarray(is_masked_BxL)]
  counts = [found.count(subset) for subset in subsets]
  assert sum(counts) == draws
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_masked_by_rate_masks_free_tokens_at_the_rate_and_clues_never():
  draws = 20_000
  uniform_BxL = jax.random.uniform(jax.random.key(1), (draws, 4))
  free_BxL = jnp.broadcast_to(jnp.array([True, True, True, False]), (draws, 4))
  rate_BxL = jnp.broadcast_to(jnp.array([0.0, 0.3, 1.0, 1.0]), (draws, 4))
  is_masked_BxL = forward.masked_by_rate(rate_BxL, uniform_BxL, free_BxL)
  never, some, always, clue = np.asarray(is_masked_BxL).mean(0)
  assert (never, always, clue) == (0.0, 1.0, 0.0)
  assert abs(some - 0.3) < 4 * np.sqrt(0.3 * 0.7 / draws)


def test_counts_from_the_grid_are_uniform_on_one_to_size():
  size_BxG = jnp.array([[1], [7], [81], [1024]])
  u_BxK = jnp.broadcast_to((jnp.arange(4096) + 0.5) / 4096, (4, 4096))
  for size, u_K in zip(size_BxG[:, 0].tolist(), u_BxK, strict=True):
    k_K = forward.count_from_uniform(u_K[:, None], jnp.full((4096, 1), size))
    counts = np.bincount(np.asarray(k_K)[:, 0], minlength=size + 1)
    assert counts[0] == 0 and len(counts) == size + 1
    assert np.abs(counts[1:] - 4096 / size).max() <= 1


def test_a_count_stays_within_the_group_at_the_ends_of_the_grid():
  size_BxG = jnp.array([[0], [1], [3], [729], [2**23 + 1]])
  most = jnp.full((5, 1), jnp.nextafter(jnp.float32(1), jnp.float32(0)))
  np.testing.assert_array_equal(forward.count_from_uniform(most, size_BxG), size_BxG)
  least = forward.count_from_uniform(jnp.zeros((5, 1)), size_BxG)
  np.testing.assert_array_equal(least, [[0], [1], [1], [1], [1]])


def test_groups_share_one_grid_and_mask_their_own_counts():
  batch, groups, length = 64, 2, 8
  free_BxL = jnp.asarray(np.arange(batch * length).reshape(batch, length) % length != 5)

  @jax.jit
  def draw(key):
    noise = rngs.batch_noise(key, batch)
    size_BxG = forward.group_sizes(free_BxL, groups)
    count_BxG = forward.count_from_uniform(noise.grid("time", groups), size_BxG)
    uniform_BxL = noise.uniform("mask", (length,))
    return count_BxG, forward.masked_by_count(count_BxG, uniform_BxL, free_BxL)

  count_BxG, is_masked_BxL = draw(jax.random.key(2))
  np.testing.assert_array_equal(forward.group_sizes(is_masked_BxL, groups), count_BxG)
  assert not is_masked_BxL[:, 5].any()
  for g, size in enumerate((4, 3)):  # 64 rows of a rotated grid, spread over 1..size
    counts = np.bincount(np.asarray(count_BxG)[:, g], minlength=size + 1)[1:]
    assert np.abs(counts - batch / size).max() <= 1


def test_mask_tokens_changes_the_chosen_positions_alone():
  batch = toys.make_batch([[0, 1, 2], [2, 1, 0]])
  is_masked_BxL = jnp.array([[True, False, False], [False, True, True]])
  zt_BxL = forward.mask_tokens(batch, is_masked_BxL, 3)
  np.testing.assert_array_equal(zt_BxL, [[3, 1, 2], [2, 3, 3]])
