"""From left to right, by tokens or blocks: what is seen, caches, exact likelihoods and samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from benchmarks import naive
from md4vmd import networks, samplers
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import AR
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V, S = 4, 3, 2  # S: tokens of a block
X_XxL = toys.sequences(L, V)
LINEAR = Linear()
RNG = np.random.default_rng(0)
either = pytest.mark.parametrize("attends", ["left", "blocks"])


def _plain(fns):
  """The same network, whose predictions hold all logits: quicker for many rows."""

  def denoise(*args, **inputs):
    done = fns.denoise(*args, **inputs)
    unfold = lambda prediction: toys.Logits(prediction.logits())
    return (unfold(done[0]), done[1]) if isinstance(done, tuple) else unfold(done)

  return fns._replace(denoise=denoise)


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


def test_a_token_sees_those_to_its_left_alone(make_fns):
  fns = make_fns("left", time_conditioning=False)
  seen_LxL = _sensitivity(lambda zt_BxL: toys.logits(fns.denoise(zt_BxL, None)), [0, 1, 2, 0])
  np.testing.assert_array_equal(seen_LxL, np.tri(L, dtype=bool))


def test_a_noisy_block_sees_itself_and_the_clean_blocks_before_it(make_fns):
  fns = make_fns("blocks", time_conditioning=False)
  predict = lambda zt_BxL, x_BxL: toys.logits(fns.denoise(zt_BxL, None, clean_BxL=x_BxL))
  seen_LxN = _sensitivity(predict, [0, 1, 2, 0], [1, 1, 0, 2])
  n, m = np.indices((L, L))
  np.testing.assert_array_equal(seen_LxN[:, :L], n // S == m // S)
  np.testing.assert_array_equal(seen_LxN[:, L:], m // S < n // S)


# --- caches -----------------------------------------------------------------------------------


@either
def test_logits_behind_a_cache_are_those_of_the_whole_sequence(make_fns, attends):
  # A latent that is not given is 0; it must not tell what else is read in the same call.
  fns = make_fns(attends, absolute_positions=True, latent_width=2 if attends == "blocks" else 0)
  zt_BxL, x_BxL = _read((3, L), V + 1), _read((3, L), V)
  size = S if attends == "blocks" else 1
  t_BxG = jnp.asarray(RNG.random((3, L // S if attends == "blocks" else 1)))
  clean = {"clean_BxL": x_BxL} if attends == "blocks" else {}
  whole_BxLxV = toys.logits(fns.denoise(zt_BxL, t_BxG, **clean))
  cache, parts = fns.init_cache(3, L), []
  for i in range(L // size):
    block = slice(i * size, (i + 1) * size)
    t_Bx1 = t_BxG[:, i : i + 1] if attends == "blocks" else t_BxG
    prediction, extended = fns.denoise(zt_BxL[:, block], t_Bx1, cache=cache)
    parts.append(toys.logits(prediction))
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


def test_the_likelihood_is_normalised_and_the_chain_of_the_cached_predictions(make_fns):
  fns = make_fns("left", time_conditioning=False)
  terms = toys.loss_terms(AR(V), fns, toys.make_batch(X_XxL))
  nll_X = np.asarray(terms.nelbo_B, np.float64)
  assert np.exp(-nll_X).sum() == pytest.approx(1.0, abs=1e-5) and nll_X.std() > 0.1
  assert terms.loss == pytest.approx(nll_X.sum(), rel=1e-5)
  cache, chain_X, read_X = fns.init_cache(len(X_XxL), L), 0.0, np.full(len(X_XxL), V)
  for n in range(L):
    prediction, cache = fns.denoise(read_X[:, None], None, cache=cache)
    log_mu_XxV = scipy.special.log_softmax(toys.logits(prediction)[:, 0], axis=-1)
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
  terms = toys.loss_terms(AR(V), ModelFns(denoise), batch)
  jax.effects_barrier()
  np.testing.assert_array_equal(seen[0], [[V, 0, 1, 2], [V, 2, 2, 0]])
  log_mu_LxV = scipy.special.log_softmax(logits_LxV, axis=-1)
  np.testing.assert_allclose(terms.nelbo_B, [-log_mu_LxV[1, 1] - log_mu_LxV[2, 2], 0], rtol=1e-12)
  np.testing.assert_array_equal(terms.tokens_B, [2, 0])


# --- samples ----------------------------------------------------------------------------------

# Rows with given tokens, whose last position stays unknown, and rows with none.
GIVEN, BATCH = 64, 6000
TOKENS_BxL = np.full((BATCH, L), V)
TOKENS_BxL[:GIVEN] = [2, V, 1, V]
FREE_BxL = np.ones((BATCH, L), bool)
FREE_BxL[:GIVEN] = [False, True, True, False]
INDEX_B = np.random.default_rng(1).permutation(BATCH)


@pytest.fixture(scope="module")
def decode(make_fns):
  """A function (attends, seed, order, tokens_BxL, cached) -> Samples; compiled once per network."""

  @functools.cache
  def compiled(attends, cached):
    fns = make_fns(attends, time_conditioning=False)
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
def test_samples_have_the_exact_law(make_fns, decode, attends):
  fns = make_fns(attends, time_conditioning=False)
  if attends == "left":
    log_p_X = -np.asarray(toys.loss_terms(AR(V), fns, toys.make_batch(X_XxL)).nelbo_B, np.float64)
  else:
    log_p_X = toys.block_laws(fns, X_XxL, V, 3)
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


def test_the_loop_over_whole_sequences_refuses_these_networks(make_fns):
  arrays = {"tokens_BxL": X_XxL, "free_BxL": X_XxL == 0, "vocab_size": V}
  step, times = samplers.Ancestral(), samplers.times("uniform", 2)
  with pytest.raises(ValueError, match="decodes from left to right"):
    samplers.sample(jax.random.key(0), make_fns("left"), LINEAR, step, times, **arrays)
  with pytest.raises(ValueError, match="blocks of 3 tokens do not divide a sequence of 4"):
    fns = make_fns("blocks", block_size=3, length=6)
    samplers.sample_blocks(jax.random.key(0), fns, LINEAR, step, times, **arrays)
