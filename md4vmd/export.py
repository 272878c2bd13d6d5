"""The export job: averaged parameters as one safetensors file; one of MD4's parameters."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from md4vmd import build, networks, partitioning, provenance, train_state, weights
from md4vmd.fingerprints import by_name
from md4vmd.writers import say


def from_md4(config: build.Config, tree: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes parameters of the public MD4 code as a file for `run.initial`.

  Args:
    config: of the same network; its data says the vocabulary.
    tree: MD4's parameters, as `networks.import_md4` takes them.
    path: the file, in a folder that exists.

  Raises:
    ValueError: they are not the parameters of the config's network.
  """
  model = build.model(config)
  section = {**model.config["network"], "vocab_size": model.dataset.vocab_size}
  params = networks.import_md4(tree, section)
  given, wanted = by_name(params), by_name(train_state.abstract(model).params)
  for name in sorted(wanted.keys() | given.keys()):
    ours, theirs = (each[name].shape if name in each else "none" for each in (wanted, given))
    if ours != theirs:
      raise ValueError(
        f"the parameter {name} has shape {theirs} in the MD4 parameters and {ours} in this "
        "config's network; use the config of the same network"
      )
  about = {"config": model.config, "step": 0, "made_with": provenance.record()}
  weights.write(path, params, train_state.true_shapes(model), about)


def export(
  config: build.Config, workdir: pathlib.Path, step: train_state.Step = "latest"
) -> pathlib.Path:
  """Writes export/<step>.safetensors of the workdir; `run.initial` starts a training from it.

  Its header holds the config that trained it and its hash, the step, and the versions
  and the commit that wrote the file.

  Raises:
    FileNotFoundError: the workdir has no such checkpoint.
  """
  model = build.model(config)
  with partitioning.use(model.mesh):
    restored = train_state.load_average(model, workdir, step)
    params = partitioning.to_host(restored.state["ema"])
  path = workdir / "export" / f"{restored.step}.safetensors"
  if jax.process_index() == 0:
    path.parent.mkdir(exist_ok=True)
    about = {
      "config": restored.meta["config"],
      "step": restored.step,
      "trained_config_hash": restored.meta["config_hash"],
      "made_with": provenance.record(),
    }
    weights.write(path, params, train_state.true_shapes(model), about)
    count = train_state.count_parameters(params) / 1e6
    say(f"Wrote {count:.2f}M parameters of step {restored.step} to {path}.")
  return path
