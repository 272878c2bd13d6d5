"""MATHS 5: which VMD figures are bounds, the law of its samples, and the trap of the surrogate.

Latents are tables of a few codes here, so that every expectation over z is a sum.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from md4vmd import latents, samplers
from md4vmd.evaluators.enumeration import exact_log_prob, subsets
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import VMD
from md4vmd.schedules import TABLE
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V, J = 3, 3, 4
X_L = np.array([2, 0, 1])
FNS = toys.random_latent(L, V, values=J)
ROWS = 4096


def enumerated(fns):
  """The same model without its posterior, for exact sums over the codes."""
  return ModelFns(fns.denoise, None, fns.prior)


def evaluate(objective, fns, rows=ROWS):
  """LossTerms of many independent draws for one sequence."""
  return toys.loss_terms(objective, fns, toys.make_batch(np.tile(X_L, (rows, 1))), seed=0)


def law(fns, schedule, times, x_NxL, **settings):
  """exact_log_prob, compiled."""
  exact = lambda times, x_NxL: exact_log_prob(fns, schedule, times, x_NxL, V, **settings)
  return np.asarray(jax.jit(exact)(times, jnp.asarray(x_NxL)))


def mean(values_B):
  values_B = np.asarray(values_B)
  return values_B.mean(), values_B.std(ddof=1) / np.sqrt(len(values_B))


class States(NamedTuple):
  """Masked tokens, visible sequence and revealed set S of every combination."""

  masked_RxL: np.ndarray
  revealed_RxL: np.ndarray

  @property
  def zt_RxL(self):
    return np.where(self.masked_RxL, V, X_L)


def _states():
  pairs = [(m, s) for m, s in itertools.product(subsets(L), repeat=2) if not (s & ~m).any()]
  return States(*(np.array(part) for part in zip(*pairs, strict=True)))


def _values(fns, states, t):
  """log mu of X_L, log prior and log posterior for every state and code."""
  rows = len(states.zt_RxL)
  z_RJx1xJ = jnp.tile(jnp.eye(J), (rows, 1))[:, None]
  zt = jnp.repeat(jnp.asarray(states.zt_RxL), J, axis=0)
  logits = fns.denoise(zt, jnp.full((rows * J, 1), t), latent_BxGxZ=z_RJx1xJ).logits()
  log_mu = scipy.special.log_softmax(logits, axis=-1)[:, np.arange(L), X_L].reshape(rows, J, L)
  prior = fns.prior(jnp.asarray(states.zt_RxL)).support().log_p_BxGxJ[:, 0]
  x_RxL = jnp.tile(X_L, (rows, 1))
  posterior = fns.encode(x_RxL, jnp.asarray(states.zt_RxL), jnp.asarray(states.revealed_RxL))
  return log_mu, np.asarray(prior), np.asarray(posterior.support().log_p_BxGxJ[:, 0])


def _step_bound(fns, schedule, steps, *, exact):
  """NELBO_T by enumeration: with the posterior, or with the exact sum over the codes."""
  times, states, total = np.asarray(samplers.times("uniform", steps)), _states(), 0.0
  alpha = np.asarray(schedule.alpha(jnp.asarray(times)))
  masked, revealed = states.masked_RxL.sum(-1), states.revealed_RxL.sum(-1)
  for i in range(steps):
    u = (alpha[i + 1] - alpha[i]) / (1 - alpha[i])
    chance_R = (1 - alpha[i]) ** masked * alpha[i] ** (L - masked)
    chance_R *= u**revealed * (1 - u) ** (masked - revealed)
    log_mu_RxJxL, prior_RxJ, posterior_RxJ = _values(fns, states, times[i])
    log_mu_RxJ = (log_mu_RxJxL * states.revealed_RxL[:, None]).sum(-1)
    if exact:
      nats_R = -scipy.special.logsumexp(prior_RxJ + log_mu_RxJ, axis=1)
    else:
      nats_R = np.sum(np.exp(posterior_RxJ) * (posterior_RxJ - prior_RxJ - log_mu_RxJ), axis=1)
    total += np.sum(chance_R * np.where(revealed > 0, nats_R, 0.0))
  return total


# --- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("exact", [True, False], ids=["codes", "posterior"])
def test_step_averages_to_the_enumerated_bound_above_the_exact_law(steps, exact, x64):
  objective = VMD(Linear(), V, "step", step_counts=(steps,))
  terms = evaluate(objective, enumerated(FNS) if exact else FNS)
  bound = _step_bound(FNS, Linear(), steps, exact=exact)
  measured, error = mean(terms.nelbo_B)
  assert abs(measured - bound) < 4 * error + 1e-9 and error < 0.05 * bound
  times = samplers.times("uniform", steps)
  nll = -float(law(enumerated(FNS), Linear(), times, X_L[None])[0])
  if exact and steps == 1:
    assert bound == pytest.approx(nll, rel=1e-9)
  else:
    assert bound > nll + 1e-3
  np.testing.assert_allclose(sum(terms.parts.values()), terms.nelbo_B, rtol=1e-9)


def test_a_posterior_that_reads_all_tokens_is_looser_and_still_a_bound(x64):
  objective = VMD(Linear(), V, "step", step_counts=(3,), posterior_reads="clean")
  measured, error = mean(evaluate(objective, FNS, rows=4 * ROWS).nelbo_B)
  times = samplers.times("uniform", 3)
  nll = -float(law(enumerated(FNS), Linear(), times, X_L[None])[0])
  assert measured - 4 * error > nll


def test_several_draws_lie_between_one_draw_and_the_exact_law(x64):
  exact = _step_bound(FNS, Linear(), 1, exact=True)
  one, eight, many = (
    mean(evaluate(VMD(Linear(), V, "step", samples=k), FNS, rows=ROWS).nelbo_B) for k in (1, 8, 64)
  )
  assert one[0] - 3 * one[1] > eight[0] + 3 * eight[1] > eight[0] - 3 * eight[1] > exact
  assert exact - 4 * many[1] < many[0] < exact + 0.1


@pytest.mark.parametrize("schedule", [make() for make in TABLE.values()], ids=TABLE)
def test_global_is_above_the_law_of_a_sampler_that_holds_z(schedule, x64):
  objective = VMD(schedule, V, "global", estimator="steps", steps=4)
  measured, error = mean(evaluate(objective, FNS).nelbo_B)
  times = samplers.times("uniform", 4)
  nll = -law(enumerated(FNS), schedule, times, X_L[None], latent_refresh="once")[0]
  assert measured - 4 * error > nll
  all_X = toys.sequences(L, V)
  for refresh in ("once", "step"):
    p_X = np.exp(law(enumerated(FNS), schedule, times, all_X, latent_refresh=refresh))
    assert p_X.sum() == pytest.approx(1.0, abs=1e-10)


def test_the_two_refreshes_are_different_laws(x64):
  times = samplers.times("uniform", 4)
  once, step = (
    law(enumerated(FNS), Linear(), times, X_L[None], latent_refresh=refresh)[0]
    for refresh in ("once", "step")
  )
  assert abs(once - step) > 1e-3


def test_a_mix_of_step_counts_averages_their_bounds(x64):
  terms = evaluate(VMD(Linear(), V, "step", step_counts=(1, 3)), FNS)
  bounds = [_step_bound(FNS, Linear(), steps, exact=False) for steps in (1, 3)]
  measured, error = mean(terms.nelbo_B)
  assert abs(measured - np.mean(bounds)) < 4 * error


def test_jumps_report_no_bound_unless_all_start_from_all_masked(x64):
  terms = evaluate(VMD(Linear(), V, "jump", all_masked=0.5), FNS, rows=64)
  assert terms.nelbo_B is None
  assert all(name.startswith("surrogate_") for name in terms.parts)
  terms = evaluate(VMD(Linear(), V, "jump", all_masked=1.0), enumerated(FNS), rows=64)
  exact = _step_bound(FNS, Linear(), 1, exact=True)
  np.testing.assert_allclose(terms.nelbo_B, exact, rtol=1e-9)


@pytest.mark.parametrize("form", ["global", "step", "jump", "paper"])
def test_the_evaluated_objective_is_a_bound_for_every_form(form):
  trained = VMD(Linear(), V, form, kl_warmup=100)
  reported = trained.bound(steps=4, grid="cosine")
  assert evaluate(reported, FNS, rows=64).nelbo_B is not None
  assert "bound" in reported.convention and reported.latent_refresh == trained.latent_refresh
  if reported.form == "step":
    assert "T=4" in reported.convention and "cosine" in reported.convention


def test_one_step_per_block_is_bounded_exactly_by_codes(x64):
  """-log p of decoding token after token: the sum over blocks of the jumps' exact costs."""
  fns = enumerated(FNS)
  objective = VMD(Linear(), V, "jump", blocks=3, all_masked=1.0)
  measured, error = mean(evaluate(objective, fns).nelbo_B)
  total = 0.0
  for block in range(3):
    masked_L = np.arange(3) >= block
    states = States(masked_L[None], (np.arange(3) == block)[None])
    t = float(1.0 - block / 3)
    log_mu, prior, _ = _values(FNS, states, t)
    total -= scipy.special.logsumexp(prior[0] + log_mu[0, :, block])
  assert measured == pytest.approx(total, abs=4 * error)


