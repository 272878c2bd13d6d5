"""VMD's loss: its gradient, its reductions to MD4, what it masks, charges, scores and refuses."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import latents, networks, rngs
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import MD4, VMD
from md4vmd.schedules.linear import Linear
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

L, V = 3, 3
X_L = np.array([2, 0, 1])
FNS = toys.random_latent(L, V, values=4)
BATCH = toys.make_batch(toys.sequences(L, V)[:16])


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


def test_a_denoiser_deaf_to_the_latent_costs_md4_plus_the_divergence(network):
  made, params = network
  deaf = {**params, "denoiser": _zeroed(params["denoiser"], "latent", "up", "kernel")}
  fns = networks.bind(made, deaf)
  vmd = toys.loss_terms(VMD(Linear(), V, "global"), fns, BATCH)
  md4 = toys.loss_terms(MD4(Linear(), V), ModelFns(fns.denoise), BATCH)
  np.testing.assert_allclose(vmd.parts["diffusion"], md4.nelbo_B, rtol=1e-6)
  assert (vmd.parts["kl"] > 1e-3).all()
  np.testing.assert_allclose(vmd.nelbo_B, md4.nelbo_B + vmd.parts["kl"], rtol=1e-6)


@pytest.mark.parametrize("form", ["global", "step", "jump", "paper"])
def test_a_posterior_equal_to_the_prior_costs_no_divergence(network, form):
  made, params = network
  blind = {**params, "recognition": _zeroed(params["recognition"], "raw")}
  terms = toys.loss_terms(VMD(Linear(), V, form), networks.bind(made, blind), BATCH)
  prefix = "surrogate_" if form in ("jump", "paper") else ""
  np.testing.assert_allclose(terms.parts[f"{prefix}kl"], 0.0, atol=1e-6)


def test_without_a_latent_global_is_md4_bit_for_bit(network):
  made, params = network
  fns = networks.bind(made.denoiser, params["denoiser"])
  assert fns.prior is None and fns.encode is None
  for estimator, steps in [("count", None), ("time", None), ("steps", 3)]:
    vmd = toys.loss_terms(VMD(Linear(), V, "global", estimator=estimator, steps=steps), fns, BATCH)
    md4 = toys.loss_terms(MD4(Linear(), V, estimator, steps), fns, BATCH)
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
    terms = toys.loss_terms(VMD(Linear(), V, form, all_masked=1.0), FNS, batch)
    assert terms.nelbo_B[0] == 0 and terms.nelbo_B[1] > 0


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
