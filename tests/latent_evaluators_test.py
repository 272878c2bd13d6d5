"""Exact laws of few-call decoding with a latent, and the figures of a latent's use."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import build, latents, networks, partitioning, samplers
from md4vmd.evaluators import Blocks, Exact, LatentUse
from md4vmd.evaluators.blocks import paths
from md4vmd.evaluators.enumeration import exact_log_prob
from md4vmd.evaluators.latent import enumerated_use, sampled_use
from md4vmd.interfaces import ModelFns
from md4vmd.schedules.linear import Linear
from tests import shrunken, toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

FAMILIES = {
  "none": None,
  "gaussian": latents.GaussianFamily(width=2),
  "mixture": latents.MixtureFamily(width=2, components=3, prior="conditional"),
  "codes": latents.CategoricalFamily(codes=2, classes=2, prior="conditional"),
}


@pytest.fixture(scope="module")
def models():
  """family -> (model over all 81 sequences of four ternary tokens, random parameters)."""
  config = shrunken.config("synthetic", "vmd-d1")
  config.evaluators = {}
  built = build.model(config)
  x_MxL = toys.sequences(4, 3)
  dataset = built.dataset
  dataset.support_MxL, dataset.probabilities_M = x_MxL, np.full(81, 1 / 81)
  dataset.vocab_size = 3
  made = {}
  for name, family in FAMILIES.items():
    network = networks.Transformer(
      3, width=16, depth=1, heads=2, condition_width=8, time_conditioning=False, adaln_zero=False
    )
    if family is not None:
      network = networks.with_latent(network, family)
    params = toys.random_params(network, jnp.zeros((1, 4), int))
    made[name] = dataclasses.replace(built, network=network), params
  return made


def run(evaluator, params):
  with partitioning.use(evaluator.model.mesh):
    return evaluator.run(0, params)


def test_paths_reveal_blocks_from_left_to_right_in_every_order_within():
  assert paths(4, 1, 1) == [((0, 1, 2, 3),)]
  assert paths(4, 2, 2) == [((0, 1), (2, 3))]
  assert len(paths(4, 1, 4)) == 24 and len(paths(4, 2, 4)) == 4 and len(paths(4, 1, 2)) == 6
  for path in paths(6, 3, 6):
    assert [sorted(path[i] + path[i + 1]) for i in (0, 2, 4)] == [[0, 1], [2, 3], [4, 5]]
  for blocks, calls in [(3, 3), (2, 3), (1, 3), (0, 1)]:
    with pytest.raises(ValueError, match="cannot be decoded"):
      paths(4, blocks, calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_law_of_every_cell_sums_to_one(models, family):
  """Over all sequences, whatever the latent draws: what is averaged are conditional laws."""
  model, params = models[family]
  figures = run(Blocks(model, draws=400), params)
  for cell in ("b1_nfe1", "b1_nfe4", "b2_nfe2", "b2_nfe4"):
    assert figures[f"blocks/{cell}_accuracy"] == pytest.approx(1.0, abs=1e-4)
    assert figures[f"blocks/{cell}_accuracy_argmax"] == pytest.approx(1.0, abs=1e-4)
    assert figures[f"blocks/{cell}_kl_nats"] > 1e-3
    is_exact = family in ("none", "codes")
    assert (
      figures[f"blocks/{cell}_kl_nats_standard_error"] == pytest.approx(0, abs=1e-12)
    ) == is_exact


@pytest.mark.parametrize("family", ["none", "codes"])
def test_one_call_is_the_exact_law_of_one_step(models, family):
  model, params = models[family]
  figures = run(Blocks(model, cells=((1, 1),)), params)
  exact = run(Exact(model, steps=(1,)), params)
  assert figures["blocks/b1_nfe1_kl_nats"] == pytest.approx(exact["exact/T1_kl_nats"], rel=1e-4)


def test_one_token_per_call_is_the_mean_over_orders(models):
  model, params = models["codes"]
  fns = networks.bind(model.network, params)
  x_MxL, log_p = model.dataset.support_MxL, []
  mu = jax.jit(lambda zt, z: jax.nn.softmax(fns.denoise(zt, None, latent_BxGxZ=z).logits()))

  @functools.cache
  def log_mu_MxL(hidden):
    """log E_z mu(x_n | z) of every token, given those that are not hidden."""
    zt_MxL = np.array(x_MxL)
    zt_MxL[:, list(hidden)] = 3
    support = fns.prior(jnp.asarray(zt_MxL)).support()
    total = 0.0
    for j, z in enumerate(support.z_JxZ):
      z_Mx1xZ = jnp.tile(z, (81, 1, 1))
      mu_MxLxV = np.asarray(mu(jnp.asarray(zt_MxL), z_Mx1xZ))
      mu_MxL = np.take_along_axis(mu_MxLxV, x_MxL[..., None], axis=-1)
      total += np.exp(support.log_p_BxGxJ[:, 0, j])[:, None] * mu_MxL[..., 0]
    return np.log(total)

  for order in itertools.permutations(range(4)):
    log_p.append(sum(log_mu_MxL(frozenset(order[i:]))[:, n] for i, n in enumerate(order)))
  p_M = np.mean(np.exp(log_p), axis=0)
  kl = -np.log(81) - np.mean(np.log(p_M))
  figures = run(Blocks(model, cells=((1, 4),)), params)
  assert figures["blocks/b1_nfe4_kl_nats"] == pytest.approx(kl, rel=1e-4)


def test_latent_draws_agree_with_one_another_within_their_standard_error(models):
  model, params = models["gaussian"]
  first, second = (
    run(Blocks(dataclasses.replace(model, seed=seed), cells=((1, 1),), draws=4000), params)
    for seed in (0, 1)
  )
  gap = abs(first["blocks/b1_nfe1_kl_nats"] - second["blocks/b1_nfe1_kl_nats"])
  error = first["blocks/b1_nfe1_kl_nats_standard_error"]
  assert 0 < error < 0.05 and gap < 6 * error


def test_a_model_that_holds_its_latent_is_refused(models):
  model, _ = models["gaussian"]
  held = dataclasses.replace(
    model, objective=dataclasses.replace(model.objective, form="global", samples=1)
  )
  with pytest.raises(ValueError, match="draws a latent at every call"):
    Blocks(held)


# --- use of the latent -------------------------------------------------------------------------

L, V, J = 3, 3, 4


def test_a_table_has_the_same_use_by_draws_and_by_sums():
  """A recognition network that is the exact posterior: both ways must agree."""
  fns = toys.random_latent(L, V, values=J)
  batch = toys.make_batch(toys.sequences(L, V))
  settings = {"vocab_size": V, "draws": 2000, "seed": 0}
  exact = enumerated_use(fns, batch, **settings)
  zt_BxL = jnp.full((27, L), V)
  prior = fns.prior(zt_BxL).support()
  z = jnp.tile(jnp.eye(J), (27, 1))[:, None]
  logits = fns.denoise(
    jnp.repeat(zt_BxL, J, axis=0), jnp.ones((27 * J, 1)), latent_BxGxZ=z
  ).logits()
  log_mu = jnp.take_along_axis(
    jax.nn.log_softmax(logits), jnp.repeat(batch.x_BxL, J, axis=0)[..., None], axis=-1
  ).sum((1, 2))
  posterior = latents.Table(prior.log_p_BxGxJ + log_mu.reshape(27, 1, J), 1, J, 1.0)
  drawn = sampled_use(
    ModelFns(fns.denoise, lambda *_, **__: posterior, fns.prior), batch, **settings
  )
  for name in ("kl_nats", "kl_nats_per_token", "posterior_nats", "prior_gap_nats"):
    assert float(drawn[name]) == pytest.approx(float(exact[name]), abs=0.03), name
  # Equal up to the one draw per example that the pairs use, and to the codes' shared order.
  assert float(drawn["mutual_information_nats"]) == pytest.approx(
    float(exact["mutual_information_nats"]), abs=0.3
  )
  assert float(exact["mutual_information_nats"]) <= float(exact["kl_nats"]) + 1e-5


def test_a_latent_that_is_not_used_has_no_information_and_no_gaps():
  base = toys.random_latent(L, V, values=J)
  deaf = lambda zt, t, **inputs: base.denoise(zt, t)
  fns = ModelFns(deaf, lambda x, zt, where, **_: base.prior(zt), base.prior)
  batch = toys.make_batch(toys.sequences(L, V))
  for measure in (sampled_use, enumerated_use):
    figures = measure(fns, batch, vocab_size=V, draws=8, seed=0)
    for name in ("kl_nats", "mutual_information_nats", "prior_gap_nats", "shuffle_gap_nats"):
      assert float(figures[name]) == pytest.approx(0.0, abs=1e-4), name
  figures = sampled_use(fns, batch, vocab_size=V, draws=64, seed=0)
  assert int(figures["active_units"]) == 0


def test_a_collapsed_gaussian_has_no_active_units_however_few_the_draws():
  q = lambda x_BxL, *_, **__: latents.Gaussian(*[jnp.zeros((len(x_BxL), 1, 8))] * 2)
  deaf = lambda zt_BxL, t_BxG, **_: toys.Logits(jnp.zeros((len(zt_BxL), 4, 3)))
  fns = ModelFns(deaf, q, lambda zt_BxL, **_: q(zt_BxL))
  batch = toys.make_batch(toys.sequences(4, 3))
  assert int(sampled_use(fns, batch, vocab_size=3, draws=1, seed=0)["active_units"]) == 0


def test_a_gaussian_that_tells_examples_apart_has_active_units_and_information():
  def encode(x_BxL, zt_BxL, where_BxL, *, label_B=None):
    mean_BxZ = jnp.stack([x_BxL[:, 0] - 1.0, 0.0 * x_BxL[:, 0]], axis=1)
    log_scale_BxZ = jnp.tile(jnp.log(jnp.array([0.01, 1.0])), (len(x_BxL), 1))
    return latents.Gaussian(mean_BxZ[:, None], log_scale_BxZ[:, None])

  def prior(zt_BxL, *, label_B=None):
    zeros = jnp.zeros((len(zt_BxL), 1, 2))
    return latents.Gaussian(zeros, zeros)

  def denoise(zt_BxL, t_BxG, *, latent_BxGxZ, label_B=None):
    first = jax.nn.one_hot(jnp.round(latent_BxGxZ[:, 0, 0]).astype(int) + 1, V)
    return toys.Logits(jnp.stack([20.0 * first] + [0 * first] * (L - 1), axis=1))

  batch = toys.make_batch(toys.sequences(L, V))
  figures = sampled_use(ModelFns(denoise, encode, prior), batch, vocab_size=V, draws=64, seed=0)
  assert int(figures["active_units"]) == 1
  assert float(figures["mutual_information_nats"]) == pytest.approx(np.log(3), abs=0.2)
  assert float(figures["posterior_nats"]) == pytest.approx((L - 1) * np.log(3), abs=0.01)
  assert float(figures["shuffle_gap_nats"]) > 1 and float(figures["prior_gap_nats"]) > 1


def test_latent_use_needs_a_latent(models):
  with pytest.raises(ValueError, match="needs a latent"):
    LatentUse(models["none"][0])


@pytest.mark.parametrize(
  "family",
  [*(FAMILIES[name] for name in ("gaussian", "mixture")),
   latents.CategoricalFamily(codes=2, classes=2, enumerated=False)],
  ids=["gaussian", "mixture", "codes"],
)  # fmt: skip
def test_the_exact_law_of_a_latent_that_is_not_listed_is_refused_at_once(models, family):
  model, _ = models["none"]
  network = networks.with_latent(networks.Transformer(3, width=16, depth=1, heads=2), family)
  with pytest.raises(ValueError, match=r"Family\(.*are not listed; set run"):
    Exact(dataclasses.replace(model, network=network))


def test_the_exact_law_is_that_of_the_latents_that_the_config_asks_for(models):
  model, params = models["codes"]
  fns = networks.bind(model.network, params)
  x_MxL, times = jnp.asarray(model.dataset.support_MxL), samplers.times("cosine", 2)
  prior = fns.prior(jnp.full((1, 4), 3)).support()
  held_M = 0.0
  for z_Z, log_p in zip(prior.z_JxZ, prior.log_p_BxGxJ[0, 0], strict=True):
    given = lambda zt_BxL, t_BxG, z_Z=z_Z: fns.denoise(
      zt_BxL, t_BxG, latent_BxGxZ=jnp.tile(z_Z, (len(zt_BxL), 1, 1))
    )
    held_M += np.exp(log_p + exact_log_prob(ModelFns(given), Linear(), times, x_MxL, 3))
  laws = {"once": held_M, "step": np.exp(exact_log_prob(fns, Linear(), times, x_MxL, 3))}
  words = {"once": "one latent per sequence", "step": "a new latent every step"}
  nats = []
  for refresh, p_M in laws.items():
    sampling = dataclasses.replace(model.sampling, latent_refresh=refresh)
    evaluator = Exact(dataclasses.replace(model, sampling=sampling), steps=(2,), grid="cosine")
    figures = run(evaluator, params)
    assert figures["exact/T2_nats"] == pytest.approx(-np.log(p_M).mean(), rel=1e-5)
    assert figures["convention"].startswith(
      f"ancestral sampler at T steps on the cosine grid, {words[refresh]}, exact"
    )
    nats.append(figures["exact/T2_nats"])
  assert abs(nats[0] - nats[1]) > 1e-3


def test_a_held_latent_law_is_a_mixture_over_its_values(models):
  model, params = models["codes"]
  fns = networks.bind(model.network, params)
  x_MxL = jnp.asarray(model.dataset.support_MxL)
  once = exact_log_prob(
    fns, Linear(), samplers.times("uniform", 1), x_MxL, 3, latent_refresh="once"
  )
  step = exact_log_prob(fns, Linear(), samplers.times("uniform", 1), x_MxL, 3)
  np.testing.assert_allclose(once, step, rtol=1e-4)  # in one step there is one latent