def test_free_nats_and_warm_up_change_the_loss_and_never_the_bound(x64):
  plain, free = (
    evaluate(VMD(Linear(), V, "step", free_nats=nats, kl_hold=hold), FNS, rows=64)
    for nats, hold in [(0.0, 0), (5.0, 10)]
  )
  np.testing.assert_array_equal(plain.nelbo_B, free.nelbo_B)
  assert float(plain.loss) != float(free.loss)


def test_a_global_form_of_an_enumerated_latent_is_refused():
  with pytest.raises(ValueError, match=r"latent\.enumerated=False"):
    evaluate(VMD(Linear(), V, "global"), enumerated(FNS), rows=2)


# --- the trap ----------------------------------------------------------------------------------

PAIRS = np.stack([np.arange(10), (np.arange(10) + 1) % 10], axis=1)


@dataclasses.dataclass(frozen=True)
class Certain:
  """A posterior that knows the pair where both tokens are hidden and is the prior elsewhere."""

  k_B: jax.Array
  is_hidden_B: jax.Array

  def sample(self, key_B, count):
    del key_B
    one_hot = jnp.where(self.is_hidden_B[:, None], jax.nn.one_hot(self.k_B, 10), 0.1)
    return jnp.repeat(one_hot[:, None, None, :], count, axis=1)

  def log_prob(self, z_BxKxGxZ):
    return jnp.where(self.is_hidden_B, 0.0, -jnp.log(10.0))[:, None, None] + 0 * z_BxKxGxZ[..., 0]

  def kl(self, other):
    del other
    return jnp.where(self.is_hidden_B, jnp.log(10.0), 0.0)[:, None]


