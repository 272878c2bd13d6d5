"""Attention by each kernel beside XLA's, splash interpreted; who takes what."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import networks, partitioning
from md4vmd.networks import attention
from md4vmd.networks.reach import Reach, two_streams

pytestmark = pytest.mark.usefixtures("quick_compilation")

REACHES = {"all": Reach(), "left": Reach(attends="left"), "blocks": two_streams(64, 16)}


def draw(*shape):
  return jax.random.normal(jax.random.key(len(shape)), shape)


def check(ours, expected):
  for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
  "kernel, attends", [*(("splash", attends) for attends in REACHES), ("recompute", "all")]
)
def test_a_kernel_and_its_gradients_are_those_of_xla(kernel, attends):
  """In a rematerialised function, whose arguments are traced, the reach among them."""
  inputs_3xBxNxHxE, weight_BxNxHxE = draw(3, 2, 128, 2, 16), draw(2, 128, 2, 16)

  @functools.partial(jax.jit, static_argnums=0)
  def output_and_gradients(name, inputs_3xBxNxHxE):
    mix = jax.checkpoint(lambda inputs, reach: attention.attend(*inputs, reach, name))
    output, pull = jax.vjp(lambda inputs: mix(inputs, REACHES[attends]), inputs_3xBxNxHxE)
    return output, pull(weight_BxNxHxE)

  ours, xla = (output_and_gradients(name, inputs_3xBxNxHxE) for name in (kernel, "xla"))
  check(ours, xla)


def test_recompute_keeps_no_scores_for_the_backward_pass():
  inputs_3xBxNxHxE = draw(3, 2, 128, 2, 16)

  def most_kept(name):
    _, pull = jax.vjp(lambda x: attention.attend(*x, Reach(), name), inputs_3xBxNxHxE)
    return max(kept.size for kept in jax.tree.leaves(pull))

  assert most_kept("recompute") < 2 * 2 * 128 * 128 <= most_kept("xla")


def splash_on_a_mesh():
  inputs_3xBxNxHxE = draw(3, 2, 128, 4, 8)
  mix = lambda *inputs: [attention.attend(*inputs, Reach(), name) for name in ("splash", "xla")]
  with partitioning.use(partitioning.make_mesh(data=2, tensor=2, sequence=2)):
    splash, xla = jax.jit(mix)(*inputs_3xBxNxHxE)
  check(splash, xla)
  assert splash.addressable_shards[0].data.shape == (1, 128, 1, 8)


def test_every_device_of_a_mesh_computes_its_rows_and_heads(on_eight_devices, monkeypatch):
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  on_eight_devices(splash_on_a_mesh)


@pytest.mark.parametrize("name", ["splash", "xla"])
def test_a_network_calls_the_kernel_that_it_is_told_to(make_network, name):
  """Its parameters are made at a length that splash does not take."""
  x_BxL, t_BxG = jnp.zeros((1, 64), int), jnp.zeros((1, 4))
  settings = dict(attends="blocks", block_size=16, remat="dots", attention=name)
  fns = networks.bind(*make_network(length=8, **settings))
  program = jax.make_jaxpr(lambda: fns.denoise(x_BxL, t_BxG, clean_BxL=x_BxL).hidden_BxLxD)()
  assert ("pallas_call" in str(program)) == (name == "splash")


def test_decoding_behind_a_cache_is_xla_and_takes_any_length(make_network):
  settings = dict(attends="left", time_conditioning=False, attention="splash")
  fns = networks.bind(*make_network(length=8, **settings))
  call = lambda: fns.denoise(jnp.zeros((1, 1), int), None, cache=fns.init_cache(1, 8))
  _, cache = jax.eval_shape(call)
  assert cache.key_JxBxMxHxE.shape == (1, 1, 8, 2, 8)


@pytest.mark.parametrize(
  "device, settings, kernel",
  [
    ("TPU", {}, "splash"),
    ("TPU", {"length": 100}, "xla"),
    ("TPU", {"attends": "blocks"}, "splash"),
    ("NVIDIA", {}, "cudnn"),
    ("NVIDIA", {"dtype": jnp.float32}, "xla"),
    ("NVIDIA", {"attends": "blocks"}, "xla"),
    ("NVIDIA", {"length": 127}, "xla"),
    ("NVIDIA", {"width": 20}, "xla"),
    ("NVIDIA", {"width": 256}, "xla"),
    ("AMD", {}, "xla"),
    ("cpu", {}, "recompute"),
    ("cpu", {"attends": "left"}, "xla"),
  ],
)
def test_auto_is_the_kernel_of_the_device_where_it_takes_the_input(
  monkeypatch, device, settings, kernel
):
  given = {"length": 128, "width": 64, "dtype": jnp.bfloat16, "attends": "all"} | settings
  monkeypatch.setattr(attention, "_device", lambda: device)
  query = jax.ShapeDtypeStruct((1, given["length"], 2, given["width"]), given["dtype"])
  assert attention._kernel("auto", query, REACHES[given["attends"]]) == kernel


@pytest.mark.parametrize(
  "kind, capability, word",
  [
    ("NVIDIA H200", "9.0", "NVIDIA"),
    ("Tesla T4", "7.5", "Tesla"),
    ("NVIDIA TITAN V", "7.0", ""),
    ("AMD Instinct", "gfx90a", "AMD"),
  ],
)
def test_devices_without_a_fused_kernel_are_left_to_xla(monkeypatch, kind, capability, word):
  device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert attention._device() == word
  assert (word in attention._OF_DEVICE) == (word == "NVIDIA")


@pytest.mark.parametrize(
  "name, shape, message",
  [
    ("splash", (1, 100, 2, 8), "'splash' takes a multiple of 128 tokens, not 100; set attention"),
    ("cudnn", (1, 128, 2, 8), "'cudnn' computes in bfloat16 and dtype is float32; set bfloat16"),
  ],
)
def test_a_kernel_that_is_asked_for_says_what_it_does_not_take(name, shape, message):
  query = jax.ShapeDtypeStruct(shape, jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda x: attention.attend(x, x, x, Reach(), name), query)
