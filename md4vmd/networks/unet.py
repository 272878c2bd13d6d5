"""Denoisers of images: residual blocks at one resolution with skips across (MD4, 2406.04329)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from md4vmd.networks import conv, layers
from md4vmd.networks.conv_head import ConvPrediction
from md4vmd.networks.head import HeadPrediction, padded
from md4vmd.networks.stack import REMAT, stacked


class ImageTrunk(nn.Module):
  """Residual blocks down, a middle, and residual blocks up that also read those on the way down.

  Tokens are the values of the channels of the pixels, [B, L] with L = H W C in the order of
  (row, column, channel). The embeddings of a pixel's channels stand side by side.

  Attributes:
    vocab_size: V; the mask is id V.
    image_shape: (H, W, C).
    width: channels of the feature maps.
    depth: residual blocks on each side.
    heads: attention heads of the middle.
    time_conditioning: whether the network sees t.
    condition_width: features of the time and label embedding.
    embedding_width: features of a channel's embedding; `width` if None.
    patch: side of the squares of pixels that share one place of the feature maps.
    ordinal: adds a map of sinusoids of the value to its embedding, so that near values look alike.
    absolute_positions: adds a learned vector per pixel. Without it an all-masked image looks the
      same everywhere but near its border.
    conditioned_norms: the condition scales and shifts the norms; otherwise it is added in each
      block. A group norm of one channel per group (width 32 or less) cancels what is added.
    classes: number of labels of a class-conditional model; 0 for none.
    latent_width: Z, the width of the latent that joins the condition; 0 for none.
    dropout: rate in each residual block.
    dtype: "float32" or "bfloat16", of activations; norms and parameters are float32.
    remat: what the backward pass recomputes in each block: "none", "dots" (all but products) or
      "full".
  """

  vocab_size: int
  image_shape: tuple[int, int, int] | None
  width: int = 128
  depth: int = 32
  heads: int = 1
  time_conditioning: bool = True
  condition_width: int = 128
  embedding_width: int | None = None
  patch: int = 1
  ordinal: bool = False
  absolute_positions: bool = False
  conditioned_norms: bool = False
  classes: int = 0
  latent_width: int = 0
  dropout: float = 0.0
  dtype: str = "float32"
  remat: str = "none"

  # What it shares with the transformer: every token sees all others.
  attends: ClassVar[str] = "all"
  block_size: ClassVar[None] = None

  def __post_init__(self):
    if self.image_shape is None:
      raise ValueError(
        "network 'unet' and 'uvit' read images and this data has none; set network.name=transformer"
      )
    height, width, _ = self.image_shape
    rules = [
      (
        self.patch >= 1 and height % self.patch == width % self.patch == 0,
        f"patch {self.patch} must divide images of {height} x {width}",
      ),
      (self.width >= 1, f"width {self.width} must be at least 1"),
      (self.depth >= 1, f"depth {self.depth} must be at least 1"),
      (
        self.heads >= 1 and self._middle_width % self.heads == 0,
        f"heads {self.heads} must divide the features of the middle, {self._middle_width}",
      ),
      (
        self.condition_width % 2 == 0 and self.condition_width >= 4,
        f"condition_width {self.condition_width} must be even and at least 4",
      ),
      (0 <= self.dropout < 1, f"dropout {self.dropout} must be in [0, 1)"),
      (self.dtype in ("float32", "bfloat16"), f"dtype '{self.dtype}' must be float32 or bfloat16"),
      (self.remat in REMAT, f"remat '{self.remat}' must be one of {', '.join(REMAT)}"),
    ]
    for holds, message in rules:
      if not holds:
        raise ValueError(f"network {message}")
    super().__post_init__()

  @property
  def _middle_width(self) -> int:
    return self.width

  @property
  def _grid(self) -> tuple[int, int, int]:
    """(rows, columns, tokens of a place) of the feature maps."""
    height, width, channels = self.image_shape or (0, 0, 0)
    return height // self.patch, width // self.patch, channels * self.patch**2

  def features(
    self,
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None,
    *,
    label_B: jax.Array | None,
    latent_BxGxZ: jax.Array | None,
    deterministic: bool,
    marked_BxL: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """(features before their last norm, [B, H, W, width]; the condition, [B, C]).

    Args:
      zt_BxL: ids in [0, V].
      t_BxG: a time for one group.
      label_B: classes.
      latent_BxGxZ: a latent for one group; 0 where none is given.
      deterministic: no dropout.
      marked_BxL: tokens that are told apart.

    Raises:
      ValueError: the network needs an input that is missing, or tokens are no such images.
    """
    if latent_BxGxZ is None and self.latent_width:
      latent_BxGxZ = jnp.zeros((zt_BxL.shape[0], 1, self.latent_width))
    condition_BxGxC = layers.condition(self, zt_BxL, t_BxG, label_B, latent_BxGxZ)
    condition_BxC = None if condition_BxGxC is None else condition_BxGxC[:, 0]
    h = self._enter(zt_BxL, marked_BxL)
    deepest, skips = self._side("down", h, None, condition_BxC, deterministic)
    h = self._middle(deepest, condition_BxC, deterministic)
    # Not in the stack, for its skip is not in that of the others, and adding it would copy them.
    h = jnp.concatenate([h, deepest], axis=-1)
    h = self._block("up_first", self.remat)(h, condition_BxC, deterministic)
    h, _ = self._side("up", h, skips, condition_BxC, deterministic)
    return h, condition_BxC

  def _enter(self, zt_BxL, marked_BxL):
    """The feature map [B, H, W, width] of the tokens."""
    dtype = jnp.dtype(self.dtype)
    if zt_BxL.shape[1] != math.prod(self._grid):
      raise ValueError(
        f"{zt_BxL.shape[1]} tokens are no image of {self.image_shape} (height, width, channels)"
      )
    table_PxE = self._table()
    height, width, _ = self._grid
    h_BxLxE = jnp.take(table_PxE, zt_BxL, axis=0).astype(dtype)
    h = self._to_grid(h_BxLxE)
    h = nn.with_logical_constraint(h, ("batch", None, None, None))
    h = conv.Conv(self.width, dtype=dtype, name="conv_in")(h)
    if marked_BxL is not None:
      marked = self._to_grid(marked_BxL[:, :, None].astype(dtype))
      h += layers.Dense(self.width, (None, None), dtype=dtype, name="mark")(marked)
    if self.absolute_positions:
      place_HxWxD = layers.parameter(
        self, "position", nn.initializers.normal(1.0), (None,) * 3, (height, width, self.width)
      )
      h += place_HxWxD.astype(dtype)[None]
    return h

  def _to_grid(self, x_BxLxE):
    """The features of the tokens of each place side by side, [B, rows, columns, tokens E]."""
    rows, columns, _ = self._grid
    side = self.patch
    x = x_BxLxE.reshape(x_BxLxE.shape[0], rows, side, columns, -1)
    return x.swapaxes(2, 3).reshape(x_BxLxE.shape[0], rows, columns, -1)

  def _from_grid(self, x_BxHxWxE):
    """The inverse of `_to_grid`, [B, L, E / tokens]."""
    rows, columns, tokens = self._grid
    side = self.patch
    x = x_BxHxWxE.reshape(x_BxHxWxE.shape[0], rows, columns, side, -1).swapaxes(2, 3)
    return x.reshape(x_BxHxWxE.shape[0], rows * columns * tokens, -1)

  def _table(self):
    """Embeddings of the ids, [P, E]."""
    features = self.embedding_width or self.width
    shape = (padded(self.vocab_size), features)
    init = nn.initializers.normal(1.0 / math.sqrt(features))
    table_PxE = layers.parameter(self, "embedding", init, ("vocab", None), shape)
    if not self.ordinal:
      return table_PxE
    maps = layers.Dense(features, (None, None), name="ordinal")
    return table_PxE + maps(intensities(self.vocab_size, shape[0]))

  def _block(self, name, remat):
    """A residual block, rematerialised as `remat` says."""
    cls: Any = conv.ResidualBlock
    if remat != "none":
      cls = nn.remat(cls, policy=REMAT[remat], static_argnums=(3,))
    return cls(self.width, self.conditioned_norms, self.dropout, jnp.dtype(self.dtype), name=name)

  def _side(self, name, h, skips, condition_BxC, deterministic):
    """(features after the blocks of a side, the skips that it leaves behind).

    Block i of the way up reads what entered block i of the way down, so the last one comes first.
    """
    run = stacked(_pass, self.depth, remat=self.remat, shared=2, reverse=skips is not None)
    return run(self._block(name, "none"), h, skips, condition_BxC, deterministic)

  def _middle(self, h, condition_BxC, deterministic):
    """Attention between all pixels, between two residual blocks."""
    h = self._block("middle_in", self.remat)(h, condition_BxC, deterministic)
    h = conv.PixelAttention(self.heads, jnp.dtype(self.dtype), name="middle_attention")(h)
    return self._block("middle_out", self.remat)(h, condition_BxC, deterministic)


class UNet(ImageTrunk):
  """mu(z_t, t) of MD4's CIFAR-10 denoiser.

  Attributes:
    head_width: None ends in a 3x3 convolution to V logits per channel, for a patch of 1. A number
      gives each token so many features and all of them one matrix to V logits, which is cheaper
      and is applied to masked tokens only.
  """

  head_width: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.patch > 1 and self.head_width is None:
      raise ValueError(
        f"network patch {self.patch} needs a head for every token; set network.head_width=32"
      )
    if self.head_width is not None and self.head_width < 1:
      raise ValueError(f"network head_width {self.head_width} must be at least 1")

  @nn.compact
  def __call__(
    self,
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None = None,
    *,
    label_B: jax.Array | None = None,
    latent_BxGxZ: jax.Array | None = None,
    deterministic: bool = True,
  ) -> ConvPrediction | HeadPrediction:
    """Predicts every token of zt_BxL; see `ImageTrunk.features` for the inputs."""
    h, condition_BxC = self.features(
      zt_BxL, t_BxG, label_B=label_B, latent_BxGxZ=latent_BxGxZ, deterministic=deterministic
    )
    norm = conv.GroupNorm(self.conditioned_norms, name="norm")
    hidden_BxHxWxD = nn.swish(norm(h, condition_BxC))
    tokens = self._grid[2]
    if self.head_width:
      split = layers.Dense(
        tokens * self.head_width,
        ("embed", None),
        use_bias=True,
        dtype=jnp.dtype(self.dtype),
        name="tokens",
      )
      shape = (self.head_width, padded(self.vocab_size))
      kernel_DxP = layers.parameter(
        self, "head", nn.initializers.normal(0.02), ("embed", "vocab"), shape
      )
      hidden_BxLxD = self._from_grid(split(hidden_BxHxWxD))
      return HeadPrediction(hidden_BxLxD, kernel_DxP, self.vocab_size)
    outputs = tokens * self.vocab_size
    shape, zeros = (3, 3, self.width, outputs), nn.initializers.zeros
    kernel = layers.parameter(self, "head", zeros, (None, None, "embed", None), shape)
    bias_CV = layers.parameter(self, "head_bias", zeros, (None,), (outputs,))
    return ConvPrediction(hidden_BxHxWxD, kernel, bias_CV, self.vocab_size)

  def with_latent(self, width: int, tokens: int) -> UNet:
    """The same network with a latent of this width, which joins the condition."""
    if tokens:
      raise ValueError(f"latent.tokens is {tokens}; the latent of a U-Net joins the time: set 0")
    return self.clone(latent_width=width, absolute_positions=True, parent=None)

  def reader(
    self, size: int, *, depth: int | None, width: int | None, heads: int | None
  ) -> ImageReader:
    """A U-Net that reads raw parameters off an image; its shape is this one's where None."""
    return ImageReader(
      vocab_size=self.vocab_size,
      image_shape=self.image_shape,
      width=width or self.width,
      depth=depth or self.depth,
      heads=heads or UNet.heads,
      time_conditioning=False,
      absolute_positions=self.absolute_positions,
      embedding_width=self.embedding_width,
      patch=self.patch,
      ordinal=self.ordinal,
      classes=self.classes,
      dtype=self.dtype,
      remat=self.remat,
      size=size,
      parent=None,
    )


