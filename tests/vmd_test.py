"""MATHS 5: which VMD figures are bounds, their reductions to MD4, and the trap of the surrogate.

Latents are tables of a few codes here, so that every expectation over z is a sum.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from md4vmd import latents, networks, rngs, samplers
from md4vmd.evaluators.enumeration import exact_log_prob, subsets
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import MD4, VMD
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


def evaluate(objective, fns, x_L=X_L, rows=ROWS, **fields):
  """LossTerms of many independent draws for one sequence."""
  batch = toys.make_batch(np.tile(x_L, (rows, 1)), **fields)

  def loss(key):
    draws = objective.draw(rngs.batch_noise(key, rows), batch)
    return objective.loss(fns, batch, draws, step=jnp.zeros((), int))

  return jax.jit(loss)(jax.random.key(0))


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


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 1], ids=["charged", "warming up"])
@pytest.mark.parametrize("exact", [True, False], ids=["codes", "posterior"])
def test_the_gradient_is_that_of_the_log_of_the_sum_over_latents(exact, step, x64):
  """Against jax.grad of the formula written plainly, through a Gaussian posterior or a table.

  Half-way through the warm-up the ratio of prior to proposal, uniform for a table, counts to the
  power 1/2 where all is masked. For a table the denoiser's gradient is a draw of its exact
  posterior's: the same in the mean.
  """
  rng = np.random.default_rng(0)
  params = {
    name: jnp.asarray(rng.normal(size=size))
    for name, size in {"out": (2, L, V), "q": (L, 4), "p": (2,)}.items()
  }

  def fns(params):
    def denoise(zt_BxL, t_BxG, *, latent_BxGxZ, label_B=None, dropout_key=None):
      return toys.Logits(jnp.einsum("bgz,zlv->blv", latent_BxGxZ, params["out"]))

    def encode(x_BxL, zt_BxL, where_BxL, *, label_B=None):
      raw_BxS = x_BxL.astype(float) @ params["q"]
      return latents.Gaussian(raw_BxS[:, None, :2], raw_BxS[:, None, 2:])

    def prior(zt_BxL, *, label_B=None):
      if exact:
        return latents.Table(jnp.tile(params["p"], (len(zt_BxL), 1))[:, None], 1, 2, 1.0)
      mean_BxGxZ = jnp.tile(params["p"], (len(zt_BxL), 1))[:, None]
      return latents.Gaussian(mean_BxGxZ, jnp.zeros_like(mean_BxGxZ))

    return ModelFns(denoise, None if exact else encode, prior)

  objective = VMD(Linear(), V, "jump", samples=3, all_masked=0.5, kl_warmup=2)
  x_BxL = np.array([[2, 0, 1], [1, 1, 0], [0, 2, 2], [1, 0, 1]])
  batch = toys.make_batch(x_BxL)
  draws = objective.draw(rngs.batch_noise(jax.random.key(1), 4), batch)
  masked_BxL = MD4(Linear(), V).is_masked(batch, draws)
  assert len(set(masked_BxL.sum(-1).tolist())) > 1
  charge_Bx1 = np.where(masked_BxL.all(-1, keepdims=True), step / 2, 1.0)

  def plain(params):
    model = fns(params)
    prior = model.prior(batch.x_BxL)
    if exact:
      support = prior.support()
      z_BxKxGxZ = jnp.tile(support.z_JxZ[None, :, None], (4, 1, 1, 1))
      log_ratio_BxK = support.log_p_BxGxJ[:, 0] + jnp.log(2)
    else:
      posterior = model.encode(batch.x_BxL, None, None)
      z_BxKxGxZ = posterior.sample(rngs.fold_each(draws.key_B, 1), 3)
      log_ratio_BxK = (prior.log_prob(z_BxKxGxZ) - posterior.log_prob(z_BxKxGxZ))[..., 0]
    proposals = log_ratio_BxK.shape[1]
    logits = jnp.einsum("bkz,zlv->bklv", z_BxKxGxZ[:, :, 0], params["out"])
    log_mu = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch.x_BxL[:, None, :, None], axis=-1
    )[..., 0]
    log_mu_BxK = (log_mu * masked_BxL[:, None]).sum(-1)
    log_w_BxK = charge_Bx1 * log_ratio_BxK - jnp.log(proposals) + log_mu_BxK
    return -jax.nn.logsumexp(log_w_BxK, axis=1).sum()

  ours = lambda params: objective.loss(fns(params), batch, draws, step=jnp.int32(step)).loss
  (value, grads), (expected, plain_grads) = (
    jax.jit(jax.value_and_grad(function))(params) for function in (ours, plain)
  )
  assert float(value) == pytest.approx(float(expected), rel=1e-12)
  np.testing.assert_allclose(grads["p"], plain_grads["p"], rtol=1e-9, atol=1e-12)
  if not exact:
    for name in params:
      np.testing.assert_allclose(grads[name], plain_grads[name], rtol=1e-9, atol=1e-12)
    return

  @jax.jit
  @jax.vmap
  def drawn(key):
    fresh = dataclasses.replace(draws, key_B=jax.random.split(key, 4))
    loss = lambda params: objective.loss(fns(params), batch, fresh, step=jnp.int32(step)).loss
    return jax.grad(loss)(params)["out"]

  out_N = np.asarray(drawn(jax.random.split(jax.random.key(2), 2000)))
  error = out_N.std(axis=0, ddof=1) / np.sqrt(len(out_N))
  assert error.max() > 0
  assert (np.abs(out_N.mean(0) - plain_grads["out"]) <= 4.5 * error + 1e-12).all()


# --- reductions to MD4 -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
  denoiser = networks.Transformer(
    V, width=16, depth=2, heads=2, condition_width=8, time_conditioning=False
  )
  made = networks.with_latent(denoiser, latents.GaussianFamily(width=2))
  return made, toys.random_params(made, jnp.zeros((1, L), int))


def _zeroed(params, *path):
  """A copy with the leaves below a path set to 0."""
  if not path:
    return jax.tree.map(jnp.zeros_like, params)
  return {**params, path[0]: _zeroed(params[path[0]], *path[1:])}


def _loss(objective, fns, batch):
  @jax.jit
  def loss(key):
    draws = objective.draw(rngs.batch_noise(key, len(batch.x_BxL)), batch)
    return objective.loss(fns, batch, draws, step=jnp.zeros((), int))

  return loss(jax.random.key(3))


BATCH = toys.make_batch(toys.sequences(L, V)[:16])


def test_a_denoiser_deaf_to_the_latent_costs_md4_plus_the_divergence(network):
  made, params = network
  deaf = {**params, "denoiser": _zeroed(params["denoiser"], "latent", "up", "kernel")}
  fns = networks.bind(made, deaf)
  vmd = _loss(VMD(Linear(), V, "global"), fns, BATCH)
  md4 = _loss(MD4(Linear(), V), ModelFns(fns.denoise), BATCH)
  np.testing.assert_allclose(vmd.parts["diffusion"], md4.nelbo_B, rtol=1e-6)
  assert (vmd.parts["kl"] > 1e-3).all()
  np.testing.assert_allclose(vmd.nelbo_B, md4.nelbo_B + vmd.parts["kl"], rtol=1e-6)


@pytest.mark.parametrize("form", ["global", "step", "jump", "paper"])
def test_a_posterior_equal_to_the_prior_costs_no_divergence(network, form):
  made, params = network
  blind = {**params, "recognition": _zeroed(params["recognition"], "raw")}
  terms = _loss(VMD(Linear(), V, form), networks.bind(made, blind), BATCH)
  prefix = "surrogate_" if form in ("jump", "paper") else ""
  np.testing.assert_allclose(terms.parts[f"{prefix}kl"], 0.0, atol=1e-6)


def test_without_a_latent_global_is_md4_bit_for_bit(network):
  made, params = network
  fns = networks.bind(made.denoiser, params["denoiser"])
  assert fns.prior is None and fns.encode is None
  for estimator, steps in [("count", None), ("time", None), ("steps", 3)]:
    vmd = _loss(VMD(Linear(), V, "global", estimator=estimator, steps=steps), fns, BATCH)
    md4 = _loss(MD4(Linear(), V, estimator, steps), fns, BATCH)
    assert float(vmd.loss) == float(md4.loss)
    np.testing.assert_array_equal(vmd.nelbo_B, md4.nelbo_B)


def test_all_masked_positions_differ_given_a_latent(network):
  """Rotary attention over equal tokens cannot tell positions apart; a latent needs it to."""
  made, params = network
  logits_BxLxV = networks.bind(made, params).denoise(jnp.full((1, L), V), None).logits()
  assert np.abs(np.diff(logits_BxLxV, axis=1)).max() > 1e-2


def test_a_latent_moves_the_prediction_as_condition_and_as_tokens():
  for tokens in (0, 2):
    denoiser = networks.Transformer(
      V, width=16, depth=1, heads=2, condition_width=8, time_conditioning=False, adaln_zero=False
    )
    made = networks.with_latent(denoiser, latents.GaussianFamily(width=2), tokens=tokens)
    zt_BxL = jnp.full((1, L), V)

    @jax.jit
    def predict(params, made=made, zt_BxL=zt_BxL):
      denoise = functools.partial(networks.bind(made, params).denoise, zt_BxL, None)
      latents_BxGxZ = [jnp.full((1, 1, 2), z) for z in (0.0, 3.0)]
      return denoise().logits(), *(denoise(latent_BxGxZ=z).logits() for z in latents_BxGxZ)

    without, at_0, at_3 = predict(toys.random_params(made, zt_BxL))
    assert at_0.shape == (1, L, V) and np.abs(at_0 - at_3).max() > 1e-2
    np.testing.assert_array_equal(without, at_0)


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
    measured, error = mean(_loss(objective, fns, batch).nelbo_B)
    assert entropy - 4 * error - 1e-6 <= measured < entropy + 4 * error + 0.01
  terms = _loss(VMD(Linear(), 10, "paper"), fns, batch)
  assert terms.nelbo_B is None
  measured, error = mean(terms.parts["surrogate_nats"])
  assert measured == pytest.approx(entropy / 2, abs=4 * error + 0.01)
  assert measured + 10 * error < entropy


# --- blocks, clues, settings -------------------------------------------------------------------


def test_jumps_in_blocks_see_earlier_blocks_and_score_their_own(x64):
  seen = []

  def denoise(zt_BxL, t_BxG, **inputs):
    seen.append(np.asarray(zt_BxL))
    return toys.Logits(jnp.zeros((*zt_BxL.shape, V)))

  x_L = np.array([0, 1, 2, 0, 1, 2])
  objective = VMD(Linear(), V, "jump", blocks=3, all_masked=0.5)
  batch = toys.make_batch(np.tile(x_L, (96, 1)))
  draws = objective.draw(rngs.batch_noise(jax.random.key(0), 96), batch)
  terms = objective.loss(ModelFns(denoise), batch, draws, step=jnp.zeros((), int))
  is_masked_BxL = seen[0] == V
  kinds = set()
  for masked_L, block, nats in zip(
    is_masked_BxL, np.asarray(draws.block_B), terms.parts["surrogate_nats"], strict=True
  ):
    own = masked_L[2 * block : 2 * block + 2]
    assert not masked_L[: 2 * block].any() and masked_L[2 * block + 2 :].all() and own.any()
    assert nats == pytest.approx(3 * own.sum() * np.log(V))
    kinds.add((int(block), int(own.sum())))
  assert len(kinds) == 6


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


def test_the_divergence_warms_up_on_whole_masks_alone():
  objective = VMD(Linear(), V, "jump", all_masked=0.5, kl_hold=10, kl_warmup=20)
  batch = toys.make_batch(np.tile(X_L, (64, 1)))
  draws = objective.draw(rngs.batch_noise(jax.random.key(0), 64), batch)
  is_whole_B = np.asarray(draws.count_BxG[:, 0] == L)
  assert 0 < is_whole_B.sum() < 64
  masked_BxL = MD4(Linear(), V).is_masked(batch, draws)
  for step, expected in [(0, 0.0), (10, 0.0), (20, 0.5), (30, 1.0), (99, 1.0)]:
    charge_B = np.asarray(objective._kl_charge(jnp.int32(step), batch, masked_BxL, draws))[:, 0]
    np.testing.assert_allclose(charge_B, np.where(is_whole_B, expected, 1.0))
    # One z for all masks, or by choice: all warm up.
    for change in ({"form": "global"}, {"kl_warmup_masks": "all"}):
      held = dataclasses.replace(objective, **change)
      charge_BxG = held._kl_charge(jnp.int32(step), batch, masked_BxL, draws)
      np.testing.assert_allclose(charge_BxG, np.full((64, 1), expected))


def test_a_block_without_free_tokens_costs_nothing(x64):
  given_BxL = np.array([[True, True, True], [True, False, False]])
  batch = toys.make_batch(np.tile(X_L, (2, 1)), given_BxL=given_BxL)
  for form in ("global", "step", "jump"):
    terms = _loss(VMD(Linear(), V, form, all_masked=1.0), FNS, batch)
    assert terms.nelbo_B[0] == 0 and terms.nelbo_B[1] > 0


def test_free_nats_and_warm_up_change_the_loss_and_never_the_bound(x64):
  plain, free = (
    evaluate(VMD(Linear(), V, "step", free_nats=nats, kl_hold=hold), FNS, rows=64)
    for nats, hold in [(0.0, 0), (5.0, 10)]
  )
  np.testing.assert_array_equal(plain.nelbo_B, free.nelbo_B)
  assert float(plain.loss) != float(free.loss)


@pytest.mark.parametrize("form", ["global", "step", "jump", "paper"])
def test_clues_are_seen_by_prior_and_posterior_and_never_scored(form):
  batch = toys.make_batch(np.tile(X_L, (64, 1)), given_BxL=np.tile([False, True, False], (64, 1)))
  objective = VMD(Linear(), V, form)

  @jax.jit
  def loss(key):
    seen = {"denoise": [], "encode": [], "prior": []}

    def spy(role):
      def call(*arrays, **inputs):
        seen[role].append(arrays[1] if role == "encode" else arrays[0])
        return getattr(FNS, role)(*arrays, **inputs)

      return call

    draws = objective.draw(rngs.batch_noise(key, 64), batch)
    return objective.loss(ModelFns(*map(spy, seen)), batch, draws, step=jnp.zeros((), int)), seen

  terms, seen = loss(jax.random.key(0))
  assert all(seen.values())
  for tokens_BxL in itertools.chain(*seen.values()):
    assert (tokens_BxL[:, 1] == X_L[1]).all()
  np.testing.assert_array_equal(terms.tokens_B, 2)


@pytest.mark.parametrize("form", ["global", "step", "jump", "paper"])
def test_an_example_that_fills_the_batch_adds_nothing(form, x64):
  objective = VMD(Linear(), V, form)
  batch = toys.make_batch(np.tile(X_L, (4, 1)), weight_B=[1.0, 1.0, 1.0, 0.0])

  @jax.jit
  def losses(key):
    draws = objective.draw(rngs.batch_noise(key, 4), batch)
    first = lambda count: jax.tree.map(lambda leaf: leaf[:count], (batch, draws))
    return [objective.loss(FNS, *first(count), step=jnp.zeros((), int)) for count in (4, 3)]

  whole, apart = losses(jax.random.key(0))
  assert float(whole.loss) == pytest.approx(float(apart.loss), rel=1e-12)
  assert all(part[3] == 0 for part in whole.parts.values())


@pytest.mark.parametrize(
  ("settings", "rule"),
  [
    ({"form": "local"}, "form is 'local'"),
    ({"samples": 0}, "samples is 0"),
    ({"form": "global", "samples": 4}, "no bound"),
    ({"form": "step", "samples": 4, "posterior_reads": "clean"}, "no bound"),
    ({"step_counts": ()}, "step_counts"),
    ({"all_masked": 1.5}, "all_masked is 1.5"),
    ({"blocks": 2, "form": "step"}, "blocks is 2"),
    ({"samples": 2, "free_nats": 1.0}, "free_nats"),
    ({"grid": "cubic"}, "grid is 'cubic'"),
    ({"estimator": "steps"}, "needs a number of steps"),
  ],
)
def test_settings_that_mean_nothing_are_refused(settings, rule):
  with pytest.raises(ValueError, match=rule):
    VMD(Linear(), V, **settings)


def test_a_global_form_of_an_enumerated_latent_is_refused():
  with pytest.raises(ValueError, match=r"latent\.enumerated=False"):
    evaluate(VMD(Linear(), V, "global"), enumerated(FNS), rows=2)


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
