"""Denoisers, noise, losses and spaces small enough to enumerate; float64 under `x64`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from md4vmd import latents, rngs, row_losses
from md4vmd.evaluators.enumeration import subsets
from md4vmd.interfaces import Batch, ModelFns

_ROWS = 256


def _nll(logits_BxLxV, x_BxL, values_V=None):
  del values_V
  log_mu_BxLxV = jax.nn.log_softmax(logits_BxLxV)
  return -jnp.take_along_axis(log_mu_BxLxV, x_BxL[:, :, None], axis=-1)[:, :, 0]


def _score_entropy(logits_BxLxV, x_BxL, values_V=None):
  """sum_j s_j - log s_x - 1 of the score s = exp(logits) / V, at alpha / (1 - alpha) = 1."""
  del values_V
  vocab_size = logits_BxLxV.shape[-1]
  score_BxLxV = jnp.exp(logits_BxLxV) / vocab_size
  score_BxL = jnp.take_along_axis(score_BxLxV, x_BxL[:, :, None], axis=-1)[:, :, 0]
  return score_BxLxV.sum(-1) - jnp.log(score_BxL) - 1.0


def _power_weighted(logits_BxLxV, x_BxL, values_V):
  w_BxL = values_V[x_BxL]
  return w_BxL * _nll(logits_BxLxV, x_BxL) + jax.nn.softmax(logits_BxLxV) @ values_V - w_BxL


PLAIN_ROW_LOSSES = {
  row_losses.cross_entropy: _nll,
  row_losses.score_entropy: _score_entropy,
  row_losses.power_weighted: _power_weighted,
}


def random_params(network, *inputs, scale=None, seed=0, **named_inputs):
  """Parameters off their initial values, drawn without compiling an initializer.

  `scale` is the deviation of all; without it that of matrices falls with their inputs.
  """
  init = lambda: network.init(jax.random.key(0), *inputs, **named_inputs)
  rng = np.random.default_rng(seed)

  def draw(leaf):
    deviation = scale or (1 / np.sqrt(leaf.shape[-2]) if leaf.ndim > 1 else 0.3)
    return jnp.asarray(rng.normal(size=leaf.shape) * deviation, leaf.dtype)

  return jax.tree.map(draw, nn.unbox(jax.eval_shape(init))["params"])


@flax.struct.dataclass
class Logits:
  """An `interfaces.Prediction` that holds its logits, in the plainest arithmetic."""

  logits_BxLxV: Any

  @property
  def vocab_size(self):
    return self.logits_BxLxV.shape[-1]

  def weighted_nll(self, x_BxL, weight_BxL):
    total, nats_BxL, _ = self.weighted_loss(row_losses.cross_entropy, x_BxL, weight_BxL)
    return total, nats_BxL

  def weighted_loss(self, row_loss, x_BxL, weight_BxL, values_V=None):
    plain = PLAIN_ROW_LOSSES[row_loss]
    nats_BxL, nll_BxL = (
      jnp.where(weight_BxL != 0, function(self.logits_BxLxV, x_BxL, values_V), 0.0)
      for function in (plain, PLAIN_ROW_LOSSES[row_losses.cross_entropy])
    )
    constants = jax.lax.stop_gradient((nats_BxL, nll_BxL))
    return jnp.sum(jax.lax.stop_gradient(weight_BxL) * nats_BxL), *constants

  def map_rows(self, function, where_BxL, *arguments_BxL, rows_at_once=64):
    del rows_at_once
    rows = lambda array: array.reshape(-1, *array.shape[2:])
    out = function(rows(self.logits_BxLxV), *map(rows, arguments_BxL))
    place = lambda leaf_N: jnp.where(where_BxL, leaf_N.reshape(where_BxL.shape), 0)
    return jax.tree.map(place, out)

  def logits(self):
    return self.logits_BxLxV


def constant(logits_LxV):
  """The denoiser that predicts the same at every input."""

  def denoise(zt_BxL, t_BxG, **inputs):
    del t_BxG, inputs
    return Logits(jnp.broadcast_to(jnp.asarray(logits_LxV), (len(zt_BxL), *logits_LxV.shape)))

  return ModelFns(denoise)


def random(length, vocab_size, *, sees_time, seed=0, width=6, latent_width=0):
  """A one-layer network whose predictions depend on every token and, if asked, on t and on z."""
  rng = np.random.default_rng(seed)
  inward_LxVxD = rng.normal(size=(length, vocab_size + 1, width))
  outward_DxLxV = rng.normal(size=(width, length, vocab_size))
  clock_D = 2.0 * rng.normal(size=width)
  latent_ZxD = 2.0 * rng.normal(size=(latent_width, width))

  def denoise(zt_BxL, t_BxG, *, label_B=None, dropout_key=None, latent_BxGxZ=None):
    del label_B, dropout_key
    is_token_BxLxV = jax.nn.one_hot(zt_BxL, vocab_size + 1)
    hidden_BxD = jnp.einsum("blv,lvd->bd", is_token_BxLxV, jnp.asarray(inward_LxVxD))
    if sees_time:
      hidden_BxD += jnp.einsum("bg,d->bd", t_BxG, jnp.asarray(clock_D))
    if latent_BxGxZ is not None:
      hidden_BxD += jnp.einsum("bgz,zd->bd", latent_BxGxZ, jnp.asarray(latent_ZxD))
    return Logits(jnp.einsum("bd,dlv->blv", jnp.tanh(hidden_BxD), jnp.asarray(outward_DxLxV)))

  return ModelFns(denoise)


def posterior(support_MxL, probabilities_M, vocab_size):
  """The true denoiser of a distribution: p(x_n | visible tokens), uniform where nothing fits."""
  is_token_MxLxV = np.eye(vocab_size)[support_MxL]

  def denoise(zt_BxL, t_BxG, **inputs):
    del t_BxG, inputs
    fits_BxMxL = zt_BxL[:, None, :] == jnp.asarray(support_MxL)[None]
    fits_BxM = (fits_BxMxL | (zt_BxL == vocab_size)[:, None, :]).all(-1)
    mass_BxM = jnp.asarray(probabilities_M)[None] * fits_BxM
    mass_BxLxV = jnp.einsum("bm,mlv->blv", mass_BxM, jnp.asarray(is_token_MxLxV))
    return Logits(jnp.log(jnp.maximum(mass_BxLxV, 1e-300)))

  return ModelFns(denoise)


def random_latent(length, vocab_size, *, values, seed=0):
  """A random denoiser of z, a prior over one-hot z and a posterior that reads x, z_t and S.

  Prior and posterior are tables over `values` codes, so that every law can be enumerated.
  """
  rng = np.random.default_rng(seed + 100)
  prior_LxVxJ = rng.normal(size=(length, vocab_size + 1, values))
  posterior_LxVxJ = rng.normal(size=(length, vocab_size + 1, values))
  marked_LxJ = rng.normal(size=(length, values))

  def table(tokens_BxL, weights_LxVxJ, extra_BxJ=0.0):
    one_hot_BxLxV = jax.nn.one_hot(tokens_BxL, vocab_size + 1)
    logits_BxJ = jnp.einsum("blv,lvj->bj", one_hot_BxLxV, jnp.asarray(weights_LxVxJ)) + extra_BxJ
    return latents.Table(logits_BxJ[:, None], 1, values, 1.0)

  def encode(x_BxL, zt_BxL, where_BxL, *, label_B=None):
    del label_B
    extra_BxJ = where_BxL @ jnp.asarray(marked_LxJ)
    return table(jnp.where(where_BxL, x_BxL, zt_BxL), posterior_LxVxJ, extra_BxJ)

  def prior(zt_BxL, *, label_B=None):
    del label_B
    return table(zt_BxL, prior_LxVxJ)

  denoise = random(length, vocab_size, sees_time=True, seed=seed, latent_width=values).denoise
  return ModelFns(denoise, encode, prior)


@dataclasses.dataclass(frozen=True)
class Script:
  """An `rngs.Noise` whose draws the test writes down."""

  u_BxG: Any
  uniform_BxL: Any
  rate_BxG: Any = None

  def grid(self, name, groups):
    assert name == "time" and groups == self.u_BxG.shape[1]
    return self.u_BxG

  def uniform(self, name, shape):
    assert name == "mask" and shape == self.uniform_BxL.shape[1:]
    return self.uniform_BxL

  def beta(self, name, a_BxG, b_BxG):
    assert name == "rate" and a_BxG.shape == b_BxG.shape == self.rate_BxG.shape
    return self.rate_BxG


def make_batch(x_BxL, **fields):
  """A batch in which every example counts, unless the fields say otherwise."""
  x_BxL = jnp.asarray(x_BxL)
  batch = Batch(x_BxL, jnp.ones(len(x_BxL)), jnp.arange(len(x_BxL)))
  return dataclasses.replace(batch, **{name: jnp.asarray(value) for name, value in fields.items()})


def loss_terms(objective, fns, batch, noise=None, seed=3):
  """LossTerms, compiled, of a draw for every example: of this noise, or else of the seed's."""

  def loss(key):
    given = rngs.batch_noise(key, len(batch.x_BxL)) if noise is None else noise
    draws = objective.draw(given, batch)
    return objective.loss(fns, batch, draws, step=jnp.zeros((), int))

  return jax.jit(loss)(jax.random.key(seed))


