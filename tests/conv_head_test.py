"""The convolutional head, a few images at a time, against all logits at once."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import partitioning, row_losses
from md4vmd.networks import conv_head
from md4vmd.networks.conv import convolve
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, H, W, C, D, V = 5, 3, 2, 2, 4, 7
L = H * W * C


def make(*, batch=B, dtype=jnp.float32):
  """(hidden, kernel, bias, x, weight): one image has no weight at all, others have gaps."""
  rng = np.random.default_rng(0)
  wide = jnp.promote_types(dtype, jnp.float32)
  weight_BxL = np.where(rng.random((batch, L)) < 0.5, 0.5 + rng.random((batch, L)), 0.0)
  weight_BxL[1] = 0.0
  return (
    jnp.asarray(rng.normal(size=(batch, H, W, D)), dtype),
    jnp.asarray(rng.normal(size=(3, 3, D, C * V)) / 6, wide),
    jnp.asarray(rng.normal(size=C * V), wide),
    jnp.asarray(rng.integers(V, size=(batch, L))),
    jnp.asarray(weight_BxL, wide),
  )


def plain(hidden_BxHxWxD, kernel, bias_CV):
  """The prediction that holds all logits, by the definition of the convolution."""
  batch = hidden_BxHxWxD.shape[0]
  padded = jnp.pad(hidden_BxHxWxD, ((0, 0), (1, 1), (1, 1), (0, 0)))
  logits = sum(
    jnp.einsum("bhwd,dv->bhwv", padded[:, i : i + H, j : j + W], kernel[i, j])
    for i in range(3)
    for j in range(3)
  )
  logits += bias_CV[None, None, None, :]
  return toys.Logits(logits.reshape(batch, L, V))


def ours(hidden_BxHxWxD, kernel, bias_CV):
  return conv_head.ConvPrediction(hidden_BxHxWxD, kernel, bias_CV, V)


@pytest.fixture
def two_images_at_once(monkeypatch):
  monkeypatch.setattr(conv_head, "_MOST_LOGITS", 2 * H * W * C * V)


def run(prediction, row_loss, values_V, hidden, kernel, bias_CV, x_BxL, weight_BxL):
  def scaled(hidden, kernel, bias_CV, values_V):
    made = prediction(hidden, kernel, bias_CV)
    total, *nats = made.weighted_loss(row_loss, x_BxL, weight_BxL, values_V)
    return 3.0 * total, nats

  numbers = (0, 1, 2) if values_V is None else (0, 1, 2, 3)
  gradient = jax.jit(jax.value_and_grad(scaled, numbers, has_aux=True))
  return jax.tree.leaves(gradient(hidden, kernel, bias_CV, values_V))


def compare(values, expected):
  for value, right in zip(values, expected, strict=True):
    np.testing.assert_allclose(value, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("row_loss", list(toys.PLAIN_ROW_LOSSES), ids=lambda f: f.__name__)
def test_losses_are_those_of_all_logits_with_their_gradients(row_loss, two_images_at_once, x64):
  arrays = make(dtype=jnp.float64)
  values_V = jnp.linspace(0.5, 2.0, V) if row_loss is row_losses.power_weighted else None
  values = run(ours, row_loss, values_V, *arrays)
  compare(values, run(plain, row_loss, values_V, *arrays))


def test_the_number_of_images_at_once_and_the_gradient_change_no_value(monkeypatch, x64):
  arrays = make(dtype=jnp.float64)
  expected = plain(*arrays[:3]).weighted_nll(*arrays[3:])
  for count in (1, B):
    monkeypatch.setattr(conv_head, "_MOST_LOGITS", count * H * W * C * V)
    compare(ours(*arrays[:3]).weighted_nll(*arrays[3:]), expected)


def test_any_function_of_the_rows_is_that_of_all_logits_and_zero_elsewhere(two_images_at_once, x64):
  *head, x_BxL, weight_BxL = make(dtype=jnp.float64)

  def best(logits_KxV, x_K):
    chosen_K = jnp.take_along_axis(jax.nn.log_softmax(logits_KxV), x_K[:, None], axis=1)[:, 0]
    return {"top": logits_KxV.argmax(-1), "log_mu": chosen_K}

  where_BxL = weight_BxL != 0
  values, expected = (
    made(*head).map_rows(best, where_BxL, x_BxL, rows_at_once=2 * L) for made in (ours, plain)
  )
  compare(jax.tree.leaves(values), jax.tree.leaves(expected))
  np.testing.assert_allclose(ours(*head).logits(), plain(*head).logits(), rtol=1e-5, atol=1e-6)


def test_an_image_without_weight_is_never_looked_at(two_images_at_once, x64):
  hidden, kernel, bias_CV, x_BxL, weight_BxL = make(dtype=jnp.float64)
  poisoned = hidden.at[1].set(jnp.nan)
  for value in run(
    ours, row_losses.cross_entropy, None, poisoned, kernel, bias_CV, x_BxL, weight_BxL
  ):
    assert np.isfinite(value).all()


def test_half_precision_features_give_float32_nats_and_gradients_close_to_float32():
  arrays = make(dtype=jnp.bfloat16)
  values = run(ours, row_losses.cross_entropy, None, *arrays)
  assert {value.dtype.name for value in values} == {"float32", "bfloat16"}
  wide = (arrays[0].astype(jnp.float32), *arrays[1:])
  for value, right in zip(values, run(plain, row_losses.cross_entropy, None, *wide), strict=True):
    scale = float(jnp.abs(right).max())
    np.testing.assert_allclose(value.astype(jnp.float32), right, atol=0.03 * scale)


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _equations(inner)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_product_has_both_factors_in_the_dtype_of_the_features(dtype):
  function = functools.partial(run, ours, row_losses.cross_entropy, None)
  equations = _equations(jax.make_jaxpr(function)(*make(dtype=dtype)).jaxpr)
  products = [each for each in equations if each.primitive.name == "dot_general"]
  assert len(products) == 3  # the logits, and their gradient in the features and in the head
  for product in products:
    assert [factor.aval.dtype for factor in product.invars] == [dtype, dtype]
    assert product.outvars[0].aval.dtype == jnp.float32


def test_no_array_of_all_logits_exists_in_the_loss_or_its_gradient(monkeypatch):
  monkeypatch.setattr(conv_head, "_MOST_LOGITS", 2 * H * W * C * V)
  arrays = make(batch=12)

  def largest(prediction):
    function = functools.partial(run, prediction, row_losses.cross_entropy, None)
    equations = _equations(jax.make_jaxpr(function)(*arrays).jaxpr)
    return max(variable.aval.size for each in equations for variable in each.outvars)

  assert 2 * L * V <= largest(ours) < 12 * L * V <= largest(plain)


def compare_eight_devices_with_one():
  """Run by the test below on 2 x 2 x 2 devices; 8 images divide over them and 5 do not."""
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  function = functools.partial(run, ours, row_losses.cross_entropy, None)
  for batch in (8, 5):
    arrays = make(batch=batch)
    alone = function(*arrays)
    with partitioning.use(mesh):
      together = function(*arrays)
    for value, expected in zip(together, alone, strict=True):
      scale = float(jnp.abs(expected).max())
      np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6 * scale)


def test_eight_devices_give_the_loss_and_gradients_of_one(on_eight_devices):
  on_eight_devices(compare_eight_devices_with_one)


def test_a_convolution_keeps_the_size_and_accumulates_in_float32():
  x_BxHxWxI = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
  y = convolve(x_BxHxWxI, jnp.ones((3, 3, 2, 5)))
  assert y.shape == (1, 4, 4, 5) and y.dtype == jnp.float32
  assert y[0, 1, 1, 0] == 18 and y[0, 0, 0, 0] == 8
  assert convolve(x_BxHxWxI, jnp.ones((2, 2, 2, 5)), stride=2).shape == (1, 2, 2, 5)
