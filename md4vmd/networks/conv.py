"""Layers of networks on images: convolutions, group norms, residual blocks, patch-wise attention.

Images are channels-last, [B, H, W, D]; a condition is one vector per image, [B, C], or None.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import numerics
from md4vmd.networks import layers
from md4vmd.networks.stack import stacked

_GROUPS = 32


def convolve(x_BxHxWxI: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """x * kernel[S, S, I, O] in `numerics.wide`, keeping H and W up to the stride.

  Products are of the dtype of x, those of the gradients too.
  """
  if stride == 1:
    return _convolve_by_ones(x_BxHxWxI, kernel)
  return _convolution(x_BxHxWxI, kernel.astype(x_BxHxWxI.dtype), "SAME", stride)


_AXES = ("NHWC", "HWIO", "NHWC")  # of the image, the kernel and the result


def _convolution(x, kernel, pads, stride=1, axes=_AXES):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    pads,
    dimension_numbers=axes,
    preferred_element_type=numerics.wide(x.dtype),
  )


@jax.custom_vjp
def _convolve_by_ones(x, kernel):
  return _convolution(x, kernel.astype(x.dtype), "SAME")


def _by_ones_forward(x, kernel):
  return _convolve_by_ones(x, kernel), (x, kernel)


def _by_ones_backward(inputs, dy):
  x, kernel = inputs
  pads = [((size - 1) // 2, size // 2) for size in kernel.shape[:2]]
  turned = kernel[::-1, ::-1].astype(x.dtype)

  def named(x, turned, dy):
    dx = _convolution(dy, turned, [pad[::-1] for pad in pads], axes=("NHWC", "HWOI", "NHWC"))
    return dx, _convolution(x, dy, pads, axes=("CHWN", "IHWO", "HWNC"))

  def moved(x, turned, dy):
    # XLA's CPU convolutions are 20 times slower in a loop where axes are in any other order.
    dx = _convolution(dy, turned.swapaxes(2, 3), [pad[::-1] for pad in pads])
    dkernel_IxSxSxO = _convolution(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), pads)
    return dx, dkernel_IxSxSxO.transpose(1, 2, 0, 3)

  arrays = (x, turned, dy.astype(x.dtype))
  dx, dkernel = jax.lax.platform_dependent(*arrays, cpu=moved, default=named)
  return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_convolve_by_ones.defvjp(_by_ones_forward, _by_ones_backward)


class Conv(nn.Module):
  """A convolution with a bias.

  Attributes:
    features: channels of the output.
    size: side of the kernel.
    stride: distance between outputs.
    init_scale: factor on the fan-in scaled normal initial kernel.
    dtype: of the product.
  """

  features: int
  size: int = 3
  stride: int = 1
  init_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxHxWxI: jax.Array) -> jax.Array:
    """[B, H, W, I] -> [B, H / stride, W / stride, features]."""
    shape = (self.size, self.size, x_BxHxWxI.shape[-1], self.features)
    init = layers.scaled_normal(self.init_scale, math.prod(shape[:3]))
    kernel = layers.parameter(self, "kernel", init, (None, None, "embed", None), shape)
    bias = layers.parameter(self, "bias", nn.initializers.zeros, (None,), shape[3:])
    y = convolve(x_BxHxWxI.astype(self.dtype), kernel, self.stride)
    return (y + bias[None, None, None, :]).astype(self.dtype)


class GroupNorm(nn.Module):
  """Zero mean and unit variance over the pixels of up to 32 groups of channels, then an affine map.

  Attributes:
    by_condition: the map is read off the condition, as (1 + scale) and shift that start at 0;
      otherwise, or without a condition, it is learned.
  """

  by_condition: bool = False

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array, condition_BxC: jax.Array | None = None) -> jax.Array:
    """[B, H, W, D] -> [B, H, W, D], computed in float32."""
    shape, width = x_BxHxWxD.shape, x_BxHxWxD.shape[-1]
    wide = x_BxHxWxD.astype(numerics.wide(x_BxHxWxD.dtype))
    groups = math.gcd(_GROUPS, width)
    wide_BxNxGxE = wide.reshape(shape[0], -1, groups, width // groups)
    mean_Bx1xGx1 = wide_BxNxGxE.mean((1, 3), keepdims=True)
    centred = wide_BxNxGxE - mean_Bx1xGx1
    deviation = jax.lax.rsqrt(jnp.square(centred).mean((1, 3), keepdims=True) + 1e-6)
    normal_BxHxWxD = (centred * deviation).reshape(shape)
    if self.by_condition and condition_BxC is not None:
      packed = layers.Dense(2 * width, (None, "mlp"), use_bias=True, init_scale=0.0, name="dense")
      scale_BxD, shift_BxD = jnp.split(packed(condition_BxC), 2, axis=-1)
      scale, shift = 1.0 + scale_BxD[:, None, None, :], shift_BxD[:, None, None, :]
    else:
      learned = lambda name, init: layers.parameter(self, name, init, (None,), (width,))
      scale = learned("scale", nn.initializers.ones)[None, None, None, :]
      shift = learned("bias", nn.initializers.zeros)[None, None, None, :]
    return (normal_BxHxWxD * scale + shift).astype(x_BxHxWxD.dtype)


class ResidualBlock(nn.Module):
  """x + conv(swish(norm(conv(swish(norm(x)))))), the condition added between the convolutions.

  Attributes:
    features: channels of the output; x is mapped to them if it has others.
    by_condition: the condition scales and shifts both norms instead of being added.
    dropout: rate before the second convolution, whose kernel starts at 0.
    dtype: of activations.
  """

  features: int
  by_condition: bool
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x_BxHxWxI: jax.Array, condition_BxC: jax.Array | None, deterministic: bool
  ) -> jax.Array:
    """[B, H, W, I] -> [B, H, W, features]."""
    norm = lambda name: GroupNorm(self.by_condition, name=name)
    h = nn.swish(norm("norm_in")(x_BxHxWxI, condition_BxC))
    h = Conv(self.features, dtype=self.dtype, name="conv_in")(h)
    if condition_BxC is not None and not self.by_condition:
      added = layers.Dense(
        self.features, (None, "mlp"), init_scale=0.0, dtype=self.dtype, name="condition"
      )
      h += added(condition_BxC)[:, None, None, :]
    h = nn.swish(norm("norm_out")(h, condition_BxC))
    h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
    h = Conv(self.features, init_scale=0.0, dtype=self.dtype, name="conv_out")(h)
    if x_BxHxWxI.shape[-1] != self.features:
      skip = layers.Dense(
        self.features, ("embed", None), use_bias=True, dtype=self.dtype, name="skip"
      )
      x_BxHxWxI = skip(x_BxHxWxI)
    return x_BxHxWxI + h


class Attention(nn.Module):
  """Multi-head attention between the positions of [B, N, D], which it does not know.

  Attributes:
    heads: attention heads; they divide D.
    bias_out: whether the map of the output has a bias, as those of the inputs have.
    init_scale: of the map of the output.
    dtype: of the products.
  """

  heads: int
  bias_out: bool
  init_scale: float
  dtype: Any

  @nn.compact
  def __call__(self, x_BxNxD: jax.Array) -> jax.Array:
    """[B, N, D] -> [B, N, D]."""
    batch, length, width = x_BxNxD.shape
    project = lambda name: layers.Dense(
      width, ("embed", "heads"), use_bias=True, dtype=self.dtype, name=name
    )(x_BxNxD).reshape(batch, length, self.heads, -1)
    mixed = jax.nn.dot_product_attention(project("query"), project("key"), project("value"))
    out = layers.Dense(
      width,
      ("heads", "embed"),
      use_bias=self.bias_out,
      init_scale=self.init_scale,
      dtype=self.dtype,
      name="out",
    )
    return out(mixed.reshape(batch, length, width))


class PixelAttention(nn.Module):
  """x + attention(norm(x)) between all pixels."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array) -> jax.Array:
    """[B, H, W, D] -> [B, H, W, D]."""
    batch, _, _, width = shape = x_BxHxWxD.shape
    normal_BxNxD = GroupNorm(name="norm")(x_BxHxWxD).reshape(batch, -1, width)
    attention = Attention(self.heads, True, 0.0, self.dtype, name="attention")
    return x_BxHxWxD + attention(normal_BxNxD).reshape(shape)


