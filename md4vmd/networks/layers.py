"""Layers of the denoisers: dense maps, rotary attention, gated MLP, adaptive normalisation."""

from __future__ import annotations

import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import numerics
from md4vmd.forward import group_to_token
from md4vmd.networks.attention import attend
from md4vmd.networks.reach import Reach

GATES = {"glu": nn.sigmoid, "swiglu": nn.swish}
KeyValue = tuple[jax.Array, jax.Array]  # of one layer, each [B, M, heads, features]


def parameter(
  module: nn.Module, name: str, init: Any, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> jax.Array:
  """A float32 parameter with logical names on its axes; `partitioning.RULES` maps them."""
  return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Lays an activation out on the mesh in use by the logical names of its axes.

  Unlike `nn.with_logical_constraint` it leaves an axis whole that the mesh does not divide, such as
  the single token of a call behind a cache.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  spec = numerics.fitting(mesh, x.shape, nn.logical_to_mesh_axes(axes) or ())
  return jax.lax.with_sharding_constraint(x, spec)


def scaled_normal(scale: float, fan_in: int) -> Any:
  """Normal numbers of deviation scale / sqrt(fan_in); for scale 0 none are drawn."""
  return nn.initializers.normal(scale / math.sqrt(fan_in)) if scale else nn.initializers.zeros


class Dense(nn.Module):
  """x @ kernel + bias on the last axis, with logical names on both axes of the kernel.

  Attributes:
    features: width of the output.
    axes: logical names of the kernel's two axes; `partitioning.RULES` maps them to the mesh.
    use_bias: adds a bias that starts at 0.
    init_scale: factor on the fan-in scaled normal initial kernel; 0 starts the layer at 0.
    dtype: dtype of the product; parameters stay float32.
    bias_init: initializer of the bias.
  """

  features: int
  axes: tuple[str | None, str | None]
  use_bias: bool = False
  init_scale: float = 1.0
  dtype: Any = jnp.float32
  bias_init: Any = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., I] to [..., features]."""
    init = scaled_normal(self.init_scale, x.shape[-1])
    kernel = parameter(self, "kernel", init, self.axes, (x.shape[-1], self.features))
    # Flat rows: the gradient of a product of three axes costs a transposed copy of x and of dy.
    rows_NxI = x.astype(self.dtype).reshape(-1, x.shape[-1])
    y = (rows_NxI @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
    if self.use_bias:
      bias = parameter(self, "bias", self.bias_init, self.axes[1:], (self.features,))
      y += jnp.broadcast_to(bias.astype(self.dtype), y.shape)
    return y


def rotary(x_BxLxHxE: jax.Array, position_L: jax.Array | None = None) -> jax.Array:
  """Rotary position embedding on interleaved pairs of features (arXiv 2104.09864).

  Positions are 0, 1, ... where none are given; their sines are then constants of the program. Left
  to XLA, its CPU backend computes them again for every sequence and head.
  """
  length, width = x_BxLxHxE.shape[1], x_BxLxHxE.shape[3]
  frequency = (10000.0 ** (-np.arange(0, width, 2) / width)).astype(np.float32)
  xp, place_L = (
    (np, np.arange(length, dtype=np.float32)) if position_L is None else (jnp, position_L)
  )
  angle_1xLx1xE = (place_L[:, None] * frequency[None, :])[None, :, None, :]
  cos, sin = xp.cos(angle_1xLx1xE), xp.sin(angle_1xLx1xE)
  even, odd = x_BxLxHxE[..., ::2].astype(jnp.float32), x_BxLxHxE[..., 1::2].astype(jnp.float32)
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x_BxLxHxE.shape).astype(x_BxLxHxE.dtype)


def normalise(x: jax.Array) -> jax.Array:
  """Zero mean and unit variance over features, computed in float32."""
  wide = x.astype(jnp.float32)
  mean = wide.mean(-1, keepdims=True)
  variance = jnp.square(wide - mean).mean(-1, keepdims=True)
  return ((wide - mean) * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


class TimeEmbedding(nn.Module):
  """Sinusoids of 1000 t through a two-layer MLP: [B, G] -> [B, G, features]."""

  features: int

  @nn.compact
  def __call__(self, t_BxG: jax.Array) -> jax.Array:
    """Embeds times in [0, 1]."""
    half = self.features // 2
    frequency = jnp.exp(-math.log(1e4) / (half - 1) * jnp.arange(half))
    angle = 1000.0 * t_BxG[:, :, None] * frequency[None, None, :]
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    hidden = nn.swish(Dense(4 * self.features, (None, "mlp"), use_bias=True, name="up")(waves))
    return Dense(self.features, ("mlp", None), use_bias=True, name="down")(hidden)


class LatentEmbedding(nn.Module):
  """A latent and its group's share of masked tokens through an MLP: [B, G, Z] -> [B, G, features].

  Seeing the share, the network can leave the latent aside where the visible tokens say it all.
  """

  features: int

  @nn.compact
  def __call__(self, latent_BxGxZ: jax.Array, is_masked_BxL: jax.Array) -> jax.Array:
    """Embeds latents of any scale."""
    is_masked_BxGxS = is_masked_BxL.reshape(*latent_BxGxZ.shape[:2], -1)
    share_BxGx1 = 4.0 * is_masked_BxGxS.mean(-1, keepdims=True) - 2.0
    seen = jnp.concatenate([latent_BxGxZ, share_BxGx1], axis=-1)
    up = Dense(4 * self.features, (None, "mlp"), use_bias=True, name="up")(seen)
    return Dense(self.features, ("mlp", None), use_bias=True, name="down")(nn.swish(up))


def condition(
  network: Any,
  zt_BxL: jax.Array,
  t_BxG: jax.Array | None,
  label_B: jax.Array | None,
  latent_BxGxZ: jax.Array | None,
) -> jax.Array | None:
  """condition_BxGxC: embeddings of the time, the label and the latent, summed; None for none.

  It is called within a compact method of a network with the attributes vocab_size,
  time_conditioning, condition_width and classes.

  Raises:
    ValueError: the network needs an input that is missing, or has no use for one.
  """
  if (label_B is not None) != bool(network.classes):
    raise ValueError(
      f"a network of {network.classes} classes got {'no labels' if label_B is None else 'labels'}"
    )
  parts, width = [], network.condition_width
  if network.time_conditioning:
    if t_BxG is None:
      raise ValueError("a network with time_conditioning needs the time t_BxG")
    parts.append(TimeEmbedding(width, name="time")(t_BxG))
  if network.classes:
    parts.append(nn.Embed(network.classes, width, name="label")(label_B)[:, None, :])
  if latent_BxGxZ is not None:
    is_masked_BxL = zt_BxL == network.vocab_size
    parts.append(LatentEmbedding(width, name="latent")(latent_BxGxZ, is_masked_BxL))
  return sum(parts[1:], start=parts[0]) if parts else None


class Modulation(nn.Module):
  """Chunks of per-feature shift, scale and gate, from the condition (adaLN, arXiv 2212.09748).

  Without a condition they are learned vectors.

  Attributes:
    names: the chunks, in the order in which the kernel stores them; scales and gates start at 0
      and mean 1 + scale; where there is no condition, gates start at 1.
    gate: name of the activation applied to the condition.
    init_scale: of the condition's map; at 0 the condition has no influence at the start.
    open_gates: gates start at 1; at 0 every block starts as the identity (adaLN-zero).
  """

  names: tuple[str, ...]
  features: int
  gate: str
  init_scale: float = 0.0
  open_gates: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, condition_BxGxC: jax.Array | None, length: int) -> dict[str, jax.Array]:
    """name -> array that broadcasts against [B, L, features]."""
    if condition_BxGxC is None:
      start = {"shift": 0.0, "scale": 0.0, "gate": 1.0}
      return {
        name: self.param(
          name, nn.initializers.constant(start[name.split("_")[0]]), (self.features,)
        ).astype(self.dtype)[None, None, :]
        for name in self.names
      }
    activated = GATES[self.gate](condition_BxGxC)
    width = len(self.names) * self.features
    packed = Dense(
      width,
      (None, "mlp"),
      use_bias=True,
      init_scale=self.init_scale,
      dtype=self.dtype,
      bias_init=self._initial_bias,
      name="dense",
    )(activated)
    if packed.shape[1] > 1:
      to_tokens = jax.vmap(lambda x_BxG: group_to_token(x_BxG, length), -1, -1)
      packed = to_tokens(packed)
    return dict(zip(self.names, jnp.split(packed, len(self.names), axis=-1), strict=True))

  def _initial_bias(self, key, shape, dtype=jnp.float32):
    del key
    open_gate = lambda name: float(self.open_gates and name.startswith("gate"))
    starts = [open_gate(name) for name in self.names]
    return jnp.repeat(jnp.array(starts, dtype), self.features).reshape(shape)


class Attention(nn.Module):
  """Multi-head self-attention with rotary positions, by a kernel of `attention`."""

  heads: int
  implementation: str
  init_scale: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x_BxLxD: jax.Array, cached: KeyValue | None, reach: Reach
  ) -> tuple[jax.Array, KeyValue]:
    """([B, L, D] -> [B, L, D], keys and values of these tokens); behind a layer's cached ones."""
    batch, length, width = x_BxLxD.shape
    project = lambda name: Dense(width, ("embed", "heads"), dtype=self.dtype, name=name)(
      x_BxLxD
    ).reshape(batch, length, self.heads, -1)
    query = rotary(project("query"), reach.position_N)
    key, value = new = rotary(project("key"), reach.position_N), project("value")
    if cached is not None:
      put = lambda old, now: jax.lax.dynamic_update_slice_in_dim(old, now, reach.start, axis=1)
      key, value = put(cached[0], key), put(cached[1], value)
    # The sequence that parameters are made for may be one that no kernel takes.
    mixed = attend(
      query, key, value, reach, "xla" if self.is_initializing() else self.implementation
    )
    return Dense(
      width, ("heads", "embed"), init_scale=self.init_scale, dtype=self.dtype, name="out"
    )(mixed.reshape(batch, length, width)), new


