import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import numerics, partitioning, row_losses
from tests import toys

B, L, D, V, P = 3, 5, 4, 7, 16  # 15 rows; no chunk below divides them
LEAST_WEIGHT = 0.5


def _inputs(*, batch=B, length=L, active="some", dtype=jnp.float32):
  rng = np.random.default_rng(0)
  is_active = {"some": rng.random((batch, length)) < 0.5, "all": True, "none": False}[active]
  return (
    jnp.asarray(rng.normal(size=(batch, length, D)), dtype),
    jnp.asarray(rng.normal(size=(D, P)), numerics.wide(dtype)),
    jnp.asarray(rng.integers(V, size=(batch, length))),
    jnp.asarray(np.where(is_active, LEAST_WEIGHT + rng.random((batch, length)), 0.0)),
  )


def _plain(hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL):
  """The same sum from all logits at once."""
  logits_BxLxV = jnp.einsum("bld,dv->blv", hidden_BxLxD, kernel_DxP[:, :V])
  return toys.Logits(logits_BxLxV).weighted_nll(x_BxL, weight_BxL)


def _fused(hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL, *, chunk, parts=1):
  total, nats_BxL, _ = numerics.weighted_loss(
    row_losses.cross_entropy,
    hidden_BxLxD,
    kernel_DxP,
    x_BxL,
    weight_BxL,
    vocab_size=V,
    chunk=chunk,
    parts=parts,
  )
  return total, nats_BxL


@functools.cache
def _with_gradients(function):
  """(loss, nats, d/d hidden, d/d kernel) of 3 * loss, so that the cotangent is not 1."""

  @jax.jit
  def run(hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL):
    def scaled(hidden_BxLxD, kernel_DxP):
      total, nats_BxL = function(hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL)
      return 3.0 * total, nats_BxL

    grad = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)
    (total, nats_BxL), gradients = grad(hidden_BxLxD, kernel_DxP)
    return total, nats_BxL, *gradients

  return run


@functools.cache
def _fused_in_chunks_of(chunk, parts=1):
  return functools.partial(_fused, chunk=chunk, parts=parts)


def _compare(chunk, active, *, rtol, parts=1):
  inputs = _inputs(active=active, dtype=jnp.result_type(float))
  ours = _with_gradients(_fused_in_chunks_of(chunk, parts))(*inputs)
  for value, expected in zip(ours, _with_gradients(_plain)(*inputs), strict=True):
    assert value.dtype == expected.dtype
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("active", ["some", "all", "none"])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_weighted_nll_is_the_plain_cross_entropy_with_its_gradients(chunk, active, x64):
  _compare(chunk, active, rtol=1e-10)


@pytest.mark.parametrize(
  ("chunk", "parts"), [(4, 2), (4, 4), (5, 2), (7, 3), (15, 4), (1000, 4), (4, 9)]
)
def test_a_smaller_chunk_walks_the_rows_that_fill_no_whole_one(chunk, parts, x64):
  _compare(chunk, "all", rtol=1e-10, parts=parts)
  _compare(chunk, "some", rtol=1e-10, parts=parts)


@pytest.mark.parametrize("active", ["some", "all"])
def test_weighted_nll_is_the_plain_cross_entropy_in_float32(active):
  _compare(4, active, rtol=1e-5)