def forced_loss_terms(objective, fns, x_BxL, u_B, is_masked_BxL, rate_B=None, **fields):
  """LossTerms at written draws: masks are forced by uniforms of 0 and 1."""
  batch = make_batch(x_BxL, **fields)
  uniform_BxL = jnp.where(is_masked_BxL, 0.0, 1.0)
  rate_BxG = None if rate_B is None else jnp.asarray(rate_B)[:, None]
  draws = objective.draw(Script(jnp.asarray(u_B)[:, None], uniform_BxL, rate_BxG), batch)
  np.testing.assert_array_equal(
    objective.is_masked(batch, draws), np.asarray(is_masked_BxL) & np.asarray(batch.free_BxL)
  )
  return objective.loss(fns, batch, draws, step=jnp.zeros((), int))


def logits(prediction):
  """The logits of a prediction as a NumPy array."""
  return np.asarray(prediction.logits())


def sequences(length, vocab_size):
  """Every sequence, [V^L, L]."""
  return np.array(list(itertools.product(range(vocab_size), repeat=length)))


def masked_nll(fns, x_L, t_J, vocab_size):
  """nll_JxSxL: -log mu(x_n) at every time and masked set, 0 at visible positions."""
  is_masked_SxL = subsets(len(x_L))
  zt_RxL = np.tile(np.where(is_masked_SxL, vocab_size, x_L), (len(t_J), 1))
  t_Rx1 = np.repeat(np.asarray(t_J), len(is_masked_SxL))[:, None]
  logits_RxLxV = np.concatenate(
    [
      fns.denoise(jnp.asarray(zt_RxL[rows]), jnp.asarray(t_Rx1[rows])).logits()[: len(zt_RxL) - i]
      for i in range(0, len(zt_RxL), _ROWS)
      for rows in [np.arange(i, i + _ROWS) % len(zt_RxL)]  # one shape, one compilation
    ]
  )
  log_mu_RxLxV = scipy.special.log_softmax(logits_RxLxV, axis=-1)
  nll_JxSxL = -log_mu_RxLxV[:, np.arange(len(x_L)), x_L].reshape(len(t_J), *is_masked_SxL.shape)
  return np.where(is_masked_SxL, nll_JxSxL, 0.0)


