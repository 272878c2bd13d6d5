"""The export job: averaged parameters as one safetensors file that other programs can read."""

from __future__ import annotations

import pathlib

import jax

from md4vmd import build, partitioning, provenance, train_state, weights
from md4vmd.writers import say


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
