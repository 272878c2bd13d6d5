"""The Inception-v3 (arXiv 1512.00567) whose features define FID, with the weights of 2015-12-05.

Names and poolings are those of pt_inception-2015-12-05, the port to PyTorch of the graph that the
first FID was computed with (arXiv 1706.08500). With random weights its features of images of 32 and
64 pixels a side are those of pytorch-fid to 6e-7 of the largest (2026-11-21).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

FEATURES = 2048
_SIDE = 299
_EPSILON = 1e-3  # of its batch norms
_NORM = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
_LIE, _STAND = (1, 7), (7, 1)  # kernels, rows x columns


class ConvNorm(nn.Module):
  """A convolution, an affine map per channel (a batch norm at rest) and a ReLU.

  Attributes:
    features: channels of the output.
    size: rows and columns of the kernel.
    stride: distance between outputs.
    padding: "SAME" or "VALID".
  """

  features: int
  size: tuple[int, int]
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x_BxHxWxI: jax.Array) -> jax.Array:
    """[B, H, W, I] -> [B, H', W', features]."""
    shape = (*self.size, x_BxHxWxI.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.he_normal(), shape)
    scale = self.param("scale", nn.initializers.ones, (self.features,))
    shift = self.param("shift", nn.initializers.zeros, (self.features,))
    y = jax.lax.conv_general_dilated(
      x_BxHxWxI,
      kernel,
      (self.stride, self.stride),
      self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return nn.relu(y * scale[None, None, None, :] + shift[None, None, None, :])


class Inception(nn.Module):
  """Images -> the 2048 features after the last average over pixels."""

  @nn.compact
  def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
    """features_BxF from values 0 to 255 in 3 channels; of any size, resized to 299 x 299."""
    batch, _, _, channels = images_BxHxWxC.shape
    assert channels == 3
    x = images_BxHxWxC.astype(jnp.float32) / 127.5 - 1.0
    x = jax.image.resize(x, (batch, _SIDE, _SIDE, 3), "bilinear", antialias=False)
    x = _conv(x, "Conv2d_1a_3x3", 32, 3, 2)
    x = _conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
    x = _halved(_conv(x, "Conv2d_2b_3x3", 64, 3))
    x = _conv(x, "Conv2d_3b_1x1", 80, 1)
    x = _halved(_conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID"))
    x = _fives(x, "Mixed_5b", 32)
    x = _fives(x, "Mixed_5c", 64)
    x = _fives(x, "Mixed_5d", 64)
    x = _join(
      _chain(x, "Mixed_6a.branch3x3", (384, 3), halves=True),
      _chain(x, "Mixed_6a.branch3x3dbl", (64, 1), (96, 3), (96, 3), halves=True),
      _halved(x),
    )
    for letter, width in zip("bcde", (128, 160, 160, 192), strict=True):
      x = _sevens(x, f"Mixed_6{letter}", width)
    across = [(192, 1), (192, _LIE), (192, _STAND), (192, 3)]
    x = _join(
      _chain(x, "Mixed_7a.branch3x3", (192, 1), (320, 3), halves=True),
      _chain(x, "Mixed_7a.branch7x7x3", *across, halves=True),
      _halved(x),
    )
    x = _forks(x, "Mixed_7b", _mean)
    # The graph of 2015 takes the maximum here, and here alone.
    x = _forks(x, "Mixed_7c", lambda x: nn.max_pool(x, (3, 3), padding="SAME"))
    return x.mean((1, 2))


def _conv(x, name, features, size, stride=1, padding=None):
  size = (size, size) if isinstance(size, int) else size
  padding = padding or ("SAME" if stride == 1 else "VALID")
  return ConvNorm(features, size, stride, padding, name=name)(x)


def _chain(x, name, *layers, halves=False):
  """Layers (features, size), numbered from 1 where there are several; the last one may halve."""
  for i, (features, size) in enumerate(layers, 1):
    number = f"_{i}" if len(layers) > 1 else ""
    x = _conv(x, name + number, features, size, 2 if halves and i == len(layers) else 1)
  return x


def _halved(x):
  return nn.max_pool(x, (3, 3), strides=(2, 2))


# Pixels beyond the edge do not count.
_mean = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)


def _join(*branches):
  return jnp.concatenate(branches, axis=-1)


def _fives(x, name, pooled):
  return _join(
    _chain(x, f"{name}.branch1x1", (64, 1)),
    _chain(x, f"{name}.branch5x5", (48, 1), (64, 5)),
    _chain(x, f"{name}.branch3x3dbl", (64, 1), (96, 3), (96, 3)),
    _chain(_mean(x), f"{name}.branch_pool", (pooled, 1)),
  )


def _sevens(x, name, width):
  doubled = [(width, 1), (width, _STAND), (width, _LIE), (width, _STAND), (192, _LIE)]
  return _join(
    _chain(x, f"{name}.branch1x1", (192, 1)),
    _chain(x, f"{name}.branch7x7", (width, 1), (width, _LIE), (192, _STAND)),
    _chain(x, f"{name}.branch7x7dbl", *doubled),
    _chain(_mean(x), f"{name}.branch_pool", (192, 1)),
  )


def _forks(x, name, pool):
  fork = lambda h, branch: _join(
    _conv(h, f"{name}.{branch}a", 384, (1, 3)), _conv(h, f"{name}.{branch}b", 384, (3, 1))
  )
  return _join(
    _chain(x, f"{name}.branch1x1", (320, 1)),
    fork(_conv(x, f"{name}.branch3x3_1", 384, 1), "branch3x3_2"),
    fork(_chain(x, f"{name}.branch3x3dbl", (448, 1), (384, 3)), "branch3x3dbl_3"),
    _chain(pool(x), f"{name}.branch_pool", (192, 1)),
  )


@functools.cache
def shapes() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """What `Inception` has as parameters, by layer."""
  image = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.uint8)
  return jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]


def read(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
  """Parameters of `Inception` from the arrays of pt_inception-2015-12-05, by its names.

  The classifier and the counters of batches are left out.

  Raises:
    ValueError: an array is missing, has another shape, or is none of that network.
  """
  left = {
    name: array
    for name, array in arrays.items()
    if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
  }
  params = {}
  for layer, shape in shapes().items():
    height, width, inputs, outputs = shape["kernel"].shape
    wanted = {f"{layer}.conv.weight": (outputs, inputs, height, width)}
    wanted |= {f"{layer}.{leaf}": (outputs,) for leaf in _NORM}
    for name, expected in wanted.items():
      found = left[name].shape if name in left else None
      if found != expected:
        raise ValueError(
          f"the weights are not those of pt_inception-2015-12-05: {name} "
          + (f"has shape {found}, not {expected}" if found else "is missing")
        )
    kernel, weight, bias, mean, variance = (left.pop(name).astype(np.float32) for name in wanted)
    scale = weight / np.sqrt(variance + _EPSILON)
    params[layer] = {
      "kernel": kernel.transpose(2, 3, 1, 0),
      "scale": scale,
      "shift": bias - mean * scale,
    }
  if left:
    raise ValueError(f"the weights are not those of pt_inception-2015-12-05: {min(left)} is extra")
  return params
