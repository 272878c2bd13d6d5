"""Losses of single tokens as functions of their logits, with gradients written by hand.

`numerics.weighted_loss` sums them over the masked rows. Each takes a `Rows` and returns
(nats_K, residual_KxP, scale_K), where residual * scale is the gradient of nats_K in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
  """A chunk of rows; ids behind the vocabulary have mu = 0.

  Attributes:
    x_K: target tokens.
    mu_KxP: exp(logit - largest logit).
    sum_K: its sum over P.
    nll_K: -log softmax(logits)[x] in nats.
    log_normaliser_K: logsumexp of the logits.
    values_P: a value per token, 0 behind the vocabulary; None where there are none.
    vocab_size: V.
  """

  x_K: jax.Array
  mu_KxP: jax.Array
  sum_K: jax.Array
  nll_K: jax.Array
  log_normaliser_K: jax.Array
  values_P: jax.Array | None
  vocab_size: int


RowLoss = Callable[[Rows], tuple[jax.Array, jax.Array, jax.Array]]


def cross_entropy(rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-log mu[x] (MD4, arXiv 2406.04329, eq. 5)."""
  return rows.nll_K, _minus_at_x(rows.mu_KxP, rows.x_K, rows.sum_K), 1.0 / rows.sum_K


def score_entropy(rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-log mu[x] + c - 1 - log c, c = sum over tokens of exp(logit) / V.

  With the weight of the MD4 bound it is the denoising score entropy (SEDD, arXiv
  2310.16834) of the score s_j = alpha / (1 - alpha) exp(logit_j) / V. Logits of 0 have c = 1.
  """
  log_c_K = rows.log_normaliser_K - jnp.log(rows.vocab_size).astype(rows.nll_K.dtype)
  c_K = jnp.exp(log_c_K)
  residual_KxP = _minus_at_x(rows.mu_KxP, rows.x_K, rows.sum_K / c_K)
  return rows.nll_K + c_K - 1.0 - log_c_K, residual_KxP, c_K / rows.sum_K


def power_weighted(rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-w[x] log mu[x] + sum_j mu_j w_j - w[x], w the values (GenMD4, arXiv 2406.04329)."""
  w_P, w_K = rows.values_P, _values_at_x(rows)
  assert w_P is not None
  # The mean nearly cancels the other terms, so it is not left to a device's fast product.
  mean_K = jnp.matmul(rows.mu_KxP, w_P, precision=jax.lax.Precision.HIGHEST) / rows.sum_K
  slope_KxP = rows.mu_KxP * (w_P[None, :] + (w_K - mean_K)[:, None])
  nats_K = w_K * (rows.nll_K - 1.0) + mean_K
  return nats_K, _minus_at_x(slope_KxP, rows.x_K, w_K * rows.sum_K), 1.0 / rows.sum_K


def power_gradient(rows: Rows, weight_K: jax.Array) -> jax.Array:
  """Gradient in the values, [P], of the weighted sum of `power_weighted` over a chunk."""
  share_K = weight_K / rows.sum_K
  mean_P = jnp.matmul(share_K, rows.mu_KxP, precision=jax.lax.Precision.HIGHEST)
  return mean_P.at[rows.x_K].add(weight_K * (rows.nll_K - 1.0))


def _minus_at_x(slope_KxP, x_K, amount_K):
  return slope_KxP.at[jnp.arange(x_K.shape[0]), x_K].add(-amount_K)


def _values_at_x(rows):
  assert rows.values_P is not None
  return rows.values_P[rows.x_K]
