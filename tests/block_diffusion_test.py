"""Block diffusion: its bound by enumeration, beside MD4's and SEDD's, and a latent per block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from md4vmd import latents, networks, rngs, samplers
from md4vmd.evaluators.enumeration import subsets
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import MD4, SEDD, VMD
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V, S = 4, 3, 2  # S: tokens of a block
X_XxL = toys.sequences(L, V)
LINEAR = Linear()
RNG = np.random.default_rng(0)


# --- the bound ---------------------------------------------------------------------------------


def _expected(objective, fns, x_MxL):
  """E nelbo_M over counts, times and masks, the same in every block: each block has a term of its
  own, so the mean over draws that blocks share is the mean over independent ones."""
  size = objective.block_size
  is_masked_RxS = subsets(size)
  if objective.estimator == "count":
    is_masked_RxS = is_masked_RxS[1:]
    k_R = is_masked_RxS.sum(-1)
    chance_R, u_R = 1 / (size * scipy.special.comb(size, k_R)), (k_R - 0.5) / size
  else:
    t_R = np.repeat((np.arange(objective.steps) + 1) / objective.steps, 2**size)
    is_masked_RxS = np.tile(is_masked_RxS, (objective.steps, 1))
    k_R = is_masked_RxS.sum(-1)
    chance_R = t_R**k_R * (1 - t_R) ** (size - k_R) / objective.steps
    u_R = t_R - 0.5 / objective.steps
  np.testing.assert_allclose(chance_R.sum(), 1.0, rtol=1e-12)
  batch = toys.make_batch(np.repeat(x_MxL, len(k_R), axis=0))
  each = lambda array_RxS: jnp.asarray(np.tile(array_RxS, (len(x_MxL), L // size)))
  uniform_BxL, u_BxG = each(np.where(is_masked_RxS, 0.0, 1.0)), each(u_R[:, None])
  terms = toys.loss_terms(objective, fns, batch, toys.Script(u_BxG, uniform_BxL, 0 * u_BxG + 0.5))
  return np.asarray(terms.nelbo_B).reshape(len(x_MxL), -1) @ chance_R


SUPPORT_MxL = np.array([[0, 1, 2, 0], [0, 1, 0, 1], [2, 2, 1, 1], [2, 1, 2, 1]])
PROBABILITIES_M = np.array([0.4, 0.1, 0.3, 0.2])


def _true_in_blocks(size):
  """p(x_n | visible tokens of the block, clean tokens of earlier blocks)."""
  true = toys.posterior(SUPPORT_MxL, PROBABILITIES_M, V)

  def denoise(zt_BxL, t_BxG, *, clean_BxL, **rest):
    logits = []
    for start in range(0, L, size):
      hidden_BxN = jnp.full_like(zt_BxL[:, start + size :], V)
      parts = [clean_BxL[:, :start], zt_BxL[:, start : start + size], hidden_BxN]
      all_BxLxV = true.denoise(jnp.concatenate(parts, axis=1), t_BxG, **rest).logits()
      logits.append(all_BxLxV[:, start : start + size])
    return toys.Logits(jnp.concatenate(logits, axis=1))

  return ModelFns(denoise)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_true_denoiser_has_the_entropy_as_its_bound_at_every_block_size(size, x64):
  objective, fns = MD4(LINEAR, V, block_size=size), _true_in_blocks(size)
  bound_M = _expected(objective, fns, SUPPORT_MxL)
  entropy = scipy.stats.entropy(PROBABILITIES_M)
  assert PROBABILITIES_M @ bound_M == pytest.approx(entropy, rel=1e-9)


def test_one_block_draws_and_bounds_what_md4_does(make_fns):
  batch = toys.make_batch(X_XxL[:8], given_BxL=RNG.random((8, L)) < 0.3)
  noise = toys.Script(*(jnp.asarray(RNG.random(shape)) for shape in [(8, 1), (8, L), (8, 1)]))
  whole, one = make_fns("all"), make_fns("blocks", block_size=L)
  whole = toys.loss_terms(MD4(LINEAR, V), whole, batch, noise)
  block = toys.loss_terms(MD4(LINEAR, V, block_size=L), one, batch, noise)
  assert np.asarray(whole.nelbo_B).std() > 0.3
  np.testing.assert_allclose(block.nelbo_B, whole.nelbo_B, rtol=1e-5)


def test_blocks_of_one_token_are_an_exact_chain(make_fns):
  fns = make_fns("blocks", block_size=1, time_conditioning=False)
  objective, batch = MD4(LINEAR, V, block_size=1), toys.make_batch(X_XxL)
  draw = lambda: toys.Script(*(jnp.asarray(RNG.random((len(X_XxL), L))) for _ in range(3)))
  nll_X, again_X = (toys.loss_terms(objective, fns, batch, draw()).nelbo_B for _ in range(2))
  np.testing.assert_array_equal(nll_X, again_X)  # whatever the draws, every token is masked
  nll_X = np.asarray(nll_X, np.float64)
  assert np.exp(-nll_X).sum() == pytest.approx(1.0, abs=1e-5) and nll_X.std() > 0.1
  cache, chain_X = fns.init_cache(len(X_XxL), L), 0.0
  for n in range(L):
    prediction, _ = fns.denoise(np.full((len(X_XxL), 1), V), None, cache=cache)
    log_mu_XxV = scipy.special.log_softmax(toys.logits(prediction)[:, 0], axis=-1)
    chain_X += log_mu_XxV[np.arange(len(X_XxL)), X_XxL[:, n]]
    _, cache = fns.denoise(X_XxL[:, n : n + 1], None, cache=cache)
  np.testing.assert_allclose(-chain_X, nll_X, atol=1e-5)


@pytest.mark.parametrize("estimator", ["count", "time"])
def test_score_entropy_in_blocks_is_the_bound_in_blocks_and_the_price_of_the_normaliser(
  make_fns, estimator
):
  fns, batch = make_fns("blocks"), toys.make_batch(X_XxL[:8], scored_BxL=RNG.random((8, L)) < 0.8)
  noise = toys.Script(*(jnp.asarray(RNG.random(shape)) for shape in [(8, 2), (8, L), (8, 2)]))
  md4, sedd = (
    toys.loss_terms(kind(LINEAR, V, estimator, block_size=S), fns, batch, noise)
    for kind in (MD4, SEDD)
  )
  assert np.asarray(md4.nelbo_B).std() > 0.3
  np.testing.assert_allclose(sedd.parts["normalised"], md4.nelbo_B, rtol=1e-5)
  np.testing.assert_allclose(sum(sedd.parts.values()), sedd.nelbo_B, rtol=1e-6)
  assert sedd.parts["normaliser"].min() >= 0 and sedd.parts["normaliser"].max() > 0.01
  assert sedd.loss == pytest.approx(float(sedd.nelbo_B.sum()), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_bound_is_above_the_exact_law_and_equal_to_it_for_one_step(make_fns, steps):
  fns = make_fns("blocks", time_conditioning=False)
  log_p_X = toys.block_laws(fns, X_XxL, V, steps)
  assert np.exp(log_p_X).sum() == pytest.approx(1.0, abs=1e-5)
  gap_X = _expected(MD4(LINEAR, V, "steps", steps, block_size=S), fns, X_XxL) + log_p_X
  if steps == 1:
    np.testing.assert_allclose(gap_X, 0, atol=2e-5)
  else:
    assert gap_X.min() > -1e-5 and 0.01 < gap_X.mean() < 5


# --- a latent per block ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_blocks():
  """fns of a network with a latent per block, whose parameters are moved off their start."""
  denoiser = networks.Transformer(
    V, width=16, depth=1, heads=2, condition_width=8, attends="blocks", block_size=S
  )
  network = networks.with_latent(denoiser, latents.GaussianFamily(width=2, prior="learned"))
  inputs = jnp.zeros((1, L), int), jnp.ones((1, 1))
  return networks.bind(network, toys.random_params(network, *inputs, scale=0.3))


def test_each_block_has_a_latent_and_pays_its_divergence(latent_blocks):
  objective, fns = VMD(LINEAR, V, "global", block_size=S), latent_blocks
  scored_BxL = [[True, True, True, True], [True, True, False, False]]  # a block without a score
  batch = toys.make_batch(X_XxL[[5, 70]], scored_BxL=scored_BxL)

  @jax.jit
  def run():
    seen = []

    def denoise(*args, **inputs):
      prediction = fns.denoise(*args, **inputs)
      seen.append((args, inputs, prediction.logits()))
      return prediction

    draws = objective.draw(rngs.batch_noise(jax.random.key(0), 2), batch)
    terms = objective.loss(fns._replace(denoise=denoise), batch, draws, step=0)
    clues_BxL = jnp.where(batch.free_BxL, V, batch.x_BxL)
    q = fns.encode(batch.x_BxL, clues_BxL, batch.free_BxL)
    return terms, q.kl(fns.prior(clues_BxL)), seen[0]

  terms, kl_BxG, ((zt_BxL, t_BxG), inputs, whole_BxLxV) = run()
  z_BxGxZ = inputs["latent_BxGxZ"]
  assert kl_BxG.shape == t_BxG.shape == z_BxGxZ.shape[:2] == (2, L // S) and kl_BxG.min() > 1e-3
  assert np.abs(z_BxGxZ[:, 0] - z_BxGxZ[:, 1]).min() > 1e-3
  np.testing.assert_allclose(terms.parts["kl"], [kl_BxG[0].sum(), kl_BxG[1, 0]], rtol=1e-5)
  np.testing.assert_allclose(sum(terms.parts.values()), terms.nelbo_B, rtol=1e-6)
  cache, parts = fns.init_cache(2, L), []
  for b in range(L // S):
    block = slice(b * S, b * S + S)
    latent_Bx1xZ = z_BxGxZ[:, b : b + 1]
    noisy = fns.denoise(
      zt_BxL[:, block], t_BxG[:, b : b + 1], latent_BxGxZ=latent_Bx1xZ, cache=cache
    )
    parts.append(toys.logits(noisy[0]))
    _, cache = fns.denoise(batch.x_BxL[:, block], jnp.zeros((2, 1)), cache=cache)
  np.testing.assert_allclose(np.concatenate(parts, axis=1), whole_BxLxV, atol=1e-5)


def test_latents_of_blocks_are_drawn_anew_for_each_block(latent_blocks):
  seen, shape = [], (8, L)

  def denoise(*args, latent_BxGxZ=None, **inputs):
    if latent_BxGxZ is not None:
      jax.debug.callback(lambda z_BxGxZ: seen.append(np.asarray(z_BxGxZ)), latent_BxGxZ)
    return latent_blocks.denoise(*args, latent_BxGxZ=latent_BxGxZ, **inputs)

  samples = jax.jit(
    lambda: samplers.sample_blocks(
      jax.random.key(0), latent_blocks._replace(denoise=denoise), LINEAR, samplers.Ancestral(),
      samplers.times("uniform", 3), tokens_BxL=jnp.zeros(shape, int),
      free_BxL=jnp.ones(shape, bool), vocab_size=V,
    )
  )()  # fmt: skip
  jax.effects_barrier()
  assert (samples.x_BxL < V).all()
  assert all(z_BxGxZ.shape == (8, 1, 2) for z_BxGxZ in seen)
  assert len(np.unique(np.stack(seen), axis=0)) == L // S  # held within a block


@pytest.mark.parametrize("form", ["jump", "step", "paper"])
def test_blocks_of_other_forms_and_conditional_priors_are_refused(form):
  with pytest.raises(ValueError, match=f"the form '{form}'; blocks are for 'global'"):
    VMD(LINEAR, V, form, block_size=S)
  denoiser = networks.Transformer(V, attends="blocks", block_size=S)
  with pytest.raises(ValueError, match="'conditional' reads the whole sequence"):
    networks.with_latent(denoiser, latents.GaussianFamily(width=2, prior="conditional"))
