"""The head fused with the loss of its rows, walking only those that need it.

Logits exist for one chunk of rows at a time. The rows with non-zero weight are gathered to the
front and a loop with a dynamic trip count walks them, so no row is ever dropped and no work is
spent on the others. Since weights are constants, the gradient is formed in the forward pass
while a chunk's logits are in hand: three matmuls with the vocabulary and no recomputation.

On a mesh every shard selects among its own rows. Trip counts may differ between shards because
no collective stands inside the loop.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from md4vmd.row_losses import RowLoss, Rows, power_gradient

ROWS = (("data", "fsdp"), ("sequence", "tensor"))  # how [B, L] arrays are cut for row work


def fitting(mesh: Any, shape: Sequence[int], axes: Iterable[Any]) -> PartitionSpec:
  """How a mesh cuts an array: each axis by its mesh axes, or not at all where they do not divide.

  Args:
    mesh: the mesh, abstract or not.
    shape: of the array.
    axes: for each axis of the array None, the name of a mesh axis, or a tuple of names; missing
      ones are None.
  """
  spec = []
  for size, names in zip(shape, (*axes, *[None] * len(shape)), strict=False):
    each = (names,) if isinstance(names, str) else names or ()
    spec.append(names if size % math.prod(mesh.shape[name] for name in each) == 0 else None)
  return PartitionSpec(*spec)


def wide(dtype: Any) -> Any:
  """Dtype of logits and nats for features of `dtype`: float32, or float64 for float64."""
  return jnp.promote_types(dtype, jnp.float32)


def chunk_logits(h_KxD: jax.Array, kernel_DxP: jax.Array, vocab_size: int) -> jax.Array:
  """Logits [K, P] of a chunk of rows in `wide`; -inf at the ids that only pad the vocabulary."""
  logits = jnp.matmul(
    h_KxD, kernel_DxP.astype(h_KxD.dtype), preferred_element_type=wide(h_KxD.dtype)
  )
  # Only the columns that pad are written: a select over all of them would be one more pass.
  shape = (*logits.shape[:-1], kernel_DxP.shape[1] - vocab_size)
  padding = jnp.full(shape, -jnp.inf, logits.dtype)
  return jax.lax.dynamic_update_slice_in_dim(logits, padding, vocab_size, axis=-1)


def walk(
  is_active_N: jax.Array,
  chunk: int,
  body: Callable[[jax.Array, Any], Any],
  carry: Any,
  *,
  parts: int = 1,
) -> Any:
  """Folds `body(rows_K, carry)` over chunks of active row numbers; N marks a spare place.

  Args:
    is_active_N: the rows that are walked.
    chunk: rows of a chunk.
    body: of a chunk.
    carry: what it starts from.
    parts: what fills no whole chunk is walked as the smallest of so many equal fractions of one;
      the body is compiled for each.
  """
  rows = is_active_N.shape[0]
  (order_N,) = jnp.nonzero(is_active_N, size=rows + chunk, fill_value=rows)
  active = is_active_N.sum()
  whole = active // chunk
  rest = active - whole * chunk

  def fold(times, start, size, carry):
    def step(i, carry):
      return body(jax.lax.dynamic_slice_in_dim(order_N, start + i * size, size), carry)

    return jax.lax.fori_loop(0, times, step, carry)

  steps = sorted({-(-chunk * part // parts) for part in range(parts)})
  carry = fold(whole + (rest > steps[-1]), 0, chunk, carry)
  for smaller, size in itertools.pairwise(steps):
    carry = fold(jnp.int32((smaller < rest) & (rest <= size)), whole * chunk, size, carry)
  return carry


def rows_of_logits(
  logits_KxP: jax.Array, x_K: jax.Array, values_P: jax.Array | None, vocab_size: int
) -> Rows:
  """The `Rows` of logits and targets."""
  largest_K = logits_KxP.max(-1)
  mu_KxP = jnp.exp(logits_KxP - largest_K[:, None])  # not normalised
  sum_K = mu_KxP.sum(-1)
  log_normaliser_K = largest_K + jnp.log(sum_K)
  nll_K = log_normaliser_K - jnp.take_along_axis(logits_KxP, x_K[:, None], -1)[:, 0]
  return Rows(x_K, mu_KxP, sum_K, nll_K, log_normaliser_K, values_P, vocab_size)


def _chunk_rows(hidden_NxD, kernel_DxP, values_P, x_N, rows_K, vocab_size):
  """(features, `Rows`) of a chunk."""
  h_KxD = hidden_NxD.at[rows_K].get(mode="fill", fill_value=0)
  x_K = x_N.at[rows_K].get(mode="fill", fill_value=0)
  logits_KxP = chunk_logits(h_KxD, kernel_DxP, vocab_size)
  return h_KxD, rows_of_logits(logits_KxP, x_K, values_P, vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _weighted_loss(hidden_NxD, kernel_DxP, values_P, x_N, weight_N, row_loss, vocab_size, chunks):
  def body(rows_K, carry):
    nats_N, nll_N = carry
    _, rows = _chunk_rows(hidden_NxD, kernel_DxP, values_P, x_N, rows_K, vocab_size)
    nats_K, _, _ = row_loss(rows)
    return (
      nats_N.at[rows_K].set(nats_K, mode="drop"),
      nll_N.at[rows_K].set(rows.nll_K, mode="drop"),
    )

  start = jnp.zeros(x_N.shape, wide(hidden_NxD.dtype))
  nats_N, nll_N = walk(weight_N != 0, chunks[0], body, (start, start), parts=chunks[1])
  return jnp.sum(nats_N * weight_N), nats_N, nll_N


def _weighted_loss_forward(
  hidden_NxD, kernel_DxP, values_P, x_N, weight_N, row_loss, vocab_size, chunks
):
  def body(rows_K, carry):
    nats_N, nll_N, dhidden_NxD, dkernel_DxP, dvalues_P = carry
    h_KxD, rows = _chunk_rows(hidden_NxD, kernel_DxP, values_P, x_N, rows_K, vocab_size)
    # The scale and the weight are left to factors on [K, D].
    nats_K, residual_KxP, scale_K = row_loss(rows)
    residual_KxP = residual_KxP.astype(h_KxD.dtype)
    weight_K = weight_N.at[rows_K].get(mode="fill", fill_value=0)
    scale_Kx1 = (weight_K * scale_K)[:, None]
    dh_KxD = scale_Kx1 * jnp.matmul(
      residual_KxP, kernel_DxP.T.astype(h_KxD.dtype), preferred_element_type=scale_K.dtype
    )
    # Laid out before the product: as a transpose folded into it, it takes half as long again.
    h_DxK = jax.lax.optimization_barrier((scale_Kx1 * h_KxD).astype(h_KxD.dtype).T)
    dkernel_DxP += jnp.matmul(h_DxK, residual_KxP, preferred_element_type=dkernel_DxP.dtype)
    if dvalues_P is not None:
      dvalues_P += power_gradient(rows, weight_K)
    return (
      nats_N.at[rows_K].set(nats_K, mode="drop"),
      nll_N.at[rows_K].set(rows.nll_K, mode="drop"),
      dhidden_NxD.at[rows_K].set(dh_KxD.astype(dhidden_NxD.dtype), mode="drop"),
      dkernel_DxP,
      dvalues_P,
    )

  zeros_N = jnp.zeros(x_N.shape, wide(hidden_NxD.dtype))
  gradients = jax.tree.map(jnp.zeros_like, (hidden_NxD, kernel_DxP, values_P))
  start = (zeros_N, zeros_N, *gradients)
  nats_N, nll_N, *gradients = walk(weight_N != 0, chunks[0], body, start, parts=chunks[1])
  return (jnp.sum(nats_N * weight_N), nats_N, nll_N), gradients


def _weighted_loss_backward(row_loss, vocab_size, chunks, gradients, cotangents):
  del row_loss, vocab_size, chunks
  scale, *_ = cotangents  # the nats are reported without gradient
  scaled = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients)
  return (*scaled, None, None)


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def on_shards(
  function: Callable[..., Any],
  example_BxL: jax.Array,
  arguments_BxL: Any,
  head: Any,
  *,
  by_length: bool = True,
) -> Any:
  """Runs `function(head, *arguments)` once per shard of the rows of the mesh in use, if any.

  Args:
    function: of the head, whole on every device, and the shards; it returns arrays [B, L].
    example_BxL: an array that is cut as the arguments are.
    arguments_BxL: arrays whose first axes are B and L, or B alone where the length is not cut.
    head: a pytree that is not cut.
    by_length: cuts the length over the mesh's tensor axis too.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(head, *arguments_BxL)
  spec = fitting(mesh, example_BxL.shape, ROWS if by_length else ROWS[:1])
  return jax.shard_map(
    function,
    in_specs=(PartitionSpec(), *(spec for _ in arguments_BxL)),
    out_specs=spec,
    check_vma=False,
  )(head, *arguments_BxL)