class PatchBlock(nn.Module):
  """Attention and a GELU MLP on patches, each modulated and gated (DiT, arXiv 2212.09748)."""

  heads: int
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x_BxNxD: jax.Array, _: None, condition_BxC: jax.Array | None, deterministic: bool
  ) -> tuple[jax.Array, None]:
    """([B, N, D] -> [B, N, D], None), the form of a scan's body."""
    length, width = x_BxNxD.shape[1:]
    names = [f"{kind}_{part}" for part in ("attention", "mlp") for kind in _CHUNKS]
    chunk = modulation(self, names, width, condition_BxC, length)
    drop = nn.Dropout(self.dropout, deterministic=deterministic)
    enter = lambda part: layers.modulate(x_BxNxD, chunk[f"shift_{part}"], chunk[f"scale_{part}"])
    mixed = Attention(self.heads, False, 1.0, self.dtype, name="attention")(enter("attention"))
    x_BxNxD += drop(mixed) * chunk["gate_attention"]
    dense = lambda features, axes, name: layers.Dense(
      features, axes, use_bias=True, dtype=self.dtype, name=name
    )
    hidden = nn.gelu(dense(4 * width, ("embed", "mlp"), "up")(enter("mlp")))
    x_BxNxD += drop(dense(width, ("mlp", "embed"), "down")(hidden)) * chunk["gate_mlp"]
    return layers.constrain(x_BxNxD, ("batch", None, None)), None