def block_laws(fns, x_XxL, vocab_size, steps):
  """log p_X of decoding each block of two tokens in `steps` equal steps, if mu ignores the time.

  Both tokens come in the same step with probability 1 / steps, else one after the other.
  """
  rows, length = x_XxL.shape
  first, second = (np.tile(masked, length // 2) for masked in ([True, False], [False, True]))
  masked_XxL = (np.where(masked, vocab_size, x_XxL) for masked in (first, second))
  zt_PxXxL = np.stack([np.full_like(x_XxL, vocab_size), *masked_XxL])
  flat = lambda array: jnp.asarray(array.reshape(-1, length))
  clean_RxL = flat(np.stack([x_XxL] * 3))
  logits_RxLxV = logits(fns.denoise(flat(zt_PxXxL), None, clean_BxL=clean_RxL)).astype(float)
  log_mu_RxLxV = scipy.special.log_softmax(logits_RxLxV, axis=-1)
  log_mu_RxL = np.take_along_axis(log_mu_RxLxV, np.asarray(clean_RxL)[..., None], -1)[..., 0]
  blank, now_first, now_second = np.exp(log_mu_RxL.reshape(3, rows, length // 2, 2))
  p_XxG = blank.prod(-1) / steps
  p_XxG += (1 - 1 / steps) / 2 * (blank[..., 0] * now_second[..., 1])
  p_XxG += (1 - 1 / steps) / 2 * (blank[..., 1] * now_first[..., 0])
  return np.log(p_XxG).sum(-1)
