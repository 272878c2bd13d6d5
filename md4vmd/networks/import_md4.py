"""Reads parameters of the public MD4 implementation into our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from md4vmd.networks import import_md4_images
from md4vmd.networks.head import padded
from md4vmd.networks.import_md4_images import TIME, put

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


def import_md4(tree: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters that compute what MD4's denoisers of text or images compute.

  They are those of `networks.Transformer`, `networks.UNet` or `networks.UViT`; the tree says which.

  Args:
    tree: MD4's parameters, nested or with keys joined by "/", with or without a leading
      "params". Leaves are arrays.
    config: the network section that describes the same architecture, or a config that holds it
      as `network`. Of its keys those that the shapes of the tree determine are checked where they
      are present: name, vocab_size, width, depth, condition_width, embedding_width; of images also
      conditioned_norms, heads of a U-Net, middle_width, middle_depth and middle_patch of a U-ViT,
      and time_conditioning, ordinal, absolute_positions, patch and head_width, of which MD4 has
      one value each.

  Returns:
    A nested dict of numpy arrays; the vocabulary is padded.

  Raises:
    ValueError: the tree is no MD4 denoiser or contradicts the config.
  """
  flat = {key.removeprefix("params/"): np.asarray(leaf) for key, leaf in _flatten(tree)}
  is_image = any(key.startswith(import_md4_images.ROOT) for key in flat)
  kind = "image" if is_image else "text"
  try:
    found = import_md4_images.architecture(flat) if is_image else architecture(flat)
    section = dict(config.get("network", config))
    for key, value in found.items():
      if section.get(key, value) != value:
        raise ValueError(
          f"network.{key} is {section[key]} in the config and {value} in the MD4 "
          f"parameters; set network.{key}={value}"
        )
    params = import_md4_images.read(flat, found) if is_image else _read_text(flat, found)
  except KeyError as error:
    raise ValueError(f"the tree is no MD4 {kind} denoiser: {error} is missing") from error
  if flat:
    raise ValueError(
      f"the MD4 parameters hold leaves that the network has no place for: {', '.join(sorted(flat))}"
    )
  return params


def _read_text(flat: dict[str, np.ndarray], found: Mapping[str, Any]) -> dict[str, Any]:
  """The transformer's parameters, its layers stacked; what is read is taken out of `flat`."""
  params: dict[str, Any] = {}
  dense = iter(f"Transformer_0/Dense_{i}" for i in range(3))
  rows = padded(found["vocab_size"])
  if found["embedding_width"] is None:
    embedding = flat.pop("Transformer_0/Embed_0/embedding")
  else:
    embedding = flat.pop("Embed_0/embedding")
    name = next(dense)
    for leaf in ("kernel", "bias"):
      put(params, ("embedding_map", leaf), flat.pop(f"{name}/{leaf}"))
  params["embedding"] = np.pad(embedding, ((0, rows - len(embedding)), (0, 0)))
  name = next(dense)
  for leaf in ("kernel", "bias"):
    put(params, ("modulation", "dense", leaf), flat.pop(f"{name}/{leaf}"))
  head = flat.pop(f"{next(dense)}/kernel")
  params["head"] = np.pad(head, ((0, 0), (0, rows - head.shape[1])))

  for source, target in TIME.items():
    put(params, target, flat.pop(source))
  for source, target in _BLOCK.items():
    layers = [
      flat.pop(f"Transformer_0/TransformerBlock_{i}/{source}") for i in range(found["depth"])
    ]
    put(params, ("blocks", *target), np.stack(layers))
  return params


def architecture(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Keys of the network section that the shapes of a flat MD4 parameter tree determine."""
  outside = "Embed_0/embedding" in flat
  embedding = flat["Embed_0/embedding" if outside else "Transformer_0/Embed_0/embedding"]
  return {
    "name": "transformer",
    "vocab_size": flat[f"Transformer_0/Dense_{2 if outside else 1}/kernel"].shape[1],
    "width": flat["Transformer_0/TransformerBlock_0/attention/wq/kernel"].shape[0],
    "depth": sum(key.endswith("attention/wq/kernel") for key in flat),
    "condition_width": flat["CondEmbedding_0/Dense_0/kernel"].shape[1],
    "embedding_width": embedding.shape[1] if outside else None,
  }


def _flatten(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{key}/")
    else:
      yield f"{prefix}{key}", value