_CHUNKS = ("shift", "scale", "gate")


def modulation(
  module: Any, names: Any, width: int, condition_BxC: jax.Array | None, length: int
) -> dict[str, jax.Array]:
  """`layers.Modulation` named "modulation" of a module with a `dtype`, by one condition."""
  condition_Bx1xC = None if condition_BxC is None else condition_BxC[:, None, :]
  layer = layers.Modulation(tuple(names), width, "swiglu", dtype=module.dtype, name="modulation")
  return layer(condition_Bx1xC, length)


class PatchTransformer(nn.Module):
  """A transformer over square patches of a feature map (DiT, arXiv 2212.09748).

  Attributes:
    width: features of a patch.
    depth: number of blocks.
    heads: attention heads.
    patch: side of a patch; it divides H and W.
    dropout: rate on what each layer adds.
    dtype: of activations.
    remat: a key of `stack.REMAT`.
  """

  width: int
  depth: int
  heads: int
  patch: int
  dropout: float
  dtype: Any
  remat: str

  @nn.compact
  def __call__(
    self, x_BxHxWxD: jax.Array, condition_BxC: jax.Array | None, deterministic: bool
  ) -> jax.Array:
    """[B, H, W, D] -> [B, H, W, D]."""
    (batch, height, width, features), side = x_BxHxWxD.shape, self.patch
    down, across = height // side, width // side
    embed = Conv(self.width, size=side, stride=side, dtype=self.dtype, name="embed")
    x_BxNxE = embed(x_BxHxWxD).reshape(batch, down * across, self.width)
    start = lambda key, shape: jnp.asarray(waves(down, across, shape[-1]), jnp.float32)
    position_NxE = layers.parameter(
      self, "position", start, (None, None), (down * across, self.width)
    )
    x_BxNxE += position_NxE.astype(self.dtype)[None]
    blocks = stacked(PatchBlock, self.depth, remat=self.remat, shared=2)(
      self.heads, self.dropout, self.dtype, name="blocks"
    )
    x_BxNxE, _ = blocks(x_BxNxE, None, condition_BxC, deterministic)
    chunk = modulation(self, ("shift", "scale"), self.width, condition_BxC, down * across)
    out = layers.Dense(
      side * side * features, ("embed", None), use_bias=True, dtype=self.dtype, name="out"
    )
    patches = out(layers.modulate(x_BxNxE, **chunk))
    patches = patches.reshape(batch, down, across, side, side, features)
    return patches.swapaxes(2, 3).reshape(x_BxHxWxD.shape)


def waves(height: int, width: int, features: int) -> np.ndarray:
  """Sinusoids of the column and of the row of every position, [H * W, features]."""
  quarter = features // 4
  frequency_K = 10000.0 ** (-np.arange(quarter) / quarter)
  row_N, column_N = np.indices((height, width)).reshape(2, -1)
  angles = [place_N[:, None] * frequency_K[None, :] for place_N in (column_N, row_N)]
  parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
  return np.concatenate([*parts, np.zeros((height * width, features - 4 * quarter))], axis=-1)
