"""The config of a run as its files hold it: its hash, and what may differ when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

# A run that changes one of these is another run.
IDENTITY = ("seed", "data", "schedule", "network", "latent", "objective")
# But for these: they say how data are made and checked, not what they are.
_ASIDE = ("config.data.prepare", "config.data.verify")
# How a network computes, not what: evaluation and sampling may change these.
_HOW = ("dtype", "remat", "attention", "dropout")
Config = Any  # a ConfigDict; its attributes have no static types


def plain(config: Config) -> dict[str, Any]:
  """The config as nested dicts that JSON can hold."""
  return json.loads(json.dumps(config.to_dict()))


def config_hash(config: Config) -> str:
  """12 hexadecimal digits of the SHA-256 of the whole config."""
  text = json.dumps(plain(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def changes(config: Config, recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Settings that differ from a recorded config, as key -> (old, new).

  Raises:
    ValueError: one of them makes this another run: its data, model, objective or seed.
  """
  old, new = (dict(_leaves(side, "config")) for side in (dict(recorded), plain(config)))
  changed = {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
  for key, (before, now) in changed.items():
    if key.split(".")[1] in IDENTITY and key not in _ASIDE:
      raise ValueError(
        f"the workdir holds a run with {key}={before} and this one has {now}; "
        "give another --workdir, or go back to the old value"
      )
  return changed


def check_network(config: Mapping[str, Any], recorded: Mapping[str, Any], where: Any) -> None:
  """Raises ValueError where parameters were trained in another network of perhaps equal shapes.

  Args:
    config: the plain config of the model that is to use them.
    recorded: the plain config that they were trained with.
    where: they come from, for the message.
  """
  network = config["network"]
  for key, before in recorded.get("network", {}).items():
    if key not in _HOW and key in network and network[key] != before:
      raise ValueError(
        f"{where} was trained with config.network.{key}={before} and this config has "
        f"{network[key]}; go back to the old value"
      )


def _leaves(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
  if not isinstance(value, Mapping):
    yield prefix, value
    return
  for key, inner in value.items():
    yield from _leaves(inner, f"{prefix}.{key}")
