"""Values of the public MD4 implementation; `golden/README.md` says how they were made."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from md4vmd import networks, row_losses
from md4vmd.interfaces import ModelFns
from md4vmd.objectives import MD4
from md4vmd.objectives.genmd4 import log_probability
from md4vmd.schedules import TABLE
from tests import toys

_FOLDER = pathlib.Path(__file__).parent / "golden"
SCHEDULES = {"linear": TABLE["linear"](), "cosine": TABLE["cosine"](), "poly2": TABLE["poly"](2.0)}
LOSSES = [np.load(_FOLDER / f"md4_losses_{i}.npz") for i in (0, 1)]
TRANSFORMERS = [
  (np.load(_FOLDER / f"md4_transformer_{i}.npz"), settings)
  for i, settings in enumerate(
    [
      {"mlp": "glu", "embedding_width": None},
      {"mlp": "swiglu", "embedding_width": 8},
    ]
  )
]
IMAGES = [
  (np.load(_FOLDER / "md4_unet_cifar.npz"), networks.UNet, {"heads": 1}),
  (
    np.load(_FOLDER / "md4_uvit_imagenet.npz"),
    networks.UViT,
    {"heads": 2, "middle_width": 32, "middle_depth": 2},
  ),
]
IMAGE_SHAPE = {"vocab_size": 16, "width": 32, "depth": 2, "condition_width": 32}
SHAPE = {"vocab_size": 11, "width": 32, "depth": 2, "heads": 4, "condition_width": 8}
MASK, EPS = 27, 1e-4
both_losses = pytest.mark.parametrize("golden", LOSSES, ids=["0", "1"])
both_transformers = pytest.mark.parametrize(("golden", "settings"), TRANSFORMERS, ids=["0", "1"])
both_images = pytest.mark.parametrize(
  ("golden", "network", "settings"), IMAGES, ids=["unet", "uvit"]
)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


class ReferenceCosine(TABLE["cosine"]):
  """Our cosine in the reference's arithmetic, which loses other digits of float32 than ours."""

  def alpha(self, t):
    return 1.0 - jnp.cos(jnp.pi / 2 * (1.0 - t))


@dataclasses.dataclass(frozen=True)
class Rescaled:
  """The reference's alpha, which stays eps away from 1 and 0."""

  exact: Any

  def alpha(self, t):
    return (1 - 2 * EPS) * self.exact.alpha(t) + EPS

  def masked(self, t):
    return 1 - self.alpha(t)

  def dalpha(self, t):
    return (1 - 2 * EPS) * self.exact.dalpha(t)

  def weight(self, t):
    return -self.dalpha(t) / (1 - self.alpha(t))


def _terms(golden, name, u_B, **settings):
  """LossTerms of our objective at the golden masks, logits and places u of the time grid.

  In float32 like the reference, whose alpha has lost digits near t=0 that float64 would keep.
  """
  schedule = SCHEDULES[name]
  if settings.get("steps") == 1000 and name == "cosine":
    schedule = ReferenceCosine()
  objective = MD4(Rescaled(schedule), MASK, **settings)
  batch = toys.make_batch(golden["x"])
  uniform_BxL = jnp.where(golden["zt"] == MASK, 0.0, 1.0)  # masked at every rate and at none
  draws = objective.draw(toys.Script(u_B[:, None], uniform_BxL), batch)
  if objective.estimator == "time":
    t_BxG = jnp.asarray(golden["t"])[:, None]
    np.testing.assert_allclose(draws.t_BxG, t_BxG, atol=2.0**-24)  # 1 - (1 - t) rounds t
    draws = dataclasses.replace(draws, t_BxG=t_BxG, weight_BxG=objective.schedule.weight(t_BxG))
  np.testing.assert_array_equal(objective.is_masked(batch, draws), golden["zt"] == MASK)
  fns = ModelFns(lambda zt_BxL, t_BxG, **_: toys.Logits(jnp.asarray(golden["logits"])))
  return jax.jit(functools.partial(objective.loss, fns, step=0))(batch, draws)


@both_losses
@every_schedule
def test_continuous_time_losses_are_the_reference(golden, name):
  terms = _terms(golden, name, 1.0 - jnp.asarray(golden["t"]), estimator="time")
  np.testing.assert_allclose(terms.parts["diffusion"], golden[f"{name}/continuous_nats"], rtol=1e-5)