def weighted_loss(
  row_loss: RowLoss,
  hidden_BxLxD: jax.Array,
  kernel_DxP: jax.Array,
  x_BxL: jax.Array,
  weight_BxL: jax.Array,
  values_V: jax.Array | None = None,
  *,
  vocab_size: int,
  chunk: int,
  parts: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sum over rows of weight * row_loss of the logits hidden @ kernel and the target x.

  Args:
    row_loss: one of `row_losses`.
    hidden_BxLxD: features before the head; their dtype is the dtype of the matmuls.
    kernel_DxP: the head, padded to P >= vocab_size columns.
    x_BxL: target tokens in [0, vocab_size).
    weight_BxL: constants; rows of weight 0 are skipped and report 0 nats.
    values_V: a value per token, for `power_weighted` alone.
    vocab_size: V; the columns behind it get probability 0.
    chunk: rows whose logits exist at one time.
    parts: of a chunk, see `walk`.

  Returns:
    (scalar sum in `wide`, differentiable in hidden, kernel and values; nats_BxL of the loss and
    nll_BxL = -log mu[x], both without gradient).
  """

  def shard(head, hidden_BxLxD, x_BxL, weight_BxL):
    kernel_DxP, values_P = head
    total, *nats = _weighted_loss(  # pyright: ignore[reportGeneralTypeIssues]
      hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1]),
      kernel_DxP,
      values_P,
      x_BxL.reshape(-1),
      weight_BxL.reshape(-1),
      row_loss,
      vocab_size,
      (min(chunk, x_BxL.size), parts),
    )
    return total[None, None], *(nats_N.reshape(x_BxL.shape) for nats_N in nats)

  if values_V is not None:
    values_V = jnp.pad(values_V, (0, kernel_DxP.shape[1] - vocab_size))
  weight_BxL = jax.lax.stop_gradient(weight_BxL)
  rows = (hidden_BxLxD, x_BxL, weight_BxL)
  totals, nats_BxL, nll_BxL = on_shards(shard, x_BxL, rows, (kernel_DxP, values_V))
  return totals.sum(), jax.lax.stop_gradient(nats_BxL), jax.lax.stop_gradient(nll_BxL)


def map_rows(
  function: Callable[..., Any],
  hidden_BxLxD: jax.Array,
  kernel_DxP: jax.Array,
  where_BxL: jax.Array,
  *arguments_BxL: jax.Array,
  vocab_size: int,
  chunk: int,
) -> Any:
  """Applies `function(logits_KxV, *arguments_K)` to the chosen rows, a chunk at a time.

  Returns:
    The pytree that the function returns, leaves [K] becoming [B, L] with zeros elsewhere.
  """

  def shard(kernel_DxP, hidden_BxLxD, where_BxL, *arguments_BxL):
    shape = where_BxL.shape
    hidden_NxD = hidden_BxLxD.reshape(-1, hidden_BxLxD.shape[-1])
    arguments_N = [argument.reshape(-1) for argument in arguments_BxL]

    def evaluate(rows_K):
      h_KxD = hidden_NxD.at[rows_K].get(mode="fill", fill_value=0)
      logits_KxV = chunk_logits(h_KxD, kernel_DxP, vocab_size)[:, :vocab_size]
      picked = [a.at[rows_K].get(mode="fill", fill_value=0) for a in arguments_N]
      return function(logits_KxV, *picked)

    def body(rows_K, out):
      return jax.tree.map(lambda o, v: o.at[rows_K].set(v, mode="drop"), out, evaluate(rows_K))

    size = min(chunk, where_BxL.size)
    like = jax.eval_shape(evaluate, jax.ShapeDtypeStruct((size,), jnp.int32))
    out = jax.tree.map(lambda leaf: jnp.zeros((where_BxL.size,), leaf.dtype), like)
    out = walk(where_BxL.reshape(-1), size, body, out)
    return jax.tree.map(lambda leaf: leaf.reshape(shape), out)

  arguments = (hidden_BxLxD, where_BxL, *arguments_BxL)
  return on_shards(shard, where_BxL, arguments, kernel_DxP)