class UViT(UNet):
  """MD4's ImageNet 64x64 denoiser: the middle is a transformer over patches.

  Attributes:
    conditioned_norms: as of `ImageTrunk`.
    heads: attention heads of the transformer.
    middle_width: its features.
    middle_depth: its blocks.
    middle_patch: side of its patches, in places of the feature maps.
  """

  conditioned_norms: bool = True
  heads: int = 12
  middle_width: int = 768
  middle_depth: int = 12
  middle_patch: int = 2

  def __post_init__(self):
    super().__post_init__()
    rows, columns, _ = self._grid
    side = self.middle_patch
    if side < 1 or rows % side or columns % side or self.middle_depth < 1:
      raise ValueError(
        f"network middle_patch {side} must divide feature maps of {rows} x {columns} and "
        f"middle_depth {self.middle_depth} must be at least 1"
      )

  @property
  def _middle_width(self) -> int:
    return self.middle_width

  def _middle(self, h, condition_BxC, deterministic):
    """A transformer over patches."""
    middle = conv.PatchTransformer(
      self.middle_width,
      self.middle_depth,
      self.heads,
      self.middle_patch,
      self.dropout,
      jnp.dtype(self.dtype),
      self.remat,
      name="middle",
    )
    return middle(h, condition_BxC, deterministic)