@pytest.mark.parametrize("row_loss", list(toys.PLAIN_ROW_LOSSES), ids=lambda f: f.__name__)
def test_every_row_loss_is_the_plain_formula_with_its_gradients(row_loss, x64):
  hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL = _inputs(dtype=jnp.float64)
  values_V = jnp.linspace(0.5, 2.0, V) if row_loss is row_losses.power_weighted else None

  def fused(hidden_BxLxD, kernel_DxP, values_V):
    total, *nats = numerics.weighted_loss(
      row_loss, hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL, values_V, vocab_size=V, chunk=4
    )
    return 3.0 * total, nats

  def plain(hidden_BxLxD, kernel_DxP, values_V):
    prediction = toys.Logits(jnp.einsum("bld,dv->blv", hidden_BxLxD, kernel_DxP[:, :V]))
    total, *nats = prediction.weighted_loss(row_loss, x_BxL, weight_BxL, values_V)
    return 3.0 * total, nats

  numbers = (0, 1) if values_V is None else (0, 1, 2)
  run = lambda function: jax.tree.leaves(
    jax.jit(jax.value_and_grad(function, numbers, has_aux=True))(hidden_BxLxD, kernel_DxP, values_V)
  )
  for value, expected in zip(run(fused), run(plain), strict=True):
    np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-10)
  np.testing.assert_allclose(fused(hidden_BxLxD, kernel_DxP, values_V)[0], run(plain)[0])


def test_without_gradient_the_value_is_the_same(x64):
  inputs = _inputs(dtype=jnp.float64)
  total, nats_BxL = jax.jit(_fused_in_chunks_of(4))(*inputs)
  with_gradient = _with_gradients(_fused_in_chunks_of(4))(*inputs)
  np.testing.assert_allclose(3.0 * total, with_gradient[0], rtol=1e-14)
  np.testing.assert_allclose(nats_BxL, with_gradient[1], rtol=1e-14)


def test_rows_of_weight_zero_are_never_looked_at(x64):
  hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL = _inputs(dtype=jnp.float64)
  is_skipped_BxL = weight_BxL == 0
  poisoned_BxLxD = jnp.where(is_skipped_BxL[:, :, None], jnp.nan, hidden_BxLxD)
  run = _with_gradients(_fused_in_chunks_of(4))
  total, nats_BxL, d_hidden_BxLxD, d_kernel_DxP = run(poisoned_BxLxD, kernel_DxP, x_BxL, weight_BxL)
  assert np.isfinite(total) and np.isfinite(d_kernel_DxP).all()
  assert (nats_BxL[is_skipped_BxL] == 0).all() and (nats_BxL[~is_skipped_BxL] > 0).all()
  assert (d_hidden_BxLxD[is_skipped_BxL] == 0).all()


def test_with_no_active_row_everything_is_zero():
  for value in _with_gradients(_fused_in_chunks_of(4))(*_inputs(active="none")):
    assert (value == 0).all() and not jnp.signbit(value).any()


def test_columns_that_pad_the_vocabulary_have_no_probability_and_no_gradient(x64):
  hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL = _inputs(dtype=jnp.float64)
  run = _with_gradients(_fused_in_chunks_of(4))
  total, _, _, d_kernel_DxP = run(hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL)
  louder_DxP = kernel_DxP.at[:, V:].mul(100.0)
  np.testing.assert_array_equal(run(hidden_BxLxD, louder_DxP, x_BxL, weight_BxL)[0], total)
  assert (d_kernel_DxP[:, V:] == 0).all() and (d_kernel_DxP[:, :V] != 0).all()


def test_the_nats_and_the_weights_carry_no_gradient():
  inputs = _inputs()
  nats = lambda hidden_BxLxD, kernel_DxP: _fused(hidden_BxLxD, kernel_DxP, *inputs[2:], chunk=4)[
    1
  ].sum()
  for gradient in jax.grad(nats, argnums=(0, 1))(*inputs[:2]):
    assert (gradient == 0).all()
  of_weight = jax.grad(lambda weight_BxL: _fused(*inputs[:3], weight_BxL, chunk=4)[0])
  assert (of_weight(inputs[3]) == 0).all()


def test_bfloat16_features_give_float32_nats_and_gradients_of_bfloat16_precision():
  inputs = _inputs(dtype=jnp.bfloat16)
  rounded = [inputs[0].astype(jnp.float32), inputs[1].astype(jnp.bfloat16).astype(jnp.float32)]
  ours = _with_gradients(_fused_in_chunks_of(4))(*inputs)
  plain = _with_gradients(_plain)(*rounded, *inputs[2:])
  dtypes = (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32)
  assert tuple(value.dtype for value in ours) == dtypes
  for value, expected, rtol in zip(ours, plain, (1e-5, 1e-5, 2**-7, 2**-7), strict=True):
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(value.astype(jnp.float32), expected, rtol=rtol, atol=rtol * scale)


