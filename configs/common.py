"""The sections that every config has. A None leaves the choice to the constructor's default."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base() -> Any:
  """A ConfigDict whose sections hold all keys of general use, for configs/*.py to change."""
  config: Any = ConfigDict()
  config.seed = 0

  config.data = ConfigDict({"name": placeholder(str)})

  # linear | cosine | poly (power) | geometric (beta_min, beta_max)
  config.schedule = ConfigDict(
    {
      "name": "linear",
      "power": placeholder(float),
      "beta_min": placeholder(float),
      "beta_max": placeholder(float),
    }
  )

  config.network = ConfigDict(
    {
      "name": "transformer",
      "width": 256,
      "depth": 4,
      "heads": 4,
      "mlp": "swiglu",
      "time_conditioning": False,
      "condition_width": placeholder(int),
      "embedding_width": placeholder(int),
      "absolute_positions": placeholder(bool),
      "adaln_zero": placeholder(bool),
      "open_gates": placeholder(bool),
      "dropout": 0.0,
      "dtype": "float32",
      "remat": "none",
      "attention": "auto",
    }
  )

  # none | gaussian (width) | mixture (width, components) | categorical (codes, classes, scale)
  config.latent = ConfigDict(
    {
      "name": "none",
      "width": placeholder(int),
      "prior": placeholder(str),
      "components": placeholder(int),
      "codes": placeholder(int),
      "classes": placeholder(int),
      "scale": placeholder(float),
      "enumerated": placeholder(bool),
      "tokens": placeholder(int),
      "switched_off": placeholder(bool),
      "reader_depth": placeholder(int),
      "reader_width": placeholder(int),
      "reader_heads": placeholder(int),
    }
  )

  # md4, sedd: estimator is count | tilted (count for training) | time | steps (md4 alone; then
  #   steps is T, and auxiliary D3PM's); block_size makes it block diffusion
  # genmd4: power is learned | frozen; estimator is count | tilted
  # vmd: form is global (with block_size too) | step | jump | paper; grid is that of step's times;
  #   posterior_reads is revealed | clean; sum_values is about enumerated latents
  # ar: nothing to set
  config.objective = ConfigDict(
    {
      "name": "md4",
      "estimator": placeholder(str),
      "steps": placeholder(int),
      "auxiliary": placeholder(float),
      "power": placeholder(str),
      "power_decay": placeholder(float),
      "block_size": placeholder(int),
      "form": placeholder(str),
      "samples": placeholder(int),
      "sum_values": placeholder(bool),
      "grid": placeholder(str),
      "posterior_reads": placeholder(str),
      "step_counts": placeholder(tuple),
      "all_masked": placeholder(float),
      "blocks": placeholder(int),
      "kl_hold": placeholder(int),
      "kl_warmup": placeholder(int),
      "kl_warmup_masks": placeholder(str),
      "free_nats": placeholder(float),
    }
  )

  # ancestral | top_prob | margin | entropy, over a uniform or cosine grid of times;
  # token_ancestral for genmd4
  config.sampler = ConfigDict(
    {
      "name": "ancestral",
      "grid": "cosine",
      "steps": 64,
      "temperature": placeholder(float),
      "top_p": placeholder(float),
      "count": 8,
      "length": placeholder(int),
      "split": "valid",
      "prompt": "",
      "prompts_file": "",
      "inpaint": "",
      "labels": (),
      "latent_refresh": placeholder(str),
    }
  )

  config.optimizer = ConfigDict(
    {
      "learning_rate": 1e-3,
      "shape": "cosine",
      "warmup_steps": 100,
      "b1": 0.9,
      "b2": 0.99,
      "weight_decay": 0.03,
      "clip_norm": 1.0,
      "ema": 0.999,
    }
  )

  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1})

  config.run = ConfigDict(
    {
      "steps": 1000,
      "batch_size": 64,
      "microbatches": 1,
      "log_every": 50,
      "checkpoint_every": 1000,
      "evaluate_every": 0,
      "keep": 2,
      "keep_every": placeholder(int),
      "best": "",
      "best_is": "smallest",
      "initial": "",
      "calibrate": 0,
      "then": (),
      "evaluators": (),  # names of those below; () for all
    }
  )

  config.evaluators = ConfigDict(
    {
      "likelihood": {"split": "valid", "draws": 1, "limit": placeholder(int)},
    }
  )
  return config


def unet() -> dict[str, Any]:
  """The network section of a U-Net, which takes the place of the transformer's."""
  return {
    "name": "unet",
    "width": 128,
    "depth": 8,
    "heads": 1,
    "time_conditioning": True,
    "condition_width": 128,
    "embedding_width": placeholder(int),
    "patch": 1,
    "head_width": placeholder(int),
    "ordinal": False,
    "absolute_positions": placeholder(bool),
    "conditioned_norms": placeholder(bool),
    "dropout": 0.0,
    "dtype": "float32",
    "remat": "none",
  }


def fid() -> dict[str, Any]:
  """The evaluator of images in colour; it measures nothing until it has weights."""
  return {
    "weights_path": "",
    "count": 50_000,
    "split": "train",
    "statistics": "",
    "limit": placeholder(int),
  }


def unknown_variant(variant: str, known: list[str]) -> ValueError:
  """The error for a variant that a config does not have."""
  return ValueError(f"there is no variant '{variant}'; this config has: {', '.join(known)}")
