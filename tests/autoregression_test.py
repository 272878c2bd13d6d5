"""From left to right: what is seen, exact likelihoods, blocks, caches and the law of samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from benchmarks import naive
from md4vmd import networks, samplers
from md4vmd.evaluators.enumeration import exact_log_prob, subsets
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import AR, MD4
from md4vmd.samplers import TABLE as SAMPLERS
from md4vmd.schedules.linear import Linear
from tests import shrunken, toys

L, V, S = 4, 3, 2  # S: tokens of a block
X_XxL = toys.sequences(L, V)
LINEAR = Linear()
RNG = np.random.default_rng(0)
either = pytest.mark.parametrize("attends", ["left", "blocks"])


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
  yield from shrunken.quick_compilation(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def make(make_network):
  """A function attends -> fns of a network of two layers; parameters do not depend on `attends`."""

  @functools.cache
  def make(attends, length=L, block_size=S, **settings):
    _, params = make_network(length=length, vocab_size=V, depth=2, **settings)
    network, _ = make_network(
      length=length, vocab_size=V, depth=2, attends=attends,
      block_size=block_size if attends == "blocks" else None, **settings,
    )  # fmt: skip
    fns = networks.bind(network, params)
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
  fns = make("blocks", 6, time_conditioning=False)
  predict = lambda zt_BxL, x_BxL: _logits(fns.denoise(zt_BxL, None, clean_BxL=x_BxL))
  seen_LxN = _sensitivity(predict, [0, 1, 2, 0, 1, 1], [1, 1, 0, 2, 0, 1])
  n, m = np.indices((6, 6))
  np.testing.assert_array_equal(seen_LxN[:, :6], n // S == m // S)
  np.testing.assert_array_equal(seen_LxN[:, 6:], m // S < n // S)


def test_one_block_is_the_network_that_sees_all(make):
  settings = {"absolute_positions": True, "latent_width": 2}
  zt_BxL, x_BxL = _read((5, L), V + 1), _read((5, L), V)
  t_BxG, latent_BxGxZ = jnp.asarray(RNG.random((5, 1))), jnp.asarray(RNG.random((5, 1, 2)))
  inputs = {"latent_BxGxZ": latent_BxGxZ}
  whole = make("all", **settings).denoise(zt_BxL, t_BxG, **inputs)
  block = make("blocks", block_size=L, **settings)
  one = block.denoise(zt_BxL, t_BxG, clean_BxL=x_BxL, **inputs)
  assert _logits(whole).std() > 0.3
  np.testing.assert_allclose(_logits(one), _logits(whole), atol=1e-5)


# --- caches -----------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("absolute", [False, True], ids=["rotary", "absolute"])
def test_logits_behind_a_cache_are_those_of_the_whole_sequence(make, attends, absolute):
  fns = make(attends, absolute_positions=absolute)
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
    seen.append(np.asarray(zt_BxL))
    return toys.constant(logits_LxV).denoise(zt_BxL, t_BxG, **rest)

  batch = toys.make_batch(
    [[0, 1, 2, 1], [2, 2, 0, 0]], given_BxL=[[True, False, False, False]] * 2,
    scored_BxL=[[True, True, True, False]] * 2, weight_B=[1.0, 0.0],
  )  # fmt: skip
  terms = _nelbo(AR(V), ModelFns(denoise), batch)
  np.testing.assert_array_equal(seen[0], [[V, 0, 1, 2], [V, 2, 2, 0]])
  log_mu_LxV = scipy.special.log_softmax(logits_LxV, axis=-1)
  np.testing.assert_allclose(terms.nelbo_B, [-log_mu_LxV[1, 1] - log_mu_LxV[2, 2], 0], rtol=1e-12)
  np.testing.assert_array_equal(terms.tokens_B, [2, 0])


# --- the bound in blocks ----------------------------------------------------------------------


def _expected(objective, fns, x_L, t_K=None):
  """E nelbo over counts, times and masks, the same ones in every block: each block has its own
  term, so the mean over draws that blocks share is the mean over independent ones."""
  size = objective.block_size
  is_masked_SxS = subsets(size)
  if objective.estimator == "count":
    is_masked_SxS = is_masked_SxS[1:]
    k_R = is_masked_SxS.sum(-1)
    chance_R, u_R = 1 / (size * scipy.special.comb(size, k_R)), (k_R - 0.5) / size
  else:
    steps, sets = objective.steps, len(is_masked_SxS)
    t_R = np.repeat((np.arange(steps) + 1) / steps, sets)
    is_masked_SxS = np.tile(is_masked_SxS, (steps, 1))
    k_R = is_masked_SxS.sum(-1)
    chance_R, u_R = t_R**k_R * (1 - t_R) ** (size - k_R) / steps, t_R - 0.5 / steps
  np.testing.assert_allclose(chance_R.sum(), 1.0, rtol=1e-12)
  groups = L // size
  uniform_RxL = np.tile(np.where(is_masked_SxS, 0.0, 1.0), groups)
  share_R = np.tile(u_R[:, None], groups)
  noise = toys.Script(
    jnp.asarray(share_R), jnp.asarray(uniform_RxL), jnp.asarray(0 * share_R + 0.5)
  )
  batch = toys.make_batch(np.tile(x_L, (len(k_R), 1)))
  draws = jax.jit(lambda: objective.draw(noise, batch))()
  chosen = chance_R > 0  # of impossible masks only the weights are looked at
  np.testing.assert_array_equal(objective.is_masked(batch, draws)[chosen], uniform_RxL[chosen] == 0)
  terms = _nelbo(objective, fns, batch, noise)
  return float(chance_R[chosen] @ np.asarray(terms.nelbo_B)[chosen])


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
  bound_M = [_expected(objective, fns, x_L) for x_L in SUPPORT_MxL]
  entropy = scipy.stats.entropy(PROBABILITIES_M)
  assert PROBABILITIES_M @ bound_M == pytest.approx(entropy, rel=1e-9)


def test_one_block_draws_and_bounds_what_md4_does(make):
  batch = toys.make_batch(X_XxL[:8], given_BxL=RNG.random((8, L)) < 0.3)
  noise = toys.Script(*(jnp.asarray(RNG.random(shape)) for shape in [(8, 1), (8, L), (8, 1)]))
  whole = _nelbo(MD4(LINEAR, V), make("all"), batch, noise=noise)
  block = _nelbo(MD4(LINEAR, V, block_size=L), make("blocks", block_size=L), batch, noise=noise)
  np.testing.assert_allclose(block.nelbo_B, whole.nelbo_B, rtol=1e-5)


def test_blocks_of_one_token_are_an_exact_chain(make):
  fns = make("blocks", block_size=1, time_conditioning=False)
  noise = toys.Script(*(jnp.asarray(RNG.random((len(X_XxL), L))) for _ in range(3)))
  terms = _nelbo(MD4(LINEAR, V, block_size=1), fns, toys.make_batch(X_XxL), noise=noise)
  nll_X = np.asarray(terms.nelbo_B, np.float64)
  assert np.exp(-nll_X).sum() == pytest.approx(1.0, abs=1e-5) and nll_X.std() > 0.1


def _behind(fns, prefix_K):
  """The denoiser of the next block, behind a prefix of whole blocks."""

  def denoise(zt_BxS, t_BxG, **rest):
    batch = len(zt_BxS)
    cache = fns.init_cache(batch, L)
    for start in range(0, len(prefix_K), S):
      block_BxS = jnp.broadcast_to(prefix_K[start : start + S][None], (batch, S))
      _, cache = fns.denoise(block_BxS, jnp.zeros((batch, 1)), cache=cache)
    return fns.denoise(zt_BxS, t_BxG, cache=cache, **rest)[0]

  return ModelFns(denoise)


@functools.cache
def _block_laws(fns, steps):
  """log p_T of every block, [V^S], and of every block behind each first one, [V^S, V^S]."""
  x_NxS, times = jnp.asarray(toys.sequences(S, V)), samplers.times("uniform", steps)
  law = lambda prefix_K: exact_log_prob(_behind(fns, prefix_K), LINEAR, times, x_NxS, V)
  first_N = jax.jit(law)(jnp.zeros(0, int))
  second_NxN = jax.jit(lambda: jax.lax.map(law, x_NxS))()
  return np.asarray(first_N, np.float64), np.asarray(second_NxN, np.float64)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_bound_is_above_the_exact_law_and_equal_to_it_for_one_step(make, steps):
  fns = make("blocks")
  first_N, second_NxN = _block_laws(fns, steps)
  np.testing.assert_allclose(np.exp(first_N).sum(), 1.0, atol=1e-5)
  np.testing.assert_allclose(np.exp(second_NxN).sum(1), 1.0, atol=1e-5)
  gaps = []
  for x in (5, 40, 77):
    log_p = first_N[x // V**S] + second_NxN[x // V**S, x % V**S]
    objective = MD4(LINEAR, V, "steps", steps, block_size=S)
    gaps.append(_expected(objective, fns, X_XxL[x]) + log_p)
  if steps == 1:
    np.testing.assert_allclose(gaps, 0, atol=2e-5)
  else:
    assert min(gaps) > 1e-3 and max(gaps) < 5


# --- samples ----------------------------------------------------------------------------------


@functools.cache
def _decoder(fns, name, steps=2):
  step, times = SAMPLERS[name](temperature=1.0), samplers.times("uniform", steps)

  @jax.jit
  def run(key, tokens_BxL, free_BxL, index_B):
    given = {"tokens_BxL": tokens_BxL, "free_BxL": free_BxL, "vocab_size": V, "index_B": index_B}
    if fns.block_size is None:
      return samplers.sample_tokens(key, fns, LINEAR, step, **given)
    return samplers.sample_blocks(key, fns, LINEAR, step, times, **given)

  return run


def _decode(fns, tokens_BxL, free_BxL, index_B=None, seed=0, name="ancestral", steps=2):
  index_B = np.arange(len(tokens_BxL)) if index_B is None else index_B
  run = _decoder(fns, name, steps)
  done = run(jax.random.key(seed), *map(jnp.asarray, (tokens_BxL, free_BxL, index_B)))
  return jax.tree.map(np.asarray, done)


@either
def test_samples_have_the_exact_law(make, attends):
  fns = make(attends, time_conditioning=attends == "blocks")
  if attends == "left":
    log_p_X = -np.asarray(_nelbo(AR(V), fns, toys.make_batch(X_XxL)).nelbo_B, np.float64)
  else:
    first_N, second_NxN = _block_laws(fns, 3)
    log_p_X = (first_N[:, None] + second_NxN).ravel()
  draws = 20_000
  shape = (draws, L)
  samples = _decode(_plain(fns), np.zeros(shape, int), np.ones(shape, bool), steps=3)
  observed_X = np.bincount(samples.x_BxL @ V ** np.arange(L)[::-1], minlength=V**L)
  expected_X = draws * np.exp(log_p_X) / np.exp(log_p_X).sum()
  is_rare_X = expected_X < 5
  gather = lambda count_X: np.append(count_X[~is_rare_X], count_X[is_rare_X].sum() + 1e-9)
  assert (~is_rare_X).sum() > 20
  assert scipy.stats.chisquare(gather(observed_X), gather(expected_X)).pvalue > 1e-3


N = 6
TOKENS_BxN = np.tile([2, V, 0, V, 1, V], (16, 1))
FREE_BxN = np.tile([False, True, False, True, False, False], (16, 1))  # the last stays unknown


@either
def test_given_tokens_stay_and_free_ones_are_filled_by_numbered_calls(make, attends):
  fns = make(attends, N, time_conditioning=False)
  samples = _decode(fns, TOKENS_BxN, FREE_BxN)
  np.testing.assert_array_equal(samples.x_BxL[~FREE_BxN], TOKENS_BxN[~FREE_BxN])
  assert (samples.x_BxL[FREE_BxN] < V).all() and len(np.unique(samples.x_BxL, axis=0)) > 4
  # One call per position up to the last free one; one per block with a free position.
  calls_N = [-1, 1, -1, 3, -1, -1] if attends == "left" else [-1, 0, -1, 1, -1, -1]
  np.testing.assert_array_equal(samples.call_BxL, np.tile(calls_N, (16, 1)))
  assert (samples.calls_B == max(calls_N) + 1).all()
  other_BxN = np.where(FREE_BxN, 1, TOKENS_BxN)  # what stands at free positions does not matter
  np.testing.assert_array_equal(_decode(fns, other_BxN, FREE_BxN).x_BxL, samples.x_BxL)


@either
def test_a_sample_depends_on_its_key_and_index_and_not_on_its_place(make, attends):
  fns = make(attends, N, time_conditioning=False)
  order_B = np.random.default_rng(1).permutation(16) + 3
  first, second = (_decode(fns, TOKENS_BxN, FREE_BxN, order_B[::way]) for way in (1, -1))
  np.testing.assert_array_equal(first.x_BxL, second.x_BxL[::-1])
  assert (_decode(fns, TOKENS_BxN, FREE_BxN, order_B, seed=1).x_BxL != first.x_BxL).any()


@either
def test_samples_without_a_cache_are_the_same(make, attends):
  fns = make(attends, N, time_conditioning=False)
  tokens_BxN, free_BxN = np.full((16, N), V), np.ones((16, N), bool)
  samples = _decode(fns, tokens_BxN, free_BxN)
  plain = _decode(naive.without_cache(fns), tokens_BxN, free_BxN)
  np.testing.assert_array_equal(samples.x_BxL, plain.x_BxL)
  assert len(np.unique(samples.x_BxL, axis=0)) > 8


def test_the_loop_over_whole_sequences_refuses_these_networks(make):
  arrays = {"tokens_BxL": X_XxL, "free_BxL": X_XxL == 0, "vocab_size": V}
  step, times = samplers.Ancestral(), samplers.times("uniform", 2)
  with pytest.raises(ValueError, match="decodes from left to right"):
    samplers.sample(jax.random.key(0), make("left"), LINEAR, step, times, **arrays)
  with pytest.raises(ValueError, match="blocks of 3 tokens do not divide a sequence of 4"):
    fns = make("blocks", block_size=3, length=6)
    samplers.sample_blocks(jax.random.key(0), fns, LINEAR, step, times, **arrays)