def _sizes(jaxpr):
  """Numbers of elements of every array that a jaxpr, or a jaxpr inside it, computes."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _sizes(inner)


def test_no_array_of_all_logits_exists_in_the_loss_or_its_gradient():
  batch, length, chunk = 8, 16, 10
  inputs = _inputs(batch=batch, length=length)
  fused = _with_gradients(_fused_in_chunks_of(chunk))
  largest = max(_sizes(jax.make_jaxpr(fused)(*inputs).jaxpr))
  assert max(chunk * P, batch * length * D) <= largest < batch * length * V
  assert max(_sizes(jax.make_jaxpr(_with_gradients(_plain))(*inputs).jaxpr)) >= batch * length * V


def _row_statistics(logits_KxV, x_K):
  log_mu_KxV = jax.nn.log_softmax(logits_KxV)
  return {
    "nll": -jnp.take_along_axis(log_mu_KxV, x_K[:, None], axis=-1)[:, 0],
    "best": jnp.argmax(logits_KxV, axis=-1),
  }


def _map_rows(hidden_BxLxD, kernel_DxP, x_BxL, where_BxL, *, chunk):
  return numerics.map_rows(
    _row_statistics, hidden_BxLxD, kernel_DxP, where_BxL, x_BxL, vocab_size=V, chunk=chunk
  )


@pytest.mark.parametrize("active", ["some", "all", "none"])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_map_rows_is_the_function_on_the_chosen_rows_and_zero_elsewhere(chunk, active, x64):
  hidden_BxLxD, kernel_DxP, x_BxL, weight_BxL = _inputs(active=active, dtype=jnp.float64)
  where_BxL = weight_BxL != 0
  rows = _map_rows(hidden_BxLxD, kernel_DxP, x_BxL, where_BxL, chunk=chunk)
  logits_NxV = jnp.einsum("bld,dv->blv", hidden_BxLxD, kernel_DxP[:, :V]).reshape(-1, V)
  plain = _row_statistics(logits_NxV, x_BxL.reshape(-1))
  for name, value_N in plain.items():
    expected_BxL = jnp.where(where_BxL, value_N.reshape(B, L), 0)
    assert rows[name].dtype == expected_BxL.dtype
    np.testing.assert_allclose(rows[name], expected_BxL, rtol=1e-12)


def compare_eight_devices_with_one():
  """Run by the test below on 2 x 2 x 2 devices; 6 rows of 5 divide over no axis, 8 of 6 do."""
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  for batch, length in ((8, 6), (6, 5)):
    inputs = _inputs(batch=batch, length=length)
    loss = _with_gradients(_fused_in_chunks_of(4))
    rows = jax.jit(functools.partial(_map_rows, chunk=4))
    where = (*inputs[:3], inputs[3] != 0)
    alone = jax.tree.leaves((loss(*inputs), rows(*where)))
    with partitioning.use(mesh):
      if batch == 8:
        sharding = jax.sharding.NamedSharding(mesh, partitioning.BATCH)
        inputs = [
          array if i == 1 else jax.device_put(array, sharding) for i, array in enumerate(inputs)
        ]
        where = (*inputs[:3], inputs[3] != 0)
      together = jax.tree.leaves((loss(*inputs), rows(*where)))
      assert "shard_map" in str(jax.make_jaxpr(loss)(*inputs))
    for value, expected in zip(together, alone, strict=True):
      scale = float(jnp.abs(expected).max())
      np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6 * scale)


def test_eight_devices_give_the_loss_gradients_and_rows_of_one(on_eight_devices):
  on_eight_devices(compare_eight_devices_with_one)
