"""Where the parameters of MD4's image denoisers stand in our U-Net and U-ViT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from md4vmd.networks.head import padded

ROOT = "UNet5DWrapper_0/UNet_0/"
_ATTENTION = "SelfAttention_0/MultiHeadDotProductAttention_0/"
TIME = {
  "CondEmbedding_0/dense0/kernel": ("time", "up", "kernel"),
  "CondEmbedding_0/dense0/bias": ("time", "up", "bias"),
  "CondEmbedding_0/Dense_0/kernel": ("time", "down", "kernel"),
  "CondEmbedding_0/Dense_0/bias": ("time", "down", "bias"),
}
Path = tuple[str, ...]


def architecture(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Keys of the network section that a flat tree determines by its shapes and by what it lacks.

  Raises:
    KeyError: the tree lacks a leaf.
    ValueError: a U-Net without a block down, or a head that is not of whole vocabularies.
  """
  width = flat[f"{ROOT}Conv_0/kernel"].shape[3]
  vocab_size, embedding = flat["Embed_0/embedding"].shape
  is_uvit = any(key.startswith(f"{ROOT}DiT_0/") for key in flat)
  blocks = len({key.split("/")[2] for key in flat if key.startswith(f"{ROOT}ResBlock_")})
  found = {
    "name": "uvit" if is_uvit else "unet",
    "vocab_size": vocab_size - 1,
    "width": width,
    "depth": (blocks - (1 if is_uvit else 3)) // 2,
    "condition_width": flat["CondEmbedding_0/Dense_0/kernel"].shape[1],
    "embedding_width": None if embedding == width else embedding,
    "conditioned_norms": f"{ROOT}CondGroupNorm_0/Dense_0/kernel" in flat,
    "time_conditioning": True,
    # What MD4's denoisers do not have.
    "ordinal": False,
    "absolute_positions": False,
    "patch": 1,
    "head_width": None,
  }
  outputs = flat[f"{ROOT}Conv_1/kernel"].shape[3]
  if found["depth"] < 1 or outputs % found["vocab_size"]:
    raise ValueError(
      f"the tree is no MD4 image denoiser: it has {blocks} residual blocks and {outputs} outputs "
      f"for {found['vocab_size']} tokens"
    )
  if is_uvit:
    dit = f"{ROOT}DiT_0/"
    patch = flat[f"{dit}x_embedder/proj/kernel"].shape
    found["middle_depth"] = len({key.split("/")[3] for key in flat if f"{dit}blocks_" in key})
    found |= {"middle_width": patch[3], "middle_patch": patch[0]}
  else:
    found["heads"] = flat[f"{ROOT}{_ATTENTION}query/kernel"].shape[1]
  return found


def read(flat: dict[str, np.ndarray], found: Mapping[str, Any]) -> dict[str, Any]:
  """Our parameters; what is read is taken out of `flat`. Raises KeyError on a missing leaf."""
  params: dict[str, Any] = {}
  table = flat.pop("Embed_0/embedding")
  params["embedding"] = np.pad(table, ((0, padded(found["vocab_size"]) - len(table)), (0, 0)))
  for source, target in TIME.items():
    put(params, target, flat.pop(source))
  for source, target in _places(found):
    leaf = flat.pop(ROOT + source)
    shape = _flat_heads(source, leaf)
    put(params, target, leaf.reshape(shape).astype(np.float32))
  # Their blocks up are numbered in the order in which they run, from the deepest skip.
  depth = found["depth"]
  _stack(params, "down", [f"down_{i}" for i in range(depth)])
  _stack(params, "up", [f"up_{i}" for i in reversed(range(1, depth + 1))])
  params["up_first"] = params.pop("up_0")
  if found["name"] == "uvit":
    names = [f"block_{i}" for i in range(found["middle_depth"])]
    _stack(params["middle"], "blocks", names)
  return params


def _stack(params: dict[str, Any], name: str, blocks: list[str]) -> None:
  """Puts the stack of these blocks in their place."""
  params[name] = jax.tree.map(lambda *leaves: np.stack(leaves), *map(params.pop, blocks))


