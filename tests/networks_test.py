"""The transformer's options: what must not change its output, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import networks
from md4vmd.networks import Transformer, stack
from md4vmd.networks.head import padded
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = dict(vocab_size=11, width=16, depth=2, heads=2, condition_width=8, adaln_zero=False)
ZT_BxL = jax.random.randint(jax.random.key(1), (3, 8), 0, 12)
T_Bx1 = jnp.array([[0.2], [0.5], [1.0]])


def make(**options):
  network = Transformer(**{**SMALL, **options})
  label_B = jnp.zeros(3, jnp.int32) if network.classes else None
  return network, toys.random_params(network, ZT_BxL, T_Bx1, label_B=label_B)


def gradient(network, params):
  def loss(params):
    prediction = networks.bind(network, params).denoise(ZT_BxL, T_Bx1)
    return prediction.weighted_nll(ZT_BxL % 11, jnp.ones(ZT_BxL.shape))[0]

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain():
  """(parameters, loss, gradient) of the network without options."""
  network, params = make()
  return params, *gradient(network, params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_loss_nor_gradient(remat, plain):
  params, loss, plain_gradient = plain
  loss_remat, again = gradient(Transformer(**SMALL, remat=remat), params)
  np.testing.assert_allclose(loss_remat, loss, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, plain_gradient
  )


def test_a_loop_of_blocks_computes_what_written_out_ones_do(plain, monkeypatch):
  params, loss, plain_gradient = plain
  monkeypatch.setattr(stack, "FEW", {False: 1, True: 1})
  loss_loop, again = gradient(Transformer(**SMALL), params)
  np.testing.assert_allclose(loss_loop, loss, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again, plain_gradient
  )


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters(plain):
  params, loss, _ = plain
  loss_bf16, gradients = gradient(Transformer(**SMALL, dtype="bfloat16"), params)
  assert loss_bf16 != loss
  np.testing.assert_allclose(loss_bf16, loss, rtol=2e-2)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}


def test_layers_are_stacked_and_the_vocabulary_is_padded_to_128():
  _, params = make()
  assert params["blocks"]["attention"]["query"]["kernel"].shape == (2, 16, 16)
  assert params["embedding"].shape == (128, 16) and params["head"].shape == (16, 128)
  assert [padded(v) for v in (127, 128, 50257)] == [128, 256, 50304]


def test_a_network_without_time_conditioning_ignores_t():
  network, params = make(time_conditioning=False)
  fns = networks.bind(network, params)
  with_t = fns.denoise(ZT_BxL, T_Bx1).logits()
  np.testing.assert_array_equal(with_t, fns.denoise(ZT_BxL, None).logits())


def test_adaln_zero_starts_every_block_as_the_identity():
  network = Transformer(**{**SMALL, "adaln_zero": True})
  variables = jax.jit(network.init)(jax.random.key(0), ZT_BxL, T_Bx1)
  fns = networks.bind(network, nn.unbox(variables["params"]))
  logits = fns.denoise(ZT_BxL, T_Bx1).logits()
  np.testing.assert_array_equal(logits, fns.denoise(ZT_BxL, T_Bx1 / 2).logits())
  # Identical tokens get identical logits wherever they stand, as no position has been mixed in.
  first = ZT_BxL.reshape(-1) == ZT_BxL[0, 0]
  same = logits.reshape(-1, 11)[first]
  np.testing.assert_allclose(same, np.broadcast_to(same[:1], same.shape), rtol=1e-6)


def test_labels_change_the_prediction_and_must_match_the_network():
  network, params = make(classes=4)
  fns = networks.bind(network, params)
  one = fns.denoise(ZT_BxL, T_Bx1, label_B=jnp.array([0, 1, 2])).logits()
  other = fns.denoise(ZT_BxL, T_Bx1, label_B=jnp.array([3, 1, 2])).logits()
  assert not np.allclose(one[0], other[0])
  np.testing.assert_array_equal(one[1:], other[1:])
  with pytest.raises(ValueError, match="4 classes got no labels"):
    fns.denoise(ZT_BxL, T_Bx1)


def test_dropout_acts_only_with_a_key():
  network, params = make(dropout=0.5)
  fns = networks.bind(network, params)
  plain = fns.denoise(ZT_BxL, T_Bx1).logits()
  np.testing.assert_array_equal(plain, fns.denoise(ZT_BxL, T_Bx1).logits())
  dropped = fns.denoise(ZT_BxL, T_Bx1, dropout_key=jax.random.key(0)).logits()
  assert not np.allclose(plain, dropped)


def test_a_time_per_group_conditions_only_its_tokens_directly():
  network, params = make(depth=1)
  params = jax.tree.map(lambda x: x, params)
  params["blocks"]["attention"]["out"]["kernel"] *= 0  # without attention tokens do not mix
  fns = networks.bind(network, params)
  base = fns.denoise(ZT_BxL, jnp.full((3, 2), 0.5)).logits()
  moved = fns.denoise(ZT_BxL, jnp.array([[0.5, 0.9]] * 3)).logits()
  np.testing.assert_array_equal(base[:, :4], moved[:, :4])
  assert not np.allclose(base[:, 4:], moved[:, 4:])


@pytest.mark.parametrize(
  "options",
  [
    dict(width=10, heads=4),
    dict(mlp="relu"),
    dict(dtype="float16"),
    dict(remat="some"),
    dict(attention="fast"),
    dict(dropout=1.0),
    dict(condition_width=7),
    dict(depth=0),
  ],
)
def test_bad_options_are_refused_with_the_value(options):
  with pytest.raises(ValueError, match=str(next(iter(options.values())))):
    Transformer(**{**SMALL, **options})


def test_time_conditioning_without_a_time_is_refused():
  network, params = make()
  with pytest.raises(ValueError, match="needs the time"):
    networks.bind(network, params).denoise(ZT_BxL, None)


def test_all_logits_of_a_large_vocabulary_are_refused():
  network = Transformer(vocab_size=2000, width=16, depth=1, heads=2, time_conditioning=False)
  params = toys.random_params(network, ZT_BxL)
  with pytest.raises(ValueError, match="2000"):
    networks.bind(network, params).denoise(ZT_BxL, None).logits()


def test_a_reader_tells_where_its_tokens_stand():
  """Its features are averaged over the tokens, so without positions an order would be lost."""
  reader = Transformer(**SMALL).with_latent(2, 0).reader(3, depth=1, width=None, heads=None)
  params = toys.random_params(reader, ZT_BxL, jnp.zeros_like(ZT_BxL), groups=1)
  params["blocks"]["attention"]["out"]["kernel"] *= 0  # without attention tokens do not mix
  read = jax.jit(lambda x: reader.apply({"params": params}, x, jnp.zeros_like(x), 1))
  forwards, backwards = read(ZT_BxL), read(ZT_BxL[:, ::-1])
  assert float(jnp.abs(forwards - backwards).max()) > 1e-3
