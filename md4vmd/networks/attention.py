"""Attention by the kernels of a platform: XLA's, cuDNN's on NVIDIA, splash attention on TPU.

cuDNN and splash never hold the scores of all pairs of tokens, and splash skips the parts of a mask
where nothing is seen, such as half of the two streams of block diffusion. On CPUs "recompute" keeps
none for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from md4vmd import numerics
from md4vmd.networks.reach import Reach

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "recompute")
_TILE = 128  # tokens that splash reads at once are a multiple of it
_LARGEST_TILE = 512
# By the first word of a device's kind.
_OF_DEVICE = {"NVIDIA": "cudnn", "TPU": "splash", "cpu": "recompute"}
_AMPERE = 8.0
# Keys and values are of all tokens, so the axis that cuts sequences cuts heads here.
_SHARDS = (("data", "fsdp"), ("tensor", "sequence"))


def obstacle(kernel: str, *, dtype: Any, head_width: int, attends: str, length: int = 0) -> str:
  """Why a kernel cannot compute an attention, and what to set instead; "" where it can.

  Args:
    kernel: one of IMPLEMENTATIONS; "auto" and "xla" take everything.
    dtype: of queries, keys and values.
    head_width: features of a head.
    attends: what a token sees, one of `reach.ATTENDS`.
    length: tokens of the sequence, of both streams for blocks; 0 where it is not known yet.
  """
  rules = {
    "cudnn": [
      (
        jnp.dtype(dtype) == jnp.bfloat16,
        f"attention 'cudnn' computes in bfloat16 and dtype is {jnp.dtype(dtype)}; set bfloat16",
      ),
      (
        head_width % 8 == 0 and head_width <= 128,
        f"attention 'cudnn' takes heads of a multiple of 8 features, at most 128, and they have "
        f"{head_width} (width / heads); set attention 'xla'",
      ),
      (
        attends != "blocks",
        "attention 'cudnn' was never tried with the mask of blocks; set attention 'xla'",
      ),
      (
        length % 2 == 0,
        f"attention 'cudnn' takes an even number of tokens, not {length}; set attention 'xla'",
      ),
    ],
    "splash": [
      (
        length % _TILE == 0,
        f"attention 'splash' takes a multiple of {_TILE} tokens, not {length}; set attention 'xla'",
      ),
    ],
    "recompute": [
      (attends == "all", "attention 'recompute' takes no masks; set attention 'xla'"),
    ],
  }
  return next((message for holds, message in rules.get(kernel, []) if not holds), "")


def attend(
  query_BxNxHxE: jax.Array,
  key_BxMxHxE: jax.Array,
  value_BxMxHxE: jax.Array,
  reach: Reach,
  implementation: str,
) -> jax.Array:
  """softmax(query key / sqrt(E)) value over what each token sees: [B, N, H, E].

  Args:
    query_BxNxHxE: of N tokens, H heads of E features.
    key_BxMxHxE: of the M places that they may see; M = N but behind a cache.
    value_BxMxHxE: likewise.
    reach: what they see; behind a cache XLA computes it.
    implementation: one of IMPLEMENTATIONS. "auto" is the kernel of the devices of the mesh in use,
      where it takes such an input, else "xla". Off TPUs "splash" is interpreted, slowly.

  Raises:
    ValueError: the implementation does not take such an input.
  """
  kernel = _kernel(implementation, query_BxNxHxE, reach)
  if kernel == "splash":
    return _splash(query_BxNxHxE, key_BxMxHxE, value_BxMxHxE, reach)
  if kernel == "recompute":
    return _recompute(query_BxNxHxE, key_BxMxHxE, value_BxMxHxE)
  mask_NxM = reach.mask(query_BxNxHxE.shape[1])
  return jax.nn.dot_product_attention(
    query_BxNxHxE,
    key_BxMxHxE,
    value_BxMxHxE,
    mask=None if mask_NxM is None else mask_NxM[None, None],
    is_causal=reach.attends == "left",
    implementation=cast(Literal["xla", "cudnn"], kernel),
  )


def _kernel(implementation: str, query_BxNxHxE: jax.Array, reach: Reach) -> str:
  """The kernel that is used."""
  if reach.start is not None:
    return "xla"
  is_auto = implementation == "auto"
  kernel = _OF_DEVICE.get(_device(), "xla") if is_auto else implementation
  _, length, _, width = query_BxNxHxE.shape
  message = obstacle(
    kernel, dtype=query_BxNxHxE.dtype, head_width=width, attends=reach.attends, length=length
  )
  if message and not is_auto:
    raise ValueError(f"network {message}")
  return "xla" if message else kernel


def _device() -> str:
  """First word of the kind of the devices in use, "cpu", "NVIDIA" or "TPU"; "" before Ampere."""
  # The mesh may be one of devices that are not there, for which a program is compiled.
  device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
  kind = device.device_kind.split()[0]
  if kind == "NVIDIA" and float(getattr(device, "compute_capability", _AMPERE)) < _AMPERE:
    return ""  # cuDNN's fused attention is not for these
  return kind


def _splash(
  query_BxNxHxE: jax.Array, key_BxNxHxE: jax.Array, value_BxNxHxE: jax.Array, reach: Reach
) -> jax.Array:
  """Attention by jax.experimental.pallas.ops.tpu.splash_attention, each shard its rows, heads."""
  mesh = jax.sharding.get_abstract_mesh()
  is_interpreted = _device() != "TPU"
  scaled = query_BxNxHxE.astype(jnp.float32) / math.sqrt(query_BxNxHxE.shape[-1])
  heads_first = [
    x_BxNxHxE.swapaxes(1, 2)
    for x_BxNxHxE in (scaled.astype(query_BxNxHxE.dtype), key_BxNxHxE, value_BxNxHxE)
  ]

  def local(query_BxHxNxE, key_BxHxNxE, value_BxHxNxE):
    _, heads, length, _ = query_BxHxNxE.shape
    kernel = _splash_kernel(heads, length, reach, is_interpreted)
    return jax.vmap(kernel)(query_BxHxNxE, key_BxHxNxE, value_BxHxNxE)

  if not (mesh.empty or mesh.size == 1):
    spec: PartitionSpec = numerics.fitting(mesh, heads_first[0].shape, _SHARDS)
    local = jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)
  return local(*heads_first).swapaxes(1, 2)


def _splash_kernel(heads: int, length: int, reach: Reach, is_interpreted: bool) -> Any:
  """[H, N, E] of queries, keys and values -> [H, N, E]."""
  # Here, as most runs have no use for it and importing it takes a while.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  masks = {
    "all": lambda: splash.FullMask((length, length)),
    "left": lambda: splash.CausalMask((length, length)),
    "blocks": lambda: splash.NumpyMask(reach.mask(length)),
  }
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  tile = math.gcd(length, _LARGEST_TILE)
  return splash.make_splash_mha(
    splash.MultiHeadMask([masks[reach.attends]()] * heads),
    block_sizes=splash.BlockSizes(**dict.fromkeys(names, tile)),
    head_shards=1,
    q_seq_shards=1,
    interpret=is_interpreted,
  )


@jax.custom_vjp
def _recompute(query_BxNxHxE, key_BxNxHxE, value_BxNxHxE):
  """Attention whose backward pass computes the scores again, with the forward's normalisers."""
  return _recompute_forward(query_BxNxHxE, key_BxNxHxE, value_BxNxHxE)[0]