class GatedMLP(nn.Module):
  """(gate(x W_gate) * x W_up) W_down, hidden width 8/3 of the input, rounded up to 32."""

  gate: str
  init_scale: float
  dtype: Any

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    """[B, L, D] -> [B, L, D]."""
    width = x_BxLxD.shape[-1]
    hidden = 32 * math.ceil(8 * width // 3 / 32)
    dense = lambda name: Dense(hidden, ("embed", "mlp"), dtype=self.dtype, name=name)(x_BxLxD)
    gated = GATES[self.gate](dense("gate")) * dense("up")
    return Dense(
      width, ("mlp", "embed"), init_scale=self.init_scale, dtype=self.dtype, name="down"
    )(gated)


class Block(nn.Module):
  """Attention and MLP, each normalised, modulated and gated by the condition.

  Attributes:
    heads: attention heads.
    gate: activation of the MLP and of the modulation, a key of GATES.
    residual_scale: factor on the initial kernels that write to the residual stream.
    modulation_scale: initial scale of the modulation's kernel.
    open_gates: whether its gates start at 1.
    dropout: rate on what the block adds to the residual stream.
    attention: one of `attention.IMPLEMENTATIONS`.
    dtype: dtype of activations.
  """

  heads: int
  gate: str
  residual_scale: float
  modulation_scale: float
  open_gates: bool
  dropout: float
  attention: str
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x_BxLxD: jax.Array,
    cached: KeyValue | None,
    condition_BxGxC: jax.Array | None,
    reach: Reach,
    deterministic: bool,
  ) -> tuple[jax.Array, KeyValue | None]:
    """(block output, new keys and values where some are cached), the form of a scan's body."""
    length, width = x_BxLxD.shape[1:]
    names = tuple(
      f"{kind}_{part}" for part in ("attention", "mlp") for kind in ("shift", "scale", "gate")
    )
    modulation = Modulation(
      names,
      width,
      self.gate,
      self.modulation_scale,
      self.open_gates,
      self.dtype,
      name="modulation",
    )(condition_BxGxC, length)
    attention = Attention(
      self.heads,
      self.attention,
      self.residual_scale,
      self.dtype,
      name="attention",
    )
    mlp = GatedMLP(self.gate, self.residual_scale, self.dtype, name="mlp")
    drop = nn.Dropout(self.dropout, deterministic=deterministic)

    def enter(part):
      return modulate(x_BxLxD, modulation[f"shift_{part}"], modulation[f"scale_{part}"])

    mixed_BxLxD, new = attention(enter("attention"), cached, reach)
    x_BxLxD += drop(mixed_BxLxD) * modulation["gate_attention"]
    x_BxLxD += drop(mlp(enter("mlp"))) * modulation["gate_mlp"]
    x_BxLxD = constrain(x_BxLxD, ("batch", "length", None))
    return x_BxLxD, None if cached is None else new


def modulate(x_BxLxD: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """normalise(x) * (1 + scale) + shift."""
  return normalise(x_BxLxD) * (1.0 + scale) + shift
