"""The prediction of a network on images, whose head is a convolution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from md4vmd import numerics, row_losses

_MOST_LOGITS = 11 * 2**20  # elements of the float32 logits of one chunk: 44 MiB


@flax.struct.dataclass
class ConvPrediction:
  """mu = softmax(features * kernel + bias) with V logits per channel, for a few images at a time.

  Attributes:
    hidden_BxHxWxD: the feature map before the head.
    kernel_SxSxDxCV: the head; channel c of an image owns outputs [c V, (c + 1) V).
    bias_CV: its bias.
    vocab_size: V.
  """

  hidden_BxHxWxD: jax.Array
  kernel_SxSxDxCV: jax.Array
  bias_CV: jax.Array
  vocab_size: int = flax.struct.field(pytree_node=False)

  def weighted_nll(self, x_BxL: jax.Array, weight_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `interfaces.Prediction.weighted_nll`."""
    total, nats_BxL, _ = self.weighted_loss(row_losses.cross_entropy, x_BxL, weight_BxL)
    return total, nats_BxL

  def weighted_loss(
    self,
    row_loss: row_losses.RowLoss,
    x_BxL: jax.Array,
    weight_BxL: jax.Array,
    values_V: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `interfaces.Prediction.weighted_loss`."""

    def shard(head, hidden_BxHxWxD, x_BxL, weight_BxL):
      chunk = self._images_at_once(x_BxL.shape[0])
      total, *nats = _weighted_loss(  # pyright: ignore[reportGeneralTypeIssues]
        hidden_BxHxWxD, head, x_BxL, weight_BxL, row_loss, self.vocab_size, chunk
      )
      return total[None, None], *nats

    head = (self.kernel_SxSxDxCV, self.bias_CV, values_V)
    rows = (self.hidden_BxHxWxD, x_BxL, jax.lax.stop_gradient(weight_BxL))
    totals, *nats = numerics.on_shards(shard, x_BxL, rows, head, by_length=False)
    nats_BxL, nll_BxL = jax.lax.stop_gradient(nats)
    return totals.sum(), nats_BxL, nll_BxL

  def map_rows(
    self,
    function: Callable[..., Any],
    where_BxL: jax.Array,
    *arguments_BxL: jax.Array,
    rows_at_once: int = 64,
  ) -> Any:
    """See `interfaces.Prediction.map_rows`; at least one whole image is computed at a time."""

    def shard(head, hidden_BxHxWxD, where_BxL, *arguments_BxL):
      batch, length = where_BxL.shape

      def evaluate(images_K):
        logits_NxV = _logits(_pick(hidden_BxHxWxD, images_K), head, self.vocab_size)
        leaves = function(logits_NxV, *(_pick(a, images_K).reshape(-1) for a in arguments_BxL))
        is_chosen_KxL = _pick(where_BxL, images_K)
        place = lambda leaf_N: jnp.where(is_chosen_KxL, leaf_N.reshape(is_chosen_KxL.shape), 0)
        return jax.tree.map(place, leaves)

      def body(images_K, out):
        return jax.tree.map(
          lambda o, v: o.at[images_K].set(v, mode="drop"), out, evaluate(images_K)
        )

      chunk = min(max(1, rows_at_once // length), batch)
      like = jax.eval_shape(evaluate, jax.ShapeDtypeStruct((chunk,), jnp.int32))
      out = jax.tree.map(lambda leaf: jnp.zeros((batch, length), leaf.dtype), like)
      return numerics.walk(where_BxL.any(-1), chunk, body, out)

    arguments = (self.hidden_BxHxWxD, where_BxL, *arguments_BxL)
    head = (self.kernel_SxSxDxCV, self.bias_CV)
    return numerics.on_shards(shard, where_BxL, arguments, head, by_length=False)

  def logits(self) -> jax.Array:
    """logits_BxLxV in float32."""
    head = (self.kernel_SxSxDxCV, self.bias_CV)
    logits_NxV = _logits(self.hidden_BxHxWxD, head, self.vocab_size)
    batch = self.hidden_BxHxWxD.shape[0]
    return logits_NxV.reshape(batch, -1, self.vocab_size).astype(jnp.float32)

  def _images_at_once(self, batch: int) -> int:
    _, height, width, _ = self.hidden_BxHxWxD.shape
    return min(batch, max(1, _MOST_LOGITS // (height * width * self.bias_CV.shape[0])))


def _logits(hidden_KxHxWxD, head, vocab_size):
  """Logits of all rows of K images, one row per token, in `numerics.wide`."""
  kernel, bias_CV = head
  near_NxE = _neighbourhoods(hidden_KxHxWxD, kernel.shape[0])
  return _rows(near_NxE, _matrix(kernel, near_NxE.dtype), bias_CV, vocab_size)


# One product of neighbourhoods: with so many outputs 1.5 times as fast as a convolution on CPUs.
def _neighbourhoods(hidden_KxHxWxD, side):
  """The side x side features around each pixel, [K H W, side side D]."""
  _, height, width, _ = hidden_KxHxWxD.shape
  edge = (side // 2, side // 2)
  framed = jnp.pad(hidden_KxHxWxD, ((0, 0), edge, edge, (0, 0)))
  shifted = [framed[:, i : i + height, j : j + width] for i in range(side) for j in range(side)]
  near = jnp.concatenate(shifted, axis=-1)
  return near.reshape(-1, near.shape[-1])


def _matrix(kernel, dtype):
  """The kernel as a matrix for `_neighbourhoods`."""
  return kernel.astype(dtype).reshape(-1, kernel.shape[3])


def _rows(near_NxE, matrix_ExCV, bias_CV, vocab_size):
  """Logits of all rows from both factors, which have one dtype."""
  logits = jnp.matmul(near_NxE, matrix_ExCV, preferred_element_type=numerics.wide(near_NxE.dtype))
  return (logits + bias_CV.astype(logits.dtype)[None, :]).reshape(-1, vocab_size)


def _products_pulled(near_NxE, matrix_ExCV, dlogits_NxCV):
  """Gradients in near and matrix; both factors of a product have the dtype of the features."""
  wide = dlogits_NxCV.dtype
  dlogits_NxCV = dlogits_NxCV.astype(near_NxE.dtype)
  dnear_NxE = jnp.matmul(dlogits_NxCV, matrix_ExCV.T, preferred_element_type=wide)
  dmatrix_ExCV = jnp.matmul(near_NxE.T, dlogits_NxCV, preferred_element_type=wide)
  return dnear_NxE.astype(near_NxE.dtype), dmatrix_ExCV


def _pick(array, images_K):
  return array.at[images_K].get(mode="fill", fill_value=0)


def _put(array_BxL, images_K, rows_N):
  rows_KxL = rows_N.reshape(images_K.shape[0], -1)
  return array_BxL.at[images_K].set(rows_KxL.astype(array_BxL.dtype), mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _weighted_loss(hidden_BxHxWxD, head, x_BxL, weight_BxL, row_loss, vocab_size, chunk):
  """(sum of weight * row_loss, its nats_BxL, nll_BxL); head is (kernel, bias_CV, values_V)."""

  def body(images_K, carry):
    nats_BxL, nll_BxL = carry
    logits_NxV = _logits(_pick(hidden_BxHxWxD, images_K), head[:2], vocab_size)
    x_N = _pick(x_BxL, images_K).reshape(-1)
    rows = numerics.rows_of_logits(logits_NxV, x_N, head[2], vocab_size)
    return _put(nats_BxL, images_K, row_loss(rows)[0]), _put(nll_BxL, images_K, rows.nll_K)

  start_BxL = jnp.zeros(x_BxL.shape, numerics.wide(hidden_BxHxWxD.dtype))
  is_active_BxL = weight_BxL != 0
  nats = numerics.walk(is_active_BxL.any(-1), chunk, body, (start_BxL, start_BxL))
  nats_BxL, nll_BxL = (jnp.where(is_active_BxL, each_BxL, 0) for each_BxL in nats)
  return jnp.sum(nats_BxL * weight_BxL), nats_BxL, nll_BxL


def _weighted_loss_forward(hidden_BxHxWxD, head, x_BxL, weight_BxL, row_loss, vocab_size, chunk):
  """The same and the gradients, formed while the logits of a chunk are in hand."""
  kernel, bias_CV, values_V = head
  around = functools.partial(_neighbourhoods, side=kernel.shape[0])
  matrix_ExCV = _matrix(kernel, hidden_BxHxWxD.dtype)

  def body(images_K, carry):
    nats_BxL, nll_BxL, dhidden, (dkernel, dbias_CV, dvalues_V) = carry
    near_NxE, pull = jax.vjp(around, _pick(hidden_BxHxWxD, images_K))
    logits_NxV = _rows(near_NxE, matrix_ExCV, bias_CV, vocab_size)
    x_N, weight_N = (_pick(each, images_K).reshape(-1) for each in (x_BxL, weight_BxL))
    rows = numerics.rows_of_logits(logits_NxV, x_N, values_V, vocab_size)
    nats_N, residual_NxV, scale_N = row_loss(rows)
    dlogits_NxV = residual_NxV * (weight_N * scale_N).astype(residual_NxV.dtype)[:, None]
    dlogits_NxCV = dlogits_NxV.reshape(near_NxE.shape[0], -1)
    dnear_NxE, dmatrix_ExCV = _products_pulled(near_NxE, matrix_ExCV, dlogits_NxCV)
    (dh,) = pull(dnear_NxE)
    dkernel += dmatrix_ExCV.reshape(kernel.shape).astype(dkernel.dtype)
    dbias_CV += dlogits_NxCV.sum(0).astype(dbias_CV.dtype)
    if dvalues_V is not None:
      dvalues_V += row_losses.power_gradient(rows, weight_N)
    return (
      _put(nats_BxL, images_K, nats_N),
      _put(nll_BxL, images_K, rows.nll_K),
      dhidden.at[images_K].set(dh, mode="drop"),
      (dkernel, dbias_CV, dvalues_V),
    )

  start_BxL = jnp.zeros(x_BxL.shape, numerics.wide(hidden_BxHxWxD.dtype))
  gradients = jax.tree.map(jnp.zeros_like, (hidden_BxHxWxD, head))
  is_active_BxL = weight_BxL != 0
  nats_BxL, nll_BxL, *gradients = numerics.walk(
    is_active_BxL.any(-1), chunk, body, (start_BxL, start_BxL, *gradients)
  )
  nats_BxL, nll_BxL = (jnp.where(is_active_BxL, each, 0) for each in (nats_BxL, nll_BxL))
  return (jnp.sum(nats_BxL * weight_BxL), nats_BxL, nll_BxL), tuple(gradients)


def _weighted_loss_backward(row_loss, vocab_size, chunk, gradients, cotangents):
  del row_loss, vocab_size, chunk
  scale, *_ = cotangents  # the nats are reported without gradient
  scaled = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients)
  return (*scaled, None, None)


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)