def _perfect():
  """Decodes a pair from a visible token, or else from z."""

  def denoise(zt_BxL, t_BxG, *, latent_BxGxZ, label_B=None, dropout_key=None):
    first = jnp.where(zt_BxL[:, 0] < 10, zt_BxL[:, 0], (zt_BxL[:, 1] - 1) % 10)
    is_hidden = (zt_BxL == 10).all(-1)
    k_B = jnp.where(is_hidden, latent_BxGxZ[:, 0].argmax(-1), first)
    pair_BxL = jnp.stack([k_B, (k_B + 1) % 10], axis=1)
    return toys.Logits(jnp.log(0.999 * jax.nn.one_hot(pair_BxL, 10) + 1e-4))

  def encode(x_BxL, zt_BxL, where_BxL, *, label_B=None):
    return Certain(x_BxL[:, 0], (where_BxL & (zt_BxL == 10)).all(-1))

  def prior(zt_BxL, *, label_B=None):
    return latents.Table(jnp.zeros((len(zt_BxL), 1, 10)), 1, 10, 1.0)

  return ModelFns(denoise, encode, prior)


def test_global_and_step_are_above_the_entropy_of_the_pairs_and_the_surrogate_is_below():
  entropy, fns = np.log(10.0), _perfect()
  batch = toys.make_batch(np.tile(PAIRS, (400, 1)))
  for objective in (
    VMD(Linear(), 10, "global"),
    VMD(Linear(), 10, "step", step_counts=(1,)),
    VMD(Linear(), 10, "step", step_counts=(4,), posterior_reads="clean"),
  ):
    measured, error = mean(toys.loss_terms(objective, fns, batch).nelbo_B)
    assert entropy - 4 * error - 1e-6 <= measured < entropy + 4 * error + 0.01
  terms = toys.loss_terms(VMD(Linear(), 10, "paper"), fns, batch)
  assert terms.nelbo_B is None
  measured, error = mean(terms.parts["surrogate_nats"])
  assert measured == pytest.approx(entropy / 2, abs=4 * error + 0.01)
  assert measured + 10 * error < entropy


# --- sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["once", "step"])
def test_samples_follow_the_exact_law_of_their_refresh(refresh):
  fns, times, count = enumerated(FNS), samplers.times("uniform", 2), 20_000

  @jax.jit
  def draw(key):
    return samplers.sample(
      key, fns, Linear(), samplers.Ancestral(), times,
      tokens_BxL=jnp.full((count, L), V), free_BxL=jnp.ones((count, L), bool), vocab_size=V,
      latent_refresh=refresh,
    ).x_BxL  # fmt: skip

  x_BxL = np.asarray(draw(jax.random.key(5)))
  counts_X = np.bincount(x_BxL @ V ** np.arange(L)[::-1], minlength=V**L)
  all_X = toys.sequences(L, V)
  p_X = np.exp(np.asarray(law(fns, Linear(), times, all_X, latent_refresh=refresh), np.float64))
  assert scipy.stats.chisquare(counts_X, count * p_X / p_X.sum()).pvalue > 1e-3