@both_losses
@every_schedule
@pytest.mark.parametrize(("steps", "rtol"), [(4, 1e-5), (32, 1e-5), (1000, 2e-4)])
def test_discrete_time_losses_are_the_reference(golden, name, steps, rtol):
  terms = _terms(golden, name, jnp.asarray(golden["t"]), estimator="steps", steps=steps)
  np.testing.assert_allclose(
    terms.parts["diffusion"], golden[f"{name}/discrete_T{steps}_nats"], rtol=rtol
  )


@both_losses
@every_schedule
def test_the_reconstruction_term_is_the_reference(golden, name, x64):
  terms = _terms(golden, name, 1.0 - jnp.asarray(golden["t"], float), estimator="time")
  length = golden["x"].shape[1]
  rtol = {"cosine": 5e-4}.get(name, 1e-5)  # the reference's float32 cosine
  reconstruction_B = np.full(len(golden["x"]), golden[f"{name}/recon_nats"])
  np.testing.assert_allclose(terms.parts["reconstruction"], reconstruction_B, rtol=rtol)
  prior_B = np.full(len(golden["x"]), length * EPS * np.log(MASK))  # the reference drops it
  np.testing.assert_allclose(terms.parts["prior"], prior_B, rtol=1e-9)


@both_losses
def test_genmd4_is_the_reference_with_its_gradient_in_the_powers(golden):
  """Its two draws at t, and d/dw of 0.5 (f1 + f2) + 0.5 (f1 - f2) (log q1 - log q2), f constant."""
  x_BxL, t_Bx1 = jnp.asarray(golden["x"]), jnp.asarray(golden["t"])[:, None]
  raw_V = jnp.asarray(golden["w"])
  scale = math.log1p(-EPS)  # the reference's 1 - alpha = (1 - eps) t^w

  def draw(raw_V, number):
    power_V = jax.nn.softplus(raw_V)
    is_masked_BxL = jnp.asarray(golden[f"zt{number}"] == MASK)
    prediction = toys.Logits(jnp.asarray(golden[f"logits{number}"]))
    weight_BxL = jnp.where(is_masked_BxL, 1.0 / t_Bx1, 0.0)
    total, nats_BxL, _ = prediction.weighted_loss(
      row_losses.power_weighted, x_BxL, weight_BxL, power_V
    )
    log_rate_BxL = scale + power_V[x_BxL] * jnp.log(t_Bx1)
    log_q_B = log_probability(log_rate_BxL, is_masked_BxL).sum(-1)
    return total, jnp.sum(weight_BxL * nats_BxL, axis=-1), log_q_B

  def surrogate(raw_V):
    total, f1_B, log_q1_B = draw(raw_V, "")
    total2, f2_B, log_q2_B = draw(raw_V, "2")
    rloo_B = 0.5 * (f1_B - f2_B) * (log_q1_B - log_q2_B)
    return (0.5 * (total + total2) + rloo_B.sum()) / len(x_BxL), (f1_B, f2_B, rloo_B)

  gradient_V, terms = jax.jit(jax.grad(surrogate, has_aux=True))(raw_V)
  for ours, name in zip(
    terms, ("diffusion_nats", "diffusion_nats2", "rloo_surrogate"), strict=True
  ):
    scale = np.abs(golden[f"genmd4/{name}"]).max()
    np.testing.assert_allclose(ours, golden[f"genmd4/{name}"], rtol=1e-4, atol=1e-6 * scale)
  expected_V = golden["genmd4/grad_w_of_mean_surrogate"]
  np.testing.assert_allclose(
    gradient_V, expected_V, rtol=1e-4, atol=1e-6 * np.abs(expected_V).max()
  )


@both_transformers
def test_an_imported_transformer_computes_the_reference_logits(golden, settings):
  network = networks.Transformer(**SHAPE, **settings)
  params = networks.import_md4(golden_params(golden), SHAPE | settings)
  fns = networks.bind(network, params)
  logits = jax.jit(lambda z_BxL, t_BxG: fns.denoise(z_BxL, t_BxG).logits())(
    golden["z"], golden["t"][:, None]
  )
  np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=1e-5)


@both_images
def test_an_imported_image_denoiser_computes_the_reference_logits(golden, network, settings):
  built = network(image_shape=(8, 8, 3), **IMAGE_SHAPE, **settings)
  params = networks.import_md4(golden_params(golden), IMAGE_SHAPE | settings)
  fns = networks.bind(built, params)
  logits = jax.jit(lambda z_BxL, t_BxG: fns.denoise(z_BxL, t_BxG).logits())(
    golden["z"].reshape(2, -1), golden["t"][:, None]
  )
  expected = golden["logits"].reshape(2, -1, 16)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@both_images