def _places(found: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
  """(leaf below ROOT, path in our tree) of all that the U-Net itself holds, block by block."""
  depth, by_condition = found["depth"], found["conditioned_norms"]
  yield from _dense("Conv_0", ("conv_in",))
  yield "Conv_1/kernel", ("head",)
  yield "Conv_1/bias", ("head_bias",)
  yield from _norm("", 0, ("norm",), by_condition)
  middle = [] if found["name"] == "uvit" else ["middle_in", "middle_out"]
  names = [f"down_{i}" for i in range(depth)] + middle + [f"up_{i}" for i in range(depth + 1)]
  for number, name in enumerate(names):
    yield from _block(f"ResBlock_{number}/", name, by_condition)
  if found["name"] == "uvit":
    yield from _patches(found["middle_depth"])
    return
  source, target = "SelfAttention_0/", ("middle_attention",)
  yield from _norm(source, 0, (*target, "norm"), by_condition=False)
  for part in ("query", "key", "value", "out"):
    yield from _dense(f"{_ATTENTION}{part}", (*target, "attention", part))


def _block(source: str, name: str, by_condition: bool) -> Iterator[tuple[str, Path]]:
  for i, side in enumerate(("in", "out")):
    yield from _norm(source, i, (name, f"norm_{side}"), by_condition)
    yield from _dense(f"{source}Conv_{i}", (name, f"conv_{side}"))
  if not by_condition:
    yield f"{source}Dense_0/kernel", (name, "condition", "kernel")
  if name.startswith("up_"):
    yield from _dense(f"{source}Dense_{int(not by_condition)}", (name, "skip"))


def _patches(depth: int) -> Iterator[tuple[str, Path]]:
  yield from _dense("DiT_0/x_embedder/proj", ("middle", "embed"))
  yield "DiT_0/pos_embed", ("middle", "position")
  yield from _dense("DiT_0/final_layer/Dense_0", ("middle", "modulation", "dense"))
  yield from _dense("DiT_0/final_layer/linear", ("middle", "out"))
  for i in range(depth):
    source, target = f"DiT_0/blocks_{i}/", ("middle", f"block_{i}")
    yield from _dense(f"{source}Dense_0", (*target, "modulation", "dense"))
    for theirs, ours in {"q": "query", "k": "key", "v": "value"}.items():
      yield from _dense(f"{source}attn/w{theirs}", (*target, "attention", ours))
    yield f"{source}attn/wo/kernel", (*target, "attention", "out", "kernel")
    yield from _dense(f"{source}mlp/fc1", (*target, "up"))
    yield from _dense(f"{source}mlp/fc2", (*target, "down"))


def _dense(source: str, target: Path) -> Iterator[tuple[str, Path]]:
  for leaf in ("kernel", "bias"):
    yield f"{source}/{leaf}", (*target, leaf)


def _norm(source: str, number: int, target: Path, by_condition: bool) -> Iterator[tuple[str, Path]]:
  if by_condition:
    yield from _dense(f"{source}CondGroupNorm_{number}/Dense_0", (*target, "dense"))
  else:
    for leaf in ("scale", "bias"):
      yield f"{source}GroupNorm_{number}/{leaf}", (*target, leaf)


def _flat_heads(source: str, leaf: np.ndarray) -> tuple[int, ...]:
  """The leaf's shape, heads and their features being one axis in ours."""
  if "MultiHeadDotProductAttention" not in source:
    return leaf.shape
  if source.endswith("out/kernel"):
    return (math.prod(leaf.shape[:2]), leaf.shape[2])
  return (*leaf.shape[:-2], math.prod(leaf.shape[-2:]))


def put(params: dict[str, Any], path: Path, value: np.ndarray) -> None:
  """Stores a leaf of a nested dict."""
  for key in path[:-1]:
    params = params.setdefault(key, {})
  params[path[-1]] = value
