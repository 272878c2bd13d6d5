"""The transformer denoiser of MD4 (arXiv 2406.04329, appendix F), scanned over its layers."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from md4vmd.networks import layers
from md4vmd.networks.head import HeadPrediction, padded

REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
  """mu(z_t, t): a bidirectional transformer with rotary positions and adaptive normalisation.

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
    classes: number of labels of a class-conditional model; 0 for none.
    adaln_zero: the condition's maps start at 0, so that every block starts as the identity.
    dropout: rate on what each layer adds to the residual stream.
    dtype: "float32" or "bfloat16", the dtype of activations; parameters are float32.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
    attention: "xla" or "cudnn" (GPU, bfloat16).
  """

  vocab_size: int
  width: int = 256
  depth: int = 4
  heads: int = 4
  mlp: str = "swiglu"
  time_conditioning: bool = True
  condition_width: int = 128
  embedding_width: int | None = None
  classes: int = 0
  adaln_zero: bool = True
  dropout: float = 0.0
  dtype: str = "float32"
  remat: str = "none"
  attention: layers.Implementation = "xla"

  def __post_init__(self):
    rules = [
      (
        self.width % (2 * self.heads) == 0,
        f"width {self.width} must be a multiple of twice the heads ({self.heads})",
      ),
      (self.depth >= 1, f"depth {self.depth} must be at least 1"),
      (self.mlp in layers.GATES, f"mlp '{self.mlp}' must be one of {', '.join(layers.GATES)}"),
      (
        self.condition_width % 2 == 0 and self.condition_width >= 4,
        f"condition_width {self.condition_width} must be even and at least 4",
      ),
      (0 <= self.dropout < 1, f"dropout {self.dropout} must be in [0, 1)"),
      (self.dtype in ("float32", "bfloat16"), f"dtype '{self.dtype}' must be float32 or bfloat16"),
      (self.remat in REMAT, f"remat '{self.remat}' must be one of {', '.join(REMAT)}"),
      (
        self.attention in layers.IMPLEMENTATIONS,
        f"attention '{self.attention}' must be one of {', '.join(layers.IMPLEMENTATIONS)}",
      ),
    ]
    rules.append(
      (
        self.attention != "cudnn" or self.dtype == "bfloat16",
        f"attention 'cudnn' computes in bfloat16 and dtype is {self.dtype}; set bfloat16",
      )
    )
    for holds, message in rules:
      if not holds:
        raise ValueError(f"network {message}")
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None = None,
    *,
    label_B: jax.Array | None = None,
    deterministic: bool = True,
  ) -> HeadPrediction:
    """Predicts every token of zt_BxL, ids in [0, V]; t_BxG may be None without time conditioning.

    Raises:
      ValueError: the network needs t or a label that is missing, or has no use for a label.
    """
    dtype = jnp.dtype(self.dtype)
    condition_BxGxC = self._condition(t_BxG, label_B)
    x_BxLxD = self._embed(zt_BxL, dtype)

    policy = REMAT[self.remat]
    block = (
      layers.Block
      if policy is None
      else nn.remat(layers.Block, policy=policy, prevent_cse=False, static_argnums=(3,))
    )
    stack = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True, "dropout": True},
      in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
      length=self.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    modulation_scale = 0.0 if self.adaln_zero else 1.0
    x_BxLxD, _ = stack(
      heads=self.heads,
      gate=self.mlp,
      residual_scale=1 / math.sqrt(2 * self.depth),
      modulation_scale=modulation_scale,
      dropout=self.dropout,
      attention=self.attention,
      dtype=dtype,
      name="blocks",
    )(x_BxLxD, condition_BxGxC, deterministic)

    modulation = layers.Modulation(
      ("shift", "scale"), self.width, self.mlp, modulation_scale, dtype, name="modulation"
    )(condition_BxGxC, zt_BxL.shape[1])
    hidden_BxLxD = layers.modulate(x_BxLxD, **modulation)
    shape = (self.width, padded(self.vocab_size))
    init = nn.initializers.normal(0.02)
    kernel_DxP = layers.parameter(self, "head", init, ("embed", "vocab"), shape)
    return HeadPrediction(hidden_BxLxD, kernel_DxP, self.vocab_size)

  def _condition(self, t_BxG, label_B):
    if self.time_conditioning and t_BxG is None:
      raise ValueError("a network with time_conditioning needs the time t_BxG")
    if (label_B is not None) != bool(self.classes):
      raise ValueError(
        f"a network of {self.classes} classes got {'no labels' if label_B is None else 'labels'}"
      )
    condition_BxGxC = None
    if self.time_conditioning:
      condition_BxGxC = layers.TimeEmbedding(self.condition_width, name="time")(t_BxG)
    if self.classes:
      label_BxC = nn.Embed(self.classes, self.condition_width, name="label")(label_B)
      seen = 0.0 if condition_BxGxC is None else condition_BxGxC
      condition_BxGxC = seen + label_BxC[:, None, :]
    return condition_BxGxC

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
    return nn.with_logical_constraint(x_BxLxE, ("batch", "length", None))
