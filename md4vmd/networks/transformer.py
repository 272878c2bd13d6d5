"""The transformer of MD4 (arXiv 2406.04329, appendix F), scanned over its layers."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from md4vmd.networks import layers
from md4vmd.networks.attention import IMPLEMENTATIONS, obstacle
from md4vmd.networks.head import HeadPrediction, padded
from md4vmd.networks.reach import ATTENDS, Cache, Reach, behind, two_streams
from md4vmd.networks.stack import REMAT, stacked


class Trunk(nn.Module):
  """A transformer with rotary positions and adaptive normalisation, without a head.

  Parameters are the same whatever it attends to; only what tokens see differs.

  Attributes:
    vocab_size: V; the mask is id V.
    width: features of the residual stream.
    depth: number of blocks.
    heads: attention heads; they divide the width into even head widths.
    mlp: "glu" (sigmoid gate) or "swiglu".
    time_conditioning: whether the network sees t; without it the continuous-time bound does not
      depend on the schedule.
    condition_width: features of the time and label embedding.
    embedding_width: None embeds tokens at full width, else at this width with a map to `width`.
    absolute_positions: adds a learned vector per position. Rotary attention alone predicts the same
      at every position of an all-masked sequence, whatever the latent.
    classes: number of labels of a class-conditional model; 0 for none.
    latent_width: Z, the width of the latent that conditions the network; 0 for none.
    latent_tokens: 0 lets the latent enter through the condition, with the time; n > 0 as n tokens
      before the sequence, for one group.
    adaln_zero: the condition's maps start at 0, so that every block starts as the identity.
    open_gates: the gates of conditioned blocks start at 1, so that only the condition's influence
      starts at 0.
    dropout: rate on what each layer adds to the residual stream.
    dtype: "float32" or "bfloat16", the dtype of activations; parameters are float32.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
    attention: whose kernel computes attention: "xla"; "cudnn" (NVIDIA, bfloat16); "splash" (TPU,
      multiples of 128 tokens); "recompute" (CPU, "all" alone), whose backward pass computes the
      scores again; or "auto", the platform's own where it takes the input, else "xla".
    attends: what a token sees: "all" tokens; those to the "left" and itself; or "blocks", the
      noisy tokens of its own block and the clean ones of the blocks before it.
    block_size: tokens of a block, for "blocks" alone.
  """

  vocab_size: int
  width: int = 256
  depth: int = 4
  heads: int = 4
  mlp: str = "swiglu"
  time_conditioning: bool = True
  condition_width: int = 128
  embedding_width: int | None = None
  absolute_positions: bool = False
  classes: int = 0
  latent_width: int = 0
  latent_tokens: int = 0
  adaln_zero: bool = True
  open_gates: bool = False
  dropout: float = 0.0
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  attends: str = "all"
  block_size: int | None = None

  def __post_init__(self):
    rules = [
      (
        min(self.width, self.heads) >= 1 and self.width % (2 * self.heads) == 0,
        f"width {self.width} must be a multiple of twice the heads ({self.heads}), both at least 1",
      ),
      (self.depth >= 1, f"depth {self.depth} must be at least 1"),
      (self.mlp in layers.GATES, f"mlp '{self.mlp}' must be one of {', '.join(layers.GATES)}"),
      (
        self.condition_width % 2 == 0 and self.condition_width >= 4,
        f"condition_width {self.condition_width} must be even and at least 4",
      ),
      (0 <= self.dropout < 1, f"dropout {self.dropout} must be in [0, 1)"),
      (self.dtype in ("float32", "bfloat16"), f"dtype '{self.dtype}' must be float32 or bfloat16"),
      (
        self.latent_tokens >= 0 and (self.latent_width > 0 or self.latent_tokens == 0),
        f"latent_tokens {self.latent_tokens} must be 0 where there is no latent, and not negative",
      ),
      (
        self.remat in REMAT,
        f"remat '{self.remat}' must be one of {', '.join(REMAT)}",
      ),
      (
        self.attention in IMPLEMENTATIONS,
        f"attention '{self.attention}' must be one of {', '.join(IMPLEMENTATIONS)}",
      ),
    ]
    rules += [
      (self.attends in ATTENDS, f"attends '{self.attends}' must be one of {', '.join(ATTENDS)}"),
      (
        (self.block_size or 0) >= 1 if self.attends == "blocks" else self.block_size is None,
        f"block_size {self.block_size} must be at least 1 where it attends to blocks, and None "
        f"where it attends to '{self.attends}'",
      ),
      (
        self.attends == "all" or self.latent_tokens == 0,
        f"latent_tokens {self.latent_tokens} must be 0 where it attends to '{self.attends}'",
      ),
      (
        self.attends != "left" or self.latent_width == 0,
        f"latent_width {self.latent_width} must be 0 where it attends to the left",
      ),
    ]
    for holds, message in rules:
      if not holds:
        raise ValueError(f"network {message}")
    message = obstacle(
      self.attention,
      dtype=self.dtype,
      head_width=self.width // self.heads,
      attends=self.attends,
    )
    if message:
      raise ValueError(f"network {message}")
    super().__post_init__()

  def hidden(
    self,
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None,
    *,
    label_B: jax.Array | None,
    latent_BxGxZ: jax.Array | None,
    deterministic: bool,
    marked_BxL: jax.Array | None = None,
    clean_BxL: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """(normalised features hidden_BxLxD, the cache with these tokens if one is given).

    Args:
      zt_BxL: ids in [0, V].
      t_BxG: a time per group.
      label_B: classes.
      latent_BxGxZ: a latent per group.
      deterministic: no dropout.
      marked_BxL: tokens that are told apart.
      clean_BxL: the clean tokens, where the network attends to blocks.
      cache: of the tokens before zt_BxL, which then stand behind them.

    Raises:
      ValueError: the network needs an input that is missing, or has no use for one.
    """
    dtype = jnp.dtype(self.dtype)
    reach = self._reach(zt_BxL, clean_BxL, cache)
    latent_BxGxZ = self._latent(zt_BxL, latent_BxGxZ)
    if clean_BxL is None:
      tokens_BxN = zt_BxL
    else:
      tokens_BxN = jnp.concatenate([zt_BxL, clean_BxL], axis=1)
      groups = zt_BxL.shape[1] // (self.block_size or 1)
      t_BxG, latent_BxGxZ = (_then_zeros(each, groups) for each in (t_BxG, latent_BxGxZ))
    entering = None if self.latent_tokens else latent_BxGxZ
    condition_BxGxC = layers.condition(self, tokens_BxN, t_BxG, label_B, entering)
    x_BxLxD = self._embed(tokens_BxN, dtype)
    if self.absolute_positions:
      x_BxLxD += self._positions(zt_BxL.shape[1], reach, cache).astype(dtype)[None]
    if marked_BxL is not None:
      x_BxLxD += nn.Embed(2, self.width, dtype=dtype, name="mark")(marked_BxL.astype(jnp.int32))
    if self.latent_tokens:
      x_BxLxD = self._prepend(latent_BxGxZ, x_BxLxD)

    modulation_scale = 0.0 if self.adaln_zero else 1.0
    cached = None if cache is None else (cache.key_JxBxMxHxE, cache.value_JxBxMxHxE)
    # Each block gets its slice of what is cached.
    x_BxLxD, new = stacked(layers.Block, self.depth, remat=self.remat, shared=3)(
      heads=self.heads,
      gate=self.mlp,
      residual_scale=1 / math.sqrt(2 * self.depth),
      modulation_scale=modulation_scale,
      open_gates=self.open_gates,
      dropout=self.dropout,
      attention=self.attention,
      dtype=dtype,
      name="blocks",
    )(x_BxLxD, cached, condition_BxGxC, reach, deterministic)
    x_BxLxD = x_BxLxD[:, self.latent_tokens :]
    if clean_BxL is not None:
      x_BxLxD = x_BxLxD[:, : zt_BxL.shape[1]]
      condition_BxGxC = None if condition_BxGxC is None else condition_BxGxC[:, :groups]

    modulation = layers.Modulation(
      ("shift", "scale"),
      self.width,
      self.mlp,
      modulation_scale,
      dtype=dtype,
      name="modulation",
    )(condition_BxGxC, zt_BxL.shape[1])
    hidden_BxLxD = layers.modulate(x_BxLxD, **modulation)
    return hidden_BxLxD, cache if cache is None or new is None else cache.extended(*new)

  def empty_cache(self, batch: int, length: int) -> Cache:
    """A cache with room for sequences of this length."""
    shape = (self.depth, batch, length, self.heads, self.width // self.heads)
    empty = layers.constrain(
      jnp.zeros(shape, self.dtype), ("layers", "batch", "length", None, None)
    )
    return Cache(empty, empty, jnp.zeros((), jnp.int32))

  def _reach(self, zt_BxL, clean_BxL, cache):
    """What the tokens see, once the inputs are found to fit."""
    uses = {"all": (), "left": ("cache",), "blocks": ("clean_BxL", "cache")}[self.attends]
    for name, given in {"clean_BxL": clean_BxL, "cache": cache}.items():
      if given is not None and name not in uses:
        raise ValueError(f"a network that attends to '{self.attends}' has no use for {name}")
    if cache is not None:
      return behind(cache, zt_BxL.shape[1], is_causal=self.attends == "left")
    if clean_BxL is not None:
      assert self.block_size is not None
      return two_streams(zt_BxL.shape[1], self.block_size)
    if self.attends == "blocks" and not self.is_initializing():
      raise ValueError("a network that attends to blocks needs clean_BxL or a cache")
    return Reach(attends="left" if self.attends == "left" else "all")

  def _positions(self, length, reach, cache):
    """A learned vector for the position of every token; a cache has room for all positions."""
    shape = (length if cache is None else cache.key_JxBxMxHxE.shape[2], self.width)
    position_LxD = layers.parameter(
      self, "position", nn.initializers.normal(1.0), (None, None), shape
    )
    return position_LxD if reach.position_N is None else position_LxD[reach.position_N]

  def _latent(self, zt_BxL, latent_BxGxZ):
    """The latent, 0 where none is given: the network with its latent switched off."""
    if latent_BxGxZ is None and self.latent_width:
      return jnp.zeros((zt_BxL.shape[0], 1, self.latent_width))
    if latent_BxGxZ is not None and latent_BxGxZ.shape[-1] != self.latent_width:
      raise ValueError(
        f"a network of latent_width {self.latent_width} got a latent of {latent_BxGxZ.shape[-1]}"
      )
    return latent_BxGxZ

  def _prepend(self, latent_BxGxZ, x_BxLxD):
    if latent_BxGxZ.shape[1] != 1:
      raise ValueError("latent_tokens serve one group; let the latents of groups enter by adaLN")
    tokens_Bx1xKD = layers.Dense(
      self.latent_tokens * self.width, (None, "embed"), use_bias=True, name="latent_tokens_map"
    )(latent_BxGxZ)
    tokens_BxKxD = tokens_Bx1xKD.reshape(x_BxLxD.shape[0], self.latent_tokens, self.width)
    return jnp.concatenate([tokens_BxKxD.astype(x_BxLxD.dtype), x_BxLxD], axis=1)

  def _embed(self, zt_BxL, dtype):
    width = self.embedding_width or self.width
    shape = (padded(self.vocab_size), width)
    init = nn.initializers.normal(1.0)
    table_PxE = layers.parameter(self, "embedding", init, ("vocab", None), shape)
    x_BxLxE = jnp.take(table_PxE, zt_BxL, axis=0).astype(dtype)
    if self.embedding_width:
      x_BxLxE = layers.Dense(
        self.width, (None, "embed"), use_bias=True, dtype=dtype, name="embedding_map"
      )(x_BxLxE)
    return layers.constrain(x_BxLxE, ("batch", "length", None))


class Transformer(Trunk):
  """mu(z_t, t): the denoiser, a trunk whose head is one matrix; attributes as of `Trunk`."""

  @nn.compact
  def __call__(
    self,
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None = None,
    *,
    label_B: jax.Array | None = None,
    latent_BxGxZ: jax.Array | None = None,
    deterministic: bool = True,
    clean_BxL: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> HeadPrediction | tuple[HeadPrediction, Cache]:
    """Predicts every token of zt_BxL; see `Trunk.hidden` for the inputs.

    With a cache it returns the cache that holds zt_BxL too.
    """
    hidden_BxLxD, extended = self.hidden(
      zt_BxL,
      t_BxG,
      label_B=label_B,
      latent_BxGxZ=latent_BxGxZ,
      deterministic=deterministic,
      clean_BxL=clean_BxL,
      cache=cache,
    )
    shape = (self.width, padded(self.vocab_size))
    init = nn.initializers.normal(0.02)
    kernel_DxP = layers.parameter(self, "head", init, ("embed", "vocab"), shape)
    prediction = HeadPrediction(hidden_BxLxD, kernel_DxP, self.vocab_size)
    return prediction if extended is None else (prediction, extended)

  def with_latent(self, width: int, tokens: int) -> Transformer:
    """The same network with a latent of this width, which joins the condition or is tokens."""
    return self.clone(
      latent_width=width, latent_tokens=tokens, absolute_positions=True, parent=None
    )

  def reader(self, size: int, *, depth: int | None, width: int | None, heads: int | None) -> Reader:
    """A network of the same kind that reads raw parameters; its shape is this one's where None."""
    return Reader(
      vocab_size=self.vocab_size,
      width=width or self.width,
      depth=depth or self.depth,
      heads=heads or self.heads,
      mlp=self.mlp,
      time_conditioning=False,
      absolute_positions=self.absolute_positions,
      classes=self.classes,
      dtype=self.dtype,
      remat=self.remat,
      attention=self.attention,
      size=size,
      parent=None,
    )


class Reader(Trunk):
  """Raw parameters of a distribution per group, read off the mean features of its tokens.

  Attributes:
    size: numbers per group; they start at 0.
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
    """raw_BxGxS from tokens in [0, V], V where nothing is known; the marked ones are told apart."""
    hidden_BxLxD, _ = self.hidden(
      zt_BxL, None, label_B=label_B, latent_BxGxZ=None, deterministic=True, marked_BxL=marked_BxL
    )
    mean_BxGxD = hidden_BxLxD.reshape(zt_BxL.shape[0], groups, -1, self.width).mean(2)
    raw = layers.Dense(self.size, ("embed", None), use_bias=True, name="raw")
    return raw(mean_BxGxD.astype(jnp.float32))


def _then_zeros(values: jax.Array | None, groups: int) -> jax.Array | None:
  """[B, G or 1, ...] as [B, 2G, ...]: the values of the noisy groups, and 0 for the clean ones."""
  if values is None:
    return None
  noisy = jnp.broadcast_to(values, (values.shape[0], groups, *values.shape[2:]))
  return jnp.concatenate([noisy, jnp.zeros_like(noisy)], axis=1)