class ImageReader(ImageTrunk):
  """Raw parameters of a distribution, read off the mean features of an image.

  Attributes:
    size: numbers per image.
  """

  size: int = 0

  @nn.compact
  def __call__(
    self,
    zt_BxL: jax.Array,
    marked_BxL: jax.Array,
    groups: int,
    label_B: jax.Array | None = None,
  ) -> jax.Array:
    """raw_Bx1xS from tokens in [0, V], V where nothing is known; the marked ones are told apart."""
    assert groups == 1
    h, _ = self.features(
      zt_BxL, None, label_B=label_B, latent_BxGxZ=None, deterministic=True, marked_BxL=marked_BxL
    )
    # Before a group norm, which would take the brightness away.
    mean_BxD = layers.normalise(h.astype(jnp.float32).mean((1, 2)))
    raw = layers.Dense(self.size, ("embed", None), use_bias=True, name="raw")
    return raw(mean_BxD)[:, None, :]


def _pass(block, h, skip, condition_BxC, deterministic):
  """(the block's output, what entered it: a skip, on the way down where it is given none)."""
  left, h = (h, h) if skip is None else (None, jnp.concatenate([h, skip], axis=-1))
  h = layers.constrain(block(h, condition_BxC, deterministic), ("batch", None, None, None))
  return h, left


def intensities(vocab_size: int, rows: int) -> jax.Array:
  """Sinusoids of the value, 17 per id: its distance to the middle and 8 octaves; 0 from id V on."""
  value_P = jnp.arange(rows) / max(vocab_size - 1, 1)
  angle_Px8 = jnp.pi * value_P[:, None] * 2.0 ** jnp.arange(8)[None, :]
  parts = [2.0 * value_P[:, None] - 1.0, jnp.sin(angle_Px8), jnp.cos(angle_Px8)]
  return jnp.where(jnp.arange(rows)[:, None] < vocab_size, jnp.concatenate(parts, axis=-1), 0.0)