def test_an_import_of_images_has_every_leaf_of_the_network(golden, network, settings):
  built = network(image_shape=(8, 8, 3), **IMAGE_SHAPE, **settings)
  init = lambda: built.init(jax.random.key(0), jnp.zeros((1, 192), jnp.int32), jnp.ones((1, 1)))
  expected = nn.unbox(jax.eval_shape(init))["params"]
  params = networks.import_md4(golden_params(golden), IMAGE_SHAPE)
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)


@pytest.mark.parametrize(
  ("golden", "key", "value", "found"),
  [
    ("uvit", "name", "unet", "uvit"),
    ("uvit", "depth", 3, 2),
    ("uvit", "conditioned_norms", False, True),
    ("uvit", "middle_depth", 1, 2),
    ("uvit", "middle_patch", 4, 2),
    ("unet", "heads", 4, 1),
    ("unet", "time_conditioning", False, True),
    ("unet", "ordinal", True, False),
    ("unet", "absolute_positions", True, False),
    ("unet", "patch", 2, 1),
    ("uvit", "head_width", 32, None),
  ],
)
def test_an_import_of_images_that_contradicts_the_config_names_the_key(golden, key, value, found):
  message = f"network.{key} is {value} in the config and {found} in the MD4 parameters"
  params = golden_params(IMAGES[["unet", "uvit"].index(golden)][0])
  with pytest.raises(ValueError, match=message):
    networks.import_md4(params, IMAGE_SHAPE | {key: value})


@both_images
def test_an_import_of_images_refuses_a_tree_with_a_leaf_too_few_or_too_many(
  golden, network, settings
):
  tree = golden_params(golden)
  leaf = "UNet5DWrapper_0/UNet_0/ResBlock_2/Conv_1/kernel"
  with pytest.raises(ValueError, match="no place for: UNet5DWrapper_0/UNet_0/more"):
    networks.import_md4(tree | {"params/UNet5DWrapper_0/UNet_0/more": np.zeros(1)}, {})
  del tree[f"params/{leaf}"]
  with pytest.raises(ValueError, match=f"no MD4 image denoiser: '{leaf}' is missing"):
    networks.import_md4(tree, {})


def golden_params(golden):
  return {key: golden[key] for key in golden.files if key.startswith("params/")}


@both_transformers
def test_a_nested_tree_without_params_is_read_like_a_flat_one(golden, settings):
  nested = {}
  for key, leaf in golden_params(golden).items():
    *path, last = key.removeprefix("params/").split("/")
    node = nested
    for part in path:
      node = node.setdefault(part, {})
    node[last] = leaf
  first = networks.import_md4(nested, {"network": SHAPE | settings})
  second = networks.import_md4(golden_params(golden), SHAPE | settings)
  assert first.keys() == second.keys()
  np.testing.assert_array_equal(
    first["blocks"]["mlp"]["up"]["kernel"], second["blocks"]["mlp"]["up"]["kernel"]
  )


@pytest.mark.parametrize(
  ("key", "value", "found"),
  [
    ("depth", 3, 2),
    ("width", 64, 32),
    ("condition_width", 16, 8),
    ("vocab_size", 12, 11),
    ("embedding_width", 8, None),
  ],
)
def test_an_import_that_contradicts_the_config_names_the_key_and_both_values(key, value, found):
  golden, settings = TRANSFORMERS[0]
  message = f"network.{key} is {value} in the config and {found} in the MD4 parameters"
  with pytest.raises(ValueError, match=message):
    networks.import_md4(golden_params(golden), SHAPE | settings | {key: value})


def test_an_import_refuses_a_leaf_that_it_has_no_place_for():
  golden, settings = TRANSFORMERS[0]
  tree = golden_params(golden) | {"params/Transformer_0/Dense_1/bias": np.zeros(11)}
  with pytest.raises(ValueError, match="no place for: Transformer_0/Dense_1/bias"):
    networks.import_md4(tree, SHAPE | settings)


@pytest.mark.parametrize(
  "missing",
  [
    "Transformer_0/Embed_0/embedding",
    "CondEmbedding_0/dense0/bias",
    "Transformer_0/TransformerBlock_1/feed_forward/w3/kernel",
  ],
)
def test_an_import_refuses_a_tree_that_lacks_a_leaf(missing):
  golden, settings = TRANSFORMERS[0]
  tree = golden_params(golden)
  del tree[f"params/{missing}"]
  with pytest.raises(ValueError, match=f"no MD4 text denoiser: '{missing}' is missing"):
    networks.import_md4(tree, SHAPE | settings)
