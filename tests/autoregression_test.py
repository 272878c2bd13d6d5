"""From left to right: what is seen, exact likelihoods, blocks, caches and the law of samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from benchmarks import naive
from md4vmd import latents, networks, rngs, samplers
from md4vmd.evaluators.enumeration import subsets
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import AR, MD4, SEDD, VMD
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V, S = 4, 3, 2  # S: tokens of a block
X_XxL = toys.sequences(L, V)
LINEAR = Linear()
RNG = np.random.default_rng(0)
either = pytest.mark.parametrize("attends", ["left", "blocks"])


@pytest.fixture(scope="module")
def make(make_network):
  """A function attends -> fns of a network of two layers; parameters do not depend on `attends`."""

  @functools.cache
  def base(**settings):
    return make_network(vocab_size=V, depth=2, **settings)

  @functools.cache
  def make(attends, block_size=S, length=L, **settings):
    network, params = base(length=length, **settings)
    block = block_size if attends == "blocks" else None
    fns = networks.bind(network.clone(attends=attends, block_size=block), params)
    return fns._replace(denoise=jax.jit(fns.denoise))

  return make


def _plain(fns):
  """The same network, whose predictions hold all logits: quicker for many rows."""

  def denoise(*args, **inputs):
    done = fns.denoise(*args, **inputs)
    unfold = lambda prediction: toys.Logits(prediction.logits())
    return (unfold(done[0]), done[1]) if isinstance(done, tuple) else unfold(done)

  return fns._replace(denoise=denoise)


def _logits(prediction):
  return np.asarray(prediction.logits())


def _read(shape, values):
  return jnp.asarray(RNG.integers(0, values, shape))


# --- what a token sees ------------------------------------------------------------------------


def _sensitivity(predict, *inputs_L):
  """seen_LxN: whether the prediction at a position moves with each of the N input tokens."""
  rows = np.stack([np.concatenate(inputs_L)] * (1 + sum(map(len, inputs_L))))
  rows[np.arange(1, len(rows)), np.arange(len(rows) - 1)] += 1
  logits_BxLxV = predict(*np.split(rows, len(inputs_L), axis=1))
  moved_BxL = np.abs(logits_BxLxV[1:] - logits_BxLxV[:1]).max(-1)
  assert ((moved_BxL < 1e-6) | (moved_BxL > 1e-3)).all()
  return (moved_BxL > 1e-3).T


def test_a_token_sees_those_to_its_left_alone(make):
  fns = make("left", time_conditioning=False)
  seen_LxL = _sensitivity(lambda zt_BxL: _logits(fns.denoise(zt_BxL, None)), [0, 1, 2, 0])
  np.testing.assert_array_equal(seen_LxL, np.tri(L, dtype=bool))


def test_a_noisy_block_sees_itself_and_the_clean_blocks_before_it(make):
  fns = make("blocks", time_conditioning=False)
  predict = lambda zt_BxL, x_BxL: _logits(fns.denoise(zt_BxL, None, clean_BxL=x_BxL))
  seen_LxN = _sensitivity(predict, [0, 1, 2, 0], [1, 1, 0, 2])
  n, m = np.indices((L, L))
  np.testing.assert_array_equal(seen_LxN[:, :L], n // S == m // S)
  np.testing.assert_array_equal(seen_LxN[:, L:], m // S < n // S)


# --- caches -----------------------------------------------------------------------------------


@either
def test_logits_behind_a_cache_are_those_of_the_whole_sequence(make, attends):
  # A latent that is not given is 0; it must not tell what else is read in the same call.
  fns = make(attends, absolute_positions=True, latent_width=2 if attends == "blocks" else 0)
  zt_BxL, x_BxL = _read((3, L), V + 1), _read((3, L), V)
  size = S if attends == "blocks" else 1
  t_BxG = jnp.asarray(RNG.random((3, L // S if attends == "blocks" else 1)))
  clean = {"clean_BxL": x_BxL} if attends == "blocks" else {}
  whole_BxLxV = _logits(fns.denoise(zt_BxL, t_BxG, **clean))
  cache, parts = fns.init_cache(3, L), []
  for i in range(L // size):
    block = slice(i * size, (i + 1) * size)
    t_Bx1 = t_BxG[:, i : i + 1] if attends == "blocks" else t_BxG
    prediction, extended = fns.denoise(zt_BxL[:, block], t_Bx1, cache=cache)
    parts.append(_logits(prediction))
    if attends == "blocks":
      _, extended = fns.denoise(x_BxL[:, block], jnp.zeros((3, 1)), cache=cache)
    cache = extended
  assert whole_BxLxV.std() > 0.3 and cache.length == L
  np.testing.assert_allclose(np.concatenate(parts, axis=1), whole_BxLxV, atol=1e-5)


def test_inputs_that_do_not_fit_the_network_are_refused(make_network):
  zt_BxL, t_BxG = jnp.zeros((1, L), int), jnp.ones((1, 1))
  bind = lambda **settings: networks.bind(*make_network(length=L, **settings)).denoise
  blocks = bind(attends="blocks", block_size=3)
  for call, message in [
    (lambda: blocks(zt_BxL, t_BxG), "needs clean_BxL or a cache"),
    (lambda: blocks(zt_BxL, t_BxG, clean_BxL=zt_BxL), "blocks of 3 do not divide 4 tokens"),
    (lambda: bind()(zt_BxL, t_BxG, clean_BxL=zt_BxL), "attends to 'all' has no use for clean_BxL"),
    (lambda: bind(attends="left")(zt_BxL, t_BxG, clean_BxL=zt_BxL), "no use for clean_BxL"),
    (lambda: bind(attends="right"), "attends 'right' must be one of all, left, blocks"),
    (lambda: bind(attends="blocks"), "block_size None must be at least 1"),
    (lambda: bind(block_size=2), "None where it attends to 'all'"),
    (lambda: bind(attends="left", latent_width=2, latent_tokens=1), "latent_tokens 1 must be 0"),
    (lambda: bind(attends="left", latent_width=2), "latent_width 2 must be 0"),
    (
      lambda: bind(attends="blocks", block_size=2, attention="cudnn", dtype="bfloat16"),
      "set attention 'xla'",
    ),
  ]:
    with pytest.raises(ValueError, match=message):
      call()


# --- the likelihood from left to right --------------------------------------------------------


def _nelbo(objective, fns, batch, noise=None):
  def loss():
    return objective.loss(fns, batch, objective.draw(noise, batch), step=jnp.zeros((), int))

  return jax.jit(loss)()


def test_the_likelihood_is_normalised_and_the_chain_of_the_cached_predictions(make):
  fns = make("left", time_conditioning=False)
  terms = _nelbo(AR(V), fns, toys.make_batch(X_XxL))
  nll_X = np.asarray(terms.nelbo_B, np.float64)
  assert np.exp(-nll_X).sum() == pytest.approx(1.0, abs=1e-5) and nll_X.std() > 0.1
  assert terms.loss == pytest.approx(nll_X.sum(), rel=1e-5)
  cache, chain_X, read_X = fns.init_cache(len(X_XxL), L), 0.0, np.full(len(X_XxL), V)
  for n in range(L):
    prediction, cache = fns.denoise(read_X[:, None], None, cache=cache)
    log_mu_XxV = scipy.special.log_softmax(_logits(prediction)[:, 0], axis=-1)
    read_X = X_XxL[:, n]
    chain_X += log_mu_XxV[np.arange(len(X_XxL)), read_X]
  np.testing.assert_allclose(-chain_X, nll_X, atol=1e-5)


def test_clues_and_padding_are_read_and_not_scored(x64):
  seen, logits_LxV = [], RNG.normal(size=(L, V))

  def denoise(zt_BxL, t_BxG, **rest):
    assert t_BxG is None
    jax.debug.callback(lambda zt_BxL: seen.append(np.asarray(zt_BxL)), zt_BxL)
    return toys.constant(logits_LxV).denoise(zt_BxL, t_BxG, **rest)

  batch = toys.make_batch(
    [[0, 1, 2, 1], [2, 2, 0, 0]], given_BxL=[[True, False, False, False]] * 2,
    scored_BxL=[[True, True, True, False]] * 2, weight_B=[1.0, 0.0],
  )  # fmt: skip
  terms = _nelbo(AR(V), ModelFns(denoise), batch)
  jax.effects_barrier()
  np.testing.assert_array_equal(seen[0], [[V, 0, 1, 2], [V, 2, 2, 0]])
  log_mu_LxV = scipy.special.log_softmax(logits_LxV, axis=-1)
  np.testing.assert_allclose(terms.nelbo_B, [-log_mu_LxV[1, 1] - log_mu_LxV[2, 2], 0], rtol=1e-12)
  np.testing.assert_array_equal(terms.tokens_B, [2, 0])


# --- the bound in blocks ----------------------------------------------------------------------


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
  terms = _nelbo(objective, fns, batch, toys.Script(u_BxG, uniform_BxL, 0 * u_BxG + 0.5))
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


def test_one_block_draws_and_bounds_what_md4_does(make):
  batch = toys.make_batch(X_XxL[:8], given_BxL=RNG.random((8, L)) < 0.3)
  noise = toys.Script(*(jnp.asarray(RNG.random(shape)) for shape in [(8, 1), (8, L), (8, 1)]))
  whole, one = make("all"), make("blocks", block_size=L)
  whole = _nelbo(MD4(LINEAR, V), whole, batch, noise)
  block = _nelbo(MD4(LINEAR, V, block_size=L), one, batch, noise)
  assert np.asarray(whole.nelbo_B).std() > 0.3
  np.testing.assert_allclose(block.nelbo_B, whole.nelbo_B, rtol=1e-5)


def test_blocks_of_one_token_are_an_exact_chain(make):
  fns = make("blocks", block_size=1, time_conditioning=False)
  objective, batch = MD4(LINEAR, V, block_size=1), toys.make_batch(X_XxL)
  draw = lambda: toys.Script(*(jnp.asarray(RNG.random((len(X_XxL), L))) for _ in range(3)))
  nll_X, again_X = (_nelbo(objective, fns, batch, draw()).nelbo_B for _ in range(2))
  np.testing.assert_array_equal(nll_X, again_X)  # whatever the draws, every token is masked
  nll_X = np.asarray(nll_X, np.float64)
  assert np.exp(-nll_X).sum() == pytest.approx(1.0, abs=1e-5) and nll_X.std() > 0.1
  cache, chain_X = fns.init_cache(len(X_XxL), L), 0.0
  for n in range(L):
    prediction, _ = fns.denoise(np.full((len(X_XxL), 1), V), None, cache=cache)
    log_mu_XxV = scipy.special.log_softmax(_logits(prediction)[:, 0], axis=-1)
    chain_X += log_mu_XxV[np.arange(len(X_XxL)), X_XxL[:, n]]
    _, cache = fns.denoise(X_XxL[:, n : n + 1], None, cache=cache)
  np.testing.assert_allclose(-chain_X, nll_X, atol=1e-5)


@pytest.mark.parametrize("estimator", ["count", "time"])
def test_score_entropy_in_blocks_is_the_bound_in_blocks_and_the_price_of_the_normaliser(
  make, estimator
):
  fns, batch = make("blocks"), toys.make_batch(X_XxL[:8], scored_BxL=RNG.random((8, L)) < 0.8)
  noise = toys.Script(*(jnp.asarray(RNG.random(shape)) for shape in [(8, 2), (8, L), (8, 2)]))
  md4, sedd = (
    _nelbo(kind(LINEAR, V, estimator, block_size=S), fns, batch, noise) for kind in (MD4, SEDD)
  )
  assert np.asarray(md4.nelbo_B).std() > 0.3
  np.testing.assert_allclose(sedd.parts["normalised"], md4.nelbo_B, rtol=1e-5)
  np.testing.assert_allclose(sum(sedd.parts.values()), sedd.nelbo_B, rtol=1e-6)
  assert sedd.parts["normaliser"].min() >= 0 and sedd.parts["normaliser"].max() > 0.01
  assert sedd.loss == pytest.approx(float(sedd.nelbo_B.sum()), rel=1e-5)


def _block_laws(fns, steps):
  """log p_X of decoding each block of two tokens in `steps` equal steps, if mu ignores the time.

  Both tokens come in the same step with probability 1 / steps, else one after the other.
  """
  first, second = np.tile([True, False], L // S), np.tile([False, True], L // S)
  zt_PxXxL = np.stack([np.full_like(X_XxL, V), *(np.where(m, V, X_XxL) for m in (first, second))])
  rows = lambda array: jnp.asarray(array.reshape(-1, L))
  clean_RxL = rows(np.stack([X_XxL] * 3))
  logits_RxLxV = _logits(fns.denoise(rows(zt_PxXxL), None, clean_BxL=clean_RxL)).astype(float)
  log_mu_RxLxV = scipy.special.log_softmax(logits_RxLxV, axis=-1)
  log_mu_RxL = np.take_along_axis(log_mu_RxLxV, np.asarray(clean_RxL)[..., None], -1)[..., 0]
  blank, now_first, now_second = np.exp(log_mu_RxL.reshape(3, len(X_XxL), L // S, S))
  p_XxG = blank.prod(-1) / steps
  p_XxG += (1 - 1 / steps) / 2 * (blank[..., 0] * now_second[..., 1])
  p_XxG += (1 - 1 / steps) / 2 * (blank[..., 1] * now_first[..., 0])
  return np.log(p_XxG).sum(-1)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_bound_is_above_the_exact_law_and_equal_to_it_for_one_step(make, steps):
  fns = make("blocks", time_conditioning=False)
  log_p_X = _block_laws(fns, steps)
  assert np.exp(log_p_X).sum() == pytest.approx(1.0, abs=1e-5)
  gap_X = _expected(MD4(LINEAR, V, "steps", steps, block_size=S), fns, X_XxL) + log_p_X
  if steps == 1:
    np.testing.assert_allclose(gap_X, 0, atol=2e-5)
  else:
    assert gap_X.min() > -1e-5 and 0.01 < gap_X.mean() < 5


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
    parts.append(_logits(noisy[0]))
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


# --- samples ----------------------------------------------------------------------------------

# Rows with given tokens, whose last position stays unknown, and rows with none.
GIVEN, BATCH = 64, 6000
TOKENS_BxL = np.full((BATCH, L), V)
TOKENS_BxL[:GIVEN] = [2, V, 1, V]
FREE_BxL = np.ones((BATCH, L), bool)
FREE_BxL[:GIVEN] = [False, True, True, False]
INDEX_B = np.random.default_rng(1).permutation(BATCH)


@pytest.fixture(scope="module")
def decode(make):
  """A function (attends, seed, order, tokens_BxL, cached) -> Samples; compiled once per network."""

  @functools.cache
  def compiled(attends, cached):
    fns = make(attends, time_conditioning=False)
    fns = _plain(fns if cached else naive.without_cache(fns))
    step, times = samplers.Ancestral(), samplers.times("uniform", 3)

    @jax.jit
    def run(key, tokens_BxL, index_B):
      given = {"tokens_BxL": tokens_BxL, "free_BxL": jnp.asarray(FREE_BxL)}
      given |= {"vocab_size": V, "index_B": index_B}
      if attends == "left":
        return samplers.sample_tokens(key, fns, LINEAR, step, **given)
      return samplers.sample_blocks(key, fns, LINEAR, step, times, **given)

    return run

  def decode(attends, seed=0, index_B=INDEX_B, tokens_BxL=TOKENS_BxL, cached=True):
    run = compiled(attends, cached)
    return jax.tree.map(np.asarray, run(jax.random.key(seed), tokens_BxL, index_B))

  return decode


@either
def test_samples_have_the_exact_law(make, decode, attends):
  fns = make(attends, time_conditioning=False)
  if attends == "left":
    log_p_X = -np.asarray(_nelbo(AR(V), fns, toys.make_batch(X_XxL)).nelbo_B, np.float64)
  else:
    log_p_X = _block_laws(fns, 3)
  x_BxL = decode(attends).x_BxL[GIVEN:]
  observed_X = np.bincount(x_BxL @ V ** np.arange(L)[::-1], minlength=V**L)
  expected_X = len(x_BxL) * np.exp(log_p_X) / np.exp(log_p_X).sum()
  is_rare_X = expected_X < 5
  gather = lambda count_X: np.append(count_X[~is_rare_X], count_X[is_rare_X].sum() + 1e-9)
  assert (~is_rare_X).sum() > 20
  assert scipy.stats.chisquare(gather(observed_X), gather(expected_X)).pvalue > 1e-3


@either
def test_given_tokens_stay_and_free_ones_are_filled_by_numbered_calls(decode, attends):
  samples = decode(attends)
  np.testing.assert_array_equal(samples.x_BxL[~FREE_BxL], TOKENS_BxL[~FREE_BxL])
  assert (samples.x_BxL[FREE_BxL] < V).all() and len(np.unique(samples.x_BxL[:GIVEN], axis=0)) > 4
  # One call per position up to the last free one; one per block and step that fills something.
  calls_L = [-1, 1, 2, -1] if attends == "left" else [-1, 0, 1, -1]
  np.testing.assert_array_equal(samples.call_BxL[:GIVEN], np.tile(calls_L, (GIVEN, 1)))
  np.testing.assert_array_equal(samples.calls_B, samples.call_BxL.max(-1) + 1)
  most = L if attends == "left" else 2 * L // S
  assert samples.calls_B.max() == most
  other_BxL = np.where(FREE_BxL, 1, TOKENS_BxL)  # what stands at free positions does not matter
  again = decode(attends, tokens_BxL=other_BxL)
  np.testing.assert_array_equal(again.x_BxL, samples.x_BxL)


@either
def test_a_sample_depends_on_its_key_and_index_and_not_on_its_place(decode, attends):
  order_B = np.concatenate([np.arange(GIVEN)[::-1], np.arange(GIVEN, BATCH)[::-1]])
  first, second = decode(attends), decode(attends, index_B=INDEX_B[order_B])
  np.testing.assert_array_equal(first.x_BxL, second.x_BxL[order_B])
  assert (decode(attends, seed=1).x_BxL != first.x_BxL).any()


@either
def test_samples_without_a_cache_are_the_same(decode, attends):
  samples, plain = decode(attends), decode(attends, cached=False)
  np.testing.assert_array_equal(samples.call_BxL, plain.call_BxL)
  # A draw at the edge of a token's interval may fall to either side.
  assert (samples.x_BxL != plain.x_BxL).any(-1).sum() <= 1


def test_the_loop_over_whole_sequences_refuses_these_networks(make):
  arrays = {"tokens_BxL": X_XxL, "free_BxL": X_XxL == 0, "vocab_size": V}
  step, times = samplers.Ancestral(), samplers.times("uniform", 2)
  with pytest.raises(ValueError, match="decodes from left to right"):
    samplers.sample(jax.random.key(0), make("left"), LINEAR, step, times, **arrays)
  with pytest.raises(ValueError, match="blocks of 3 tokens do not divide a sequence of 4"):
    fns = make("blocks", block_size=3, length=6)
    samplers.sample_blocks(jax.random.key(0), fns, LINEAR, step, times, **arrays)
