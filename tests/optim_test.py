import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from md4vmd.networks import TABLE
from md4vmd.optim import Optimizer, decayed

PLAIN = {"learning_rate": 0.5, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}


def rates(optimizer, steps):
  return np.array([float(optimizer.rate(step)) for step in range(steps)])


def test_the_first_step_of_the_warm_up_is_above_zero_and_its_last_at_the_peak():
  rate_S = rates(Optimizer(steps=100, learning_rate=0.8, warmup_steps=4), 100)
  np.testing.assert_allclose(rate_S[:5], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)
  assert rate_S.max() == pytest.approx(0.8)


def test_the_cosine_falls_from_the_peak_to_zero_at_the_end():
  optimizer = Optimizer(steps=100, learning_rate=0.8, warmup_steps=20)
  assert float(optimizer.rate(20)) == pytest.approx(0.8)
  assert float(optimizer.rate(60)) == pytest.approx(0.4)
  assert float(optimizer.rate(40)) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)))
  assert float(optimizer.rate(100)) == pytest.approx(0.0, abs=1e-7)
  rate_S = rates(optimizer, 100)
  assert (np.diff(rate_S[20:]) < 0).all() and rate_S[-1] > 0


def test_a_constant_rate_stays_at_the_peak():
  optimizer = Optimizer(steps=50, learning_rate=0.8, shape="constant", warmup_steps=3)
  np.testing.assert_allclose(rates(optimizer, 50)[3:], 0.8, rtol=1e-6)


@pytest.mark.parametrize("shape, expected", [("constant", 0.5), ("cosine", 0.5)])
def test_without_a_warm_up_the_first_step_is_at_the_peak(shape, expected):
  optimizer = Optimizer(steps=50, learning_rate=0.5, shape=shape, warmup_steps=0)
  assert float(optimizer.rate(0)) == pytest.approx(expected)


@pytest.fixture(params=[{}, {"time_conditioning": False}, {"classes": 3, "embedding_width": 8}])
def params(request):
  settings = {"vocab_size": 5, "width": 16, "depth": 2, "heads": 2, "condition_width": 8}
  network = TABLE["transformer"](**(settings | request.param))
  label_B = jnp.zeros(1, jnp.int32) if network.classes else None
  init = lambda key: network.init(
    key, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 1)), label_B=label_B
  )
  return jax.eval_shape(init, jax.random.key(0))["params"]


def paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, bool))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_weight_decay_is_on_matrices_and_never_on_biases_shifts_scales_and_gates(params):
  is_decayed, shape = paths(decayed(nn.unbox(params))), paths(nn.unbox(params))
  assert set(is_decayed) == set(shape)
  for path, value in is_decayed.items():
    name = path.split("/")[-1]
    is_stacked = path.startswith("blocks/")
    is_matrix = shape[path].ndim - is_stacked == 2
    assert value == is_matrix, path
    assert not (value and name.startswith(("bias", "shift", "scale", "gate"))), path
  assert {path for path, value in is_decayed.items() if value} >= {
    "blocks/attention/query/kernel",
    "blocks/mlp/down/kernel",
    "embedding",
    "head",
  }


def test_weight_decay_is_the_same_on_boxed_and_unboxed_parameters(params):
  boxed = jax.tree.leaves(decayed(params))
  assert boxed == jax.tree.leaves(decayed(nn.unbox(params)))
  assert True in boxed and False in boxed


def test_weight_decay_shrinks_matrices_by_rate_times_decay_and_leaves_biases():
  optimizer = Optimizer(steps=10, **PLAIN | {"weight_decay": 0.1, "shape": "constant"})
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  transform = optimizer.transform()
  updates, _ = transform.update(zeros, transform.init(params), params)
  moved = optax.apply_updates(params, updates)
  np.testing.assert_allclose(moved["kernel"], 1 - 0.5 * 0.1, rtol=1e-6)
  np.testing.assert_array_equal(moved["bias"], np.ones(2))


def first_moment(optimizer, grads):
  """The clipped gradient, read from AdamW's first moment after one step."""
  transform = optimizer.transform()
  _, state = transform.update(grads, transform.init(grads), grads)
  moment = optax.tree_utils.tree_get(state, "mu")
  return jax.tree.map(lambda m: np.asarray(m) / (1 - optimizer.b1), moment)


def test_clipping_scales_all_gradients_by_one_factor():
  grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(1, 8.0)}  # norm sqrt(36 + 64) = 10
  clipped = first_moment(Optimizer(steps=10, **PLAIN | {"clip_norm": 2.0}), grads)
  np.testing.assert_allclose(clipped["kernel"], 0.6, rtol=1e-5)
  np.testing.assert_allclose(clipped["bias"], 1.6, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 11.0])
def test_gradients_below_the_norm_are_left_alone_and_so_are_all_without_clipping(clip_norm):
  grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(1, 8.0)}
  clipped = first_moment(Optimizer(steps=10, **PLAIN | {"clip_norm": clip_norm}), grads)
  np.testing.assert_allclose(clipped["kernel"], 3.0, rtol=1e-5)
  np.testing.assert_allclose(clipped["bias"], 8.0, rtol=1e-5)


def test_the_moving_average_starts_low_and_reaches_its_decay():
  optimizer = Optimizer(steps=1000, ema=0.9)
  move = lambda step: float(optimizer.average(jnp.zeros(()), jnp.ones(()), jnp.int32(step)))
  assert move(0) == pytest.approx(0.9)  # decay 1/10
  assert move(8) == pytest.approx(0.5)  # decay 9/18
  assert move(80) == pytest.approx(0.1)  # decay 81/90 = .9, the last of the warm-up
  assert move(900) == pytest.approx(0.1)


def test_a_decay_of_zero_makes_the_average_the_parameters():
  optimizer = Optimizer(steps=10, warmup_steps=0, ema=0.0)
  average = optimizer.average({"a": jnp.full(2, 5.0)}, {"a": jnp.full(2, 3.0)}, jnp.int32(7))
  np.testing.assert_allclose(average["a"], 3.0)


@pytest.mark.parametrize(
  "settings, rule",
  [
    ({"learning_rate": 0.0}, "learning_rate 0.0 must be positive"),
    ({"warmup_steps": 10}, "warmup_steps 10 must be below run.steps 10"),
    ({"warmup_steps": -1}, "warmup_steps -1 must be below"),
    ({"ema": 1.0}, "ema 1.0 must be in"),
    ({"clip_norm": -1.0}, "clip_norm -1.0 must be positive"),
  ],
)
def test_settings_that_mean_nothing_are_refused(settings, rule):
  with pytest.raises(ValueError, match=rule):
    Optimizer(**{"steps": 10, "warmup_steps": 0} | settings)