def _recompute_forward(query_BxNxHxE, key_BxNxHxE, value_BxNxHxE):
  scaled_BxNxHxE = query_BxNxHxE / math.sqrt(query_BxNxHxE.shape[-1])
  score_BxHxNxN = _pairs(scaled_BxNxHxE, key_BxNxHxE)
  largest_BxHxNx1 = score_BxHxNxN.max(-1, keepdims=True)
  share_BxHxNxN = jnp.exp(score_BxHxNxN - largest_BxHxNx1)  # not normalised
  sum_BxHxNx1 = share_BxHxNxN.sum(-1, keepdims=True)
  mixed_BxNxHxE = _mix(share_BxHxNxN, value_BxNxHxE) / sum_BxHxNx1.swapaxes(1, 2)
  mixed_BxNxHxE = mixed_BxNxHxE.astype(query_BxNxHxE.dtype)
  normaliser_BxHxNx1 = largest_BxHxNx1 + jnp.log(sum_BxHxNx1)
  kept = (scaled_BxNxHxE, key_BxNxHxE, value_BxNxHxE, mixed_BxNxHxE, normaliser_BxHxNx1)
  return mixed_BxNxHxE, kept


def _recompute_backward(kept, d_mixed_BxNxHxE):
  scaled_BxNxHxE, key_BxNxHxE, value_BxNxHxE, mixed_BxNxHxE, normaliser_BxHxNx1 = kept
  mean_BxNxHx1 = (d_mixed_BxNxHxE * mixed_BxNxHxE).sum(-1, keepdims=True)
  share_BxHxNxN = jnp.exp(_pairs(scaled_BxNxHxE, key_BxNxHxE) - normaliser_BxHxNx1)
  d_share_BxHxNxN = _pairs(d_mixed_BxNxHxE, value_BxNxHxE)
  d_score_BxHxNxN = share_BxHxNxN * (d_share_BxHxNxN - mean_BxNxHx1.swapaxes(1, 2))
  d_query_BxNxHxE = _mix(d_score_BxHxNxN, key_BxNxHxE) / math.sqrt(key_BxNxHxE.shape[-1])
  d_key_BxNxHxE = _mix(d_score_BxHxNxN.swapaxes(2, 3), scaled_BxNxHxE)
  d_value_BxNxHxE = _mix(share_BxHxNxN.swapaxes(2, 3), d_mixed_BxNxHxE)
  return tuple(
    d.astype(key_BxNxHxE.dtype) for d in (d_query_BxNxHxE, d_key_BxNxHxE, d_value_BxNxHxE)
  )


_recompute.defvjp(_recompute_forward, _recompute_backward)


def _pairs(left_BxNxHxE, right_BxMxHxE):
  """Products of all pairs of tokens of a head, [B, H, N, M] in `wide`."""
  wide = numerics.wide(left_BxNxHxE.dtype)
  left, right = left_BxNxHxE.swapaxes(1, 2), right_BxMxHxE.swapaxes(1, 2)
  return jnp.einsum("bhne,bhme->bhnm", left, right, preferred_element_type=wide)


def _mix(share_BxHxNxM, value_BxMxHxE):
  """Sums of values by their shares, [B, N, H, E] in `wide`."""
  shares = share_BxHxNxM.astype(value_BxMxHxE.dtype)
  mixed_BxHxNxE = jnp.einsum(
    "bhnm,bhme->bhne",
    shares,
    value_BxMxHxE.swapaxes(1, 2),
    preferred_element_type=share_BxHxNxM.dtype,
  )
  return mixed_BxHxNxE.swapaxes(1, 2)
