"""Reads parameters of the public MD4 implementation into our transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from md4vmd.networks.head import padded

_BLOCK = {
  "attention/wq/kernel": ("attention", "query", "kernel"),
  "attention/wk/kernel": ("attention", "key", "kernel"),
  "attention/wv/kernel": ("attention", "value", "kernel"),
  "attention/wo/kernel": ("attention", "out", "kernel"),
  "feed_forward/w1/kernel": ("mlp", "gate", "kernel"),
  "feed_forward/w3/kernel": ("mlp", "up", "kernel"),
  "feed_forward/w2/kernel": ("mlp", "down", "kernel"),
  "Dense_0/kernel": ("modulation", "dense", "kernel"),
  "Dense_0/bias": ("modulation", "dense", "bias"),
}
_TIME = {
  "CondEmbedding_0/dense0/kernel": ("time", "up", "kernel"),
  "CondEmbedding_0/dense0/bias": ("time", "up", "bias"),
  "CondEmbedding_0/Dense_0/kernel": ("time", "down", "kernel"),
  "CondEmbedding_0/Dense_0/bias": ("time", "down", "bias"),
}


def import_md4(tree: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of `networks.Transformer` that compute what MD4's text denoiser computes.

  Args:
    tree: MD4's parameters, nested or with keys joined by "/", with or without a leading
      "params". Leaves are arrays.
    config: the network section that describes the same architecture, or a config that holds it
      as `network`. Of its keys width, depth, condition_width, embedding_width and vocab_size
      are checked against the tree where they are present.

  Returns:
    A nested dict of numpy arrays; layers are stacked and the vocabulary is padded.

  Raises:
    ValueError: the tree is no MD4 text denoiser or contradicts the config.
  """
  flat = {key.removeprefix("params/"): np.asarray(leaf) for key, leaf in _flatten(tree)}
  found = architecture(flat)
  section = dict(config.get("network", config))
  for key, value in found.items():
    if section.get(key, value) != value:
      raise ValueError(
        f"network.{key} is {section[key]} in the config and {value} in the MD4 "
        f"parameters; set network.{key}={value}"
      )

  params: dict[str, Any] = {}
  dense = iter(f"Transformer_0/Dense_{i}" for i in range(3))
  rows = padded(found["vocab_size"])
  if found["embedding_width"] is None:
    embedding = _take(flat, "Transformer_0/Embed_0/embedding")
  else:
    embedding = _take(flat, "Embed_0/embedding")
    name = next(dense)
    for leaf in ("kernel", "bias"):
      _put(params, ("embedding_map", leaf), _take(flat, f"{name}/{leaf}"))
  params["embedding"] = np.pad(embedding, ((0, rows - len(embedding)), (0, 0)))
  name = next(dense)
  for leaf in ("kernel", "bias"):
    _put(params, ("modulation", "dense", leaf), _take(flat, f"{name}/{leaf}"))
  head = _take(flat, f"{next(dense)}/kernel")
  params["head"] = np.pad(head, ((0, 0), (0, rows - head.shape[1])))

  for source, target in _TIME.items():
    _put(params, target, _take(flat, source))
  for source, target in _BLOCK.items():
    layers = [
      _take(flat, f"Transformer_0/TransformerBlock_{i}/{source}") for i in range(found["depth"])
    ]
    _put(params, ("blocks", *target), np.stack(layers))
  if flat:
    raise ValueError(
      f"the MD4 parameters hold leaves that the transformer has no place for: "
      f"{', '.join(sorted(flat))}"
    )
  return params


def architecture(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Keys of the network section that the shapes of a flat MD4 parameter tree determine."""
  try:
    outside = "Embed_0/embedding" in flat
    embedding = flat["Embed_0/embedding" if outside else "Transformer_0/Embed_0/embedding"]
    return {
      "vocab_size": flat[f"Transformer_0/Dense_{2 if outside else 1}/kernel"].shape[1],
      "width": flat["Transformer_0/TransformerBlock_0/attention/wq/kernel"].shape[0],
      "depth": sum(key.endswith("attention/wq/kernel") for key in flat),
      "condition_width": flat["CondEmbedding_0/Dense_0/kernel"].shape[1],
      "embedding_width": embedding.shape[1] if outside else None,
    }
  except KeyError as error:
    raise ValueError(f"the tree is no MD4 text denoiser: {error} is missing") from error


def _flatten(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{key}/")
    else:
      yield f"{prefix}{key}", value


def _take(flat, key):
  if key not in flat:
    raise ValueError(f"the tree is no MD4 text denoiser: '{key}' is missing")
  return flat.pop(key)


def _put(params, path, value):
  for key in path[:-1]:
    params = params.setdefault(key, {})
  params[path[-1]] = value
