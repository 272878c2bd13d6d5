"""The U-Nets: what must not change their output, their options, their latents, their refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import latents, networks
from md4vmd.networks import UNet, UViT, conv, unet
from md4vmd.networks.conv_head import ConvPrediction
from md4vmd.networks.head import HeadPrediction
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE, V = (4, 4, 3), 6
SMALL = {"vocab_size": V, "image_shape": SHAPE, "width": 8, "depth": 1, "condition_width": 8}
ZT_BxL = jax.random.randint(jax.random.key(1), (2, 48), 0, V + 1)
T_Bx1 = jnp.array([[0.2], [0.9]])


def make(kind=UNet, **options):
  """A network and parameters that are all off their initial values."""
  network = kind(**{**SMALL, "conditioned_norms": True, **options})
  label_B = jnp.zeros(2, jnp.int32) if network.classes else None
  return network, toys.random_params(network, ZT_BxL, T_Bx1, label_B=label_B, scale=0.2)


@functools.partial(jax.jit, static_argnums=0)
def logits(network, params, zt_BxL=ZT_BxL, t_BxG=T_Bx1, **inputs):
  return networks.bind(network, params).denoise(zt_BxL, t_BxG, **inputs).logits()


@pytest.mark.parametrize("kind", [UNet, UViT])
def test_every_block_is_recomputed_in_the_backward_pass_if_so_told(kind):
  more = {"middle_width": 8, "middle_depth": 3, "heads": 2} if kind is UViT else {}

  def recomputed(remat):
    network, params = make(kind, remat=remat, dropout=0.1, **more)

    def loss(params):
      fns = networks.bind(network, params)
      prediction = fns.denoise(ZT_BxL, T_Bx1, dropout_key=jax.random.key(0))
      return prediction.weighted_nll(ZT_BxL % V, jnp.ones(ZT_BxL.shape))[0]

    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("prevent_cse")

  assert recomputed("none") == 0
  # Each stack and each block outside of one.
  assert recomputed("full") >= (4 if kind is UViT else 5)


def test_half_precision_gives_nearly_the_same_logits():
  network, params = make()
  expected = logits(network, params)
  ours = logits(network.clone(dtype="bfloat16"), params)
  assert 0 < np.abs(ours - expected).max() < 0.05 * np.abs(expected).max()


def test_the_time_and_every_token_reach_the_logits_of_their_own_image():
  network, params = make()
  base = logits(network, params)
  assert not np.allclose(base, logits(network, params, t_BxG=T_Bx1 / 2))
  moved = logits(network, params, zt_BxL=ZT_BxL.at[0, 0].set((ZT_BxL[0, 0] + 1) % V))
  assert not np.allclose(base[0], moved[0])
  np.testing.assert_array_equal(base[1], moved[1])


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_are_cut_and_put_together_again(patch):
  network = UNet(**SMALL, patch=patch, head_width=4)
  x_BxLxE = jnp.arange(2 * 48 * 5.0).reshape(2, 48, 5)
  grid = network._to_grid(x_BxLxE)
  assert grid.shape == (2, 4 // patch, 4 // patch, 15 * patch**2)
  np.testing.assert_array_equal(network._from_grid(grid), x_BxLxE)
  first = x_BxLxE.reshape(2, 4, 4, 15)[:, :patch, :patch].reshape(2, -1)
  np.testing.assert_array_equal(grid[:, 0, 0], first)


def test_a_head_for_every_token_is_another_prediction_of_the_same_tokens():
  def kind(**options):
    network, params = make(**options)
    return type(jax.eval_shape(networks.bind(network, params).denoise, ZT_BxL, T_Bx1))

  assert kind() is ConvPrediction
  network, params = make(patch=2, head_width=4, ordinal=True, absolute_positions=True)
  assert kind(patch=2, head_width=4) is HeadPrediction
  assert logits(network, params).shape == (2, 48, V)


def test_near_values_have_near_features_and_the_mask_has_none():
  features_PxF = unet.intensities(256, 384)
  assert features_PxF.shape == (384, 17) and not features_PxF[256:].any()
  distance = lambda a, b: float(jnp.linalg.norm(features_PxF[a, :9] - features_PxF[b, :9]))
  assert distance(100, 101) < distance(100, 110) < distance(100, 200)
  assert len(np.unique(np.round(np.asarray(features_PxF[:256]), 4), axis=0)) == 256


def test_an_ordinal_embedding_adds_a_map_of_the_values_and_changes_the_logits():
  network, params = make(ordinal=True)
  plain, plain_params = make()
  kernel = params["ordinal"]["kernel"]
  assert kernel.shape == (17, 8) and "ordinal" not in plain_params
  without = {key: leaf for key, leaf in params.items() if key != "ordinal"}
  # The same as a table to which the map's features are added, and none are added to the mask's.
  added = unet.intensities(V, len(params["embedding"])) @ kernel
  moved = without | {"embedding": params["embedding"] + added}
  base = logits(network, params)
  np.testing.assert_allclose(base, logits(plain, moved), rtol=0, atol=1e-5 * np.abs(base).max())
  assert np.abs(base - logits(plain, without)).max() > 1e-3
  all_masked_BxL = jnp.full_like(ZT_BxL, V)
  masked = (logits(network, params, all_masked_BxL), logits(plain, without, all_masked_BxL))
  np.testing.assert_allclose(*masked, rtol=0, atol=1e-5 * np.abs(base).max())


def test_labels_and_dropout_act_and_a_missing_label_is_refused():
  network, params = make(classes=3, dropout=0.5)
  label_B = jnp.array([0, 2])
  base = logits(network, params, label_B=label_B)
  other = logits(network, params, label_B=jnp.array([1, 2]))
  assert not np.allclose(base[0], other[0])
  np.testing.assert_array_equal(base[1], other[1])
  dropped = logits(network, params, label_B=label_B, dropout_key=jax.random.key(0))
  assert not np.allclose(base, dropped)
  with pytest.raises(ValueError, match="3 classes got no labels"):
    logits(network, params)


def test_a_unet_takes_a_latent_with_a_reader_of_its_own():
  network = networks.with_latent(
    UNet(**SMALL, conditioned_norms=True), latents.TABLE["gaussian"](width=2), depth=1
  )
  assert isinstance(network, networks.LatentNetwork)
  params = toys.random_params(network, ZT_BxL, T_Bx1, scale=0.2)
  params["denoiser"]["latent"]["up"]["kernel"] *= 5.0

  @jax.jit
  def change(params, zt_BxL, where_BxL):
    """Of the logits and of the reader, by the latent and by what is marked."""
    fns = networks.bind(network, params)
    z_BxKxGxZ = jnp.ones((2, 1, 1, 2))
    first, second = (
      fns.denoise(zt_BxL, T_Bx1, latent_BxGxZ=s * z_BxKxGxZ[:, 0]).logits() for s in (1, -1)
    )
    raw, other = (
      fns.encode(ZT_BxL % V, zt_BxL, w).log_prob(z_BxKxGxZ) for w in (where_BxL, ~where_BxL)
    )
    return jnp.abs(first - second).max(), jnp.abs(raw - other).max()

  where_BxL = jnp.broadcast_to(jnp.arange(48)[None, :] < 20, (2, 48))
  by_latent, by_mark = change(params, ZT_BxL, where_BxL)
  assert by_latent > 1e-4 and by_mark > 1e-4
  with pytest.raises(ValueError, match=r"latent\.tokens is 4"):
    networks.with_latent(UNet(**SMALL), latents.TABLE["gaussian"](width=2), tokens=4)


@pytest.mark.parametrize(
  ("kind", "options", "words"),
  [
    (UNet, {"image_shape": None}, "set network.name=transformer"),
    (UNet, {"patch": 3}, "patch 3 must divide images of 4 x 4"),
    (UNet, {"patch": 2}, "patch 2 needs a head for every token; set network.head_width"),
    (UNet, {"depth": 0}, "depth 0"),
    (UNet, {"heads": 3}, "heads 3 must divide the features of the middle, 8"),
    (UNet, {"remat": "some"}, "remat 'some'"),
    (UNet, {"dtype": "float16"}, "dtype 'float16'"),
    (UNet, {"dropout": 1.0}, "dropout 1.0"),
    (UViT, {"middle_width": 16, "heads": 2, "middle_patch": 3}, "middle_patch 3 must divide"),
    (UViT, {"middle_width": 10, "heads": 4}, "heads 4 must divide the features of the middle, 10"),
  ],
)
def test_bad_options_are_refused_with_the_value(kind, options, words):
  with pytest.raises(ValueError, match=words):
    kind(**{**SMALL, **options})


def test_tokens_that_are_no_image_are_refused():
  network, params = make()
  with pytest.raises(ValueError, match="45 tokens are no image"):
    logits(network, params, zt_BxL=ZT_BxL[:, :45])


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradients_of_a_convolution_are_those_of_its_definition(size, x64):
  rng = np.random.default_rng(0)
  x_BxHxWxI, kernel = (
    jnp.asarray(rng.normal(size=shape)) for shape in [(2, 4, 3, 2), (size, size, 2, 5)]
  )
  weight_BxHxWxO = jnp.asarray(rng.normal(size=(2, 4, 3, 5)))

  def defined(x_BxHxWxI, kernel):
    before = (size - 1) // 2
    pad = (before, size - 1 - before)
    framed = jnp.pad(x_BxHxWxI, ((0, 0), pad, pad, (0, 0)))
    return sum(
      framed[:, i : i + 4, j : j + 3] @ kernel[i, j] for i in range(size) for j in range(size)
    )

  def pulled(function):
    loss = lambda x, kernel: (function(x, kernel) * weight_BxHxWxO).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x_BxHxWxI, kernel)

  for ours, expected in zip(
    *map(jax.tree.leaves, map(pulled, (conv.convolve, defined))), strict=True
  ):
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_group_norm_has_the_mean_and_variance_that_it_says(x64):
  x_BxHxWxD = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (2, 4, 4, 64)))
  norm = conv.GroupNorm()
  y = norm.apply(nn.unbox(norm.init(jax.random.key(0), x_BxHxWxD)), x_BxHxWxD)
  groups = np.asarray(y).reshape(2, 16, 32, 2)
  np.testing.assert_allclose(groups.mean((1, 3)), 0.0, atol=1e-12)
  np.testing.assert_allclose(groups.var((1, 3)), 1.0, rtol=1e-5)
