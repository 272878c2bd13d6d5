"""GenMD4: masked diffusion with a learned schedule for every token (arXiv 2406.04329)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from md4vmd import forward, rngs, row_losses
from md4vmd.interfaces import Batch, Draws, LossTerms, ModelFns, Schedule
from md4vmd.rngs import Noise
from md4vmd.schedules.linear import Linear
from md4vmd.schedules.poly import Poly

POWERS = ("learned", "frozen")
ESTIMATORS = ("count", "tilted")


class _Sets(NamedTuple):
  """Times and masked sets of every group.

  Attributes:
    log_t_BxG: log of the time.
    is_masked_BxKxL: K sets, alike and independent given the time.
  """

  log_t_BxG: jax.Array
  is_masked_BxKxL: jax.Array


@dataclasses.dataclass(frozen=True)
class GenMD4:
  """Bound on -log p(x) with alpha_v(t) = 1 - t^(w_v) for token v.

  L = int dt/t E sum over masked n of b_n, b_n = -w[x_n] log mu[x_n] + sum_j mu_j w_j - w[x_n].

  Neither t near 0 nor the weight 1/t is sampled: the masked set S and its time are drawn with
  density q(S | t) W / (N t), W the sum of w[x_n] over S, by taking n uniform among the N free
  tokens, t = U^(1/w[x_n]), a token with P ~ w[x] t^w[x] masked for certain and every other with
  probability t^w[x]. The estimate is R = N / W sum over S of b_n: exact, without a cut at small t,
  with weights at most N / min w. With equal w it is the counting form of MD4.

  The gradient in w is pathwise through b plus E[R s], s the gradient of log q(S | t). Two sets of
  one time serve each other as baselines (RLOO). The density has no empty set, so E[s] is not 0 but
  the gradient of sum_n c_n t^w / sum_n c_n t^c at c = w; it is put back, and what comes out is
  unbiased.

  Attributes:
    schedule: linear or poly; its power is where the w of every token starts.
    vocab_size: V.
    power: "learned", two sets for every example, or "frozen", one.
    power_decay: nats per token charged for the mean over tokens of log(w / start)^2; never part of
      the bound.
    estimator: "count", U uniform, or "tilted", U the square of a uniform u and weight 2 u, as in
      `MD4`; "count" evaluates.
  """

  schedule: Schedule
  vocab_size: int
  power: str = "learned"
  power_decay: float = 0.0
  estimator: str = "count"

  latent_refresh = "once"  # there is none

  def __post_init__(self):
    if not isinstance(self.schedule, Linear | Poly):
      raise ValueError(
        f"objective 'genmd4' starts its powers from schedule 'linear' or 'poly', not "
        f"'{type(self.schedule).__name__.lower()}'"
      )
    if self.power not in POWERS:
      raise ValueError(f"objective power is '{self.power}'; it must be one of {', '.join(POWERS)}")
    if self.power_decay < 0 or (self.power_decay and self.power == "frozen"):
      raise ValueError(
        f"objective power_decay is {self.power_decay}; it must be 0, or positive with "
        "power 'learned'"
      )
    if self.estimator not in ESTIMATORS:
      raise ValueError(
        f"objective estimator is '{self.estimator}'; that of 'genmd4' must be one of "
        f"{', '.join(ESTIMATORS)}"
      )

  @property
  def initial_power(self) -> float:
    """w of every token before training."""
    return getattr(self.schedule, "power", 1.0)

  @property
  def convention(self) -> str:
    """Which bound, of which sampler, by which estimator."""
    return "GenMD4 bound on -log p of the continuous-time sampler, by size-biased masked sets"

  def bound(self, steps: int, grid: str) -> GenMD4:
    """The same bound from one masked set of every example."""
    del steps, grid
    return dataclasses.replace(self, power="frozen", power_decay=0.0, estimator="count")

  def draw(self, noise: Noise, batch: Batch) -> Draws:
    """Levels U of the times, which depend on w, and keys for the masked sets."""
    level_BxG = 1.0 - noise.grid("time", 1)
    weight_BxG = 1.0 * forward.group_sizes(batch.free_BxL, 1)
    if self.estimator == "tilted":
      weight_BxG *= 2.0 * level_BxG
      level_BxG = jnp.square(level_BxG)
    uniform_BxL = noise.uniform("token", batch.x_BxL.shape[1:])
    return Draws(level_BxG, weight_BxG, uniform_BxL, key_B=noise.keys("sets"))

  def loss(
    self,
    fns: ModelFns,
    batch: Batch,
    draws: Draws,
    *,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> LossTerms:
    """See `interfaces.LossTerms`; the one part is the bound itself."""
    del step
    assert fns.token_power is not None
    power_V = fns.token_power()
    power_V = power_V if self.power == "learned" else jax.lax.stop_gradient(power_V)
    power_BxL = power_V[batch.x_BxL]
    sets = self._sets(batch, draws, jax.lax.stop_gradient(power_BxL))
    total, estimate_BxKxG = self._estimates(fns, batch, draws, sets, power_V, dropout_key)
    weight_BxG = jnp.broadcast_to(batch.weight_B[:, None], sets.log_t_BxG.shape)
    nelbo_B = jnp.sum(weight_BxG * estimate_BxKxG.mean(1), axis=1)
    if self.power == "learned":
      score = self._score(batch.free_BxL, sets, power_BxL, estimate_BxKxG, weight_BxG)
      total += score - jax.lax.stop_gradient(score)  # a gradient alone: the bound stays in the log
    if self.power_decay:
      ratio_V = jnp.log(power_V / self.initial_power)
      total += self.power_decay * batch.tokens_B.sum() * jnp.mean(jnp.square(ratio_V))
    return LossTerms(total, nelbo_B, batch.tokens_B, {"diffusion": nelbo_B})

  def _sets(self, batch: Batch, draws: Draws, power_BxL: jax.Array) -> _Sets:
    """Draws times and masked sets; which token sets the time decides `uniform_BxL`."""
    assert draws.key_B is not None
    key_B = draws.key_B
    length, groups = batch.x_BxL.shape[1], draws.t_BxG.shape[1]
    by_group = lambda array_BxL: array_BxL.reshape(len(array_BxL), groups, -1)
    free_BxGxM = by_group(batch.free_BxL)
    first_BxGx1 = jnp.argmax(
      jnp.where(free_BxGxM, by_group(draws.uniform_BxL), -1.0), axis=-1, keepdims=True
    )
    power_BxG = jnp.take_along_axis(by_group(power_BxL), first_BxGx1, axis=-1)[..., 0]
    log_t_BxG = jnp.log(draws.t_BxG) / power_BxG
    log_rate_BxL = power_BxL * forward.group_to_token(log_t_BxG, length)
    chance_BxL = jnp.where(batch.free_BxL, jnp.log(power_BxL) + log_rate_BxL, -jnp.inf)

    def one(k):
      noise_Bx2xL = rngs.uniform_each(rngs.fold_each(key_B, k), (2, length))
      gumbel_BxL = -jnp.log(-jnp.log(jnp.maximum(noise_Bx2xL[:, 0], 1e-30)))
      certain_BxGx1 = jnp.argmax(by_group(chance_BxL + gumbel_BxL), axis=-1, keepdims=True)
      is_certain_BxGxM = jnp.arange(free_BxGxM.shape[2])[None, None, :] == certain_BxGx1
      is_masked_BxL = noise_Bx2xL[:, 1] < jnp.exp(log_rate_BxL)
      return (is_masked_BxL | is_certain_BxGxM.reshape(is_masked_BxL.shape)) & batch.free_BxL

    count = 2 if self.power == "learned" else 1
    return _Sets(log_t_BxG, jnp.stack([one(k) for k in range(count)], axis=1))

  def _estimates(self, fns, batch, draws, sets, power_V, dropout_key):
    """(their weighted mean, differentiable along the path, R_BxKxG)."""
    count, groups = sets.is_masked_BxKxL.shape[1], sets.log_t_BxG.shape[1]
    length = batch.x_BxL.shape[1]
    repeat = lambda array: jnp.repeat(array, count, axis=0)
    is_masked_RxL = sets.is_masked_BxKxL.reshape(-1, length)
    x_RxL = repeat(batch.x_BxL)
    prediction = fns.denoise(
      jnp.where(is_masked_RxL, self.vocab_size, x_RxL),
      repeat(jnp.exp(sets.log_t_BxG)),
      label_B=None if batch.label_B is None else repeat(batch.label_B),
      dropout_key=dropout_key,
    )
    power_RxL = jax.lax.stop_gradient(power_V)[x_RxL]
    total_RxG = forward.group_sums(jnp.where(is_masked_RxL, power_RxL, 0.0), groups)
    some_RxG = jnp.where(total_RxG > 0, total_RxG, 1.0)  # groups without free tokens have size 0
    scale_RxG = repeat(draws.weight_BxG) / some_RxG
    share_RxG = scale_RxG * repeat(batch.weight_B)[:, None] / count
    weight_RxL = jnp.where(is_masked_RxL, forward.group_to_token(share_RxG, length), 0.0)
    total, nats_RxL, _ = prediction.weighted_loss(
      row_losses.power_weighted, x_RxL, weight_RxL, power_V
    )
    estimate_RxG = scale_RxG * forward.group_sums(nats_RxL, groups)
    return total, estimate_RxG.reshape(-1, count, groups)

  def _score(self, free_BxL, sets, power_BxL, estimate_BxKxG, weight_BxG):
    """A scalar whose gradient in w is that of the law of the masked sets."""
    groups = sets.log_t_BxG.shape[1]
    log_t_BxL = forward.group_to_token(sets.log_t_BxG, free_BxL.shape[1])
    log_rate_BxL = jnp.where(free_BxL, power_BxL * log_t_BxL, -1.0)
    log_q_BxG = [
      forward.group_sums(
        jnp.where(free_BxL, log_probability(log_rate_BxL, is_masked_BxL), 0.0), groups
      )
      for is_masked_BxL in jnp.moveaxis(sets.is_masked_BxKxL, 1, 0)
    ]
    constant_BxL = jax.lax.stop_gradient(power_BxL)
    bias_BxL = jnp.where(free_BxL, jnp.log(constant_BxL) + constant_BxL * log_t_BxL, -1e30)
    chance_BxL = jax.nn.softmax(bias_BxL.reshape(*weight_BxG.shape, -1), axis=-1)
    change_BxL = chance_BxL.reshape(free_BxL.shape) * (power_BxL - constant_BxL) * log_t_BxL
    expected_BxG = forward.group_sums(jnp.where(free_BxL, change_BxL, 0.0), groups)
    first_BxG, second_BxG = estimate_BxKxG[:, 0], estimate_BxKxG[:, 1]
    score_BxG = 0.5 * (first_BxG - second_BxG) * (log_q_BxG[0] - log_q_BxG[1])
    score_BxG += 0.5 * (first_BxG + second_BxG) * expected_BxG
    return jnp.sum(weight_BxG * score_BxG)


def log_probability(log_rate_BxL: jax.Array, is_masked_BxL: jax.Array) -> jax.Array:
  """log q of each token's state, from the log of the probability that it is masked, below 0."""
  safe_BxL = jnp.where(is_masked_BxL, -1.0, log_rate_BxL)
  return jnp.where(is_masked_BxL, log_rate_BxL, jnp.log(-jnp.expm1(safe_BxL)))
