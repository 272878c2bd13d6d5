"""MNIST, 28x28 grey values, as sequences of 784 tokens of 256 values.

--config.data.path is the folder with the four idx files, plain or .gz, as they are distributed; the
10,000 test images are the split "valid". Digits are not mirrored.

Variants:
  small (default): a U-Net on patches of 2x2 pixels, for one CPU core.
  class: small with labels; --config.sampler.labels="(7,)" chooses them.
  genmd4: small with a learned schedule for every value and its own sampler.
  vmd: small with a Gaussian latent, trained on the bounds of samplers with 4 to 32 steps.
  transformer: small with a transformer over all 784 pixels.
Command: python -m md4vmd.main --config=configs/mnist.py --config.data.path=mnist
In-painting: --mode=sample --config.sampler.inpaint=bottom
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ["small", "class", "genmd4", "vmd", "transformer"]


def get_config(variant: str = "small"):
  """The config of a model."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.data.update({"name": "images", "path": "mnist", "class_conditional": variant == "class"})
  if variant == "transformer":
    config.network.update({"width": 96, "depth": 4, "heads": 4, "absolute_positions": True})
  else:
    config.network = ConfigDict(common.unet())
    config.network.update({"width": 64, "depth": 2, "patch": 2, "head_width": 32, "ordinal": True})
    config.network.update({"embedding_width": 16, "condition_width": 64, "dropout": 0.1})
    config.network.update(
      {"conditioned_norms": True, "time_conditioning": variant in ("genmd4", "vmd")}
    )
  config.sampler.update({"steps": 64, "count": 20})
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50})
  config.run.update({"steps": 4000, "batch_size": 16, "log_every": 100, "checkpoint_every": 500})
  config.run.then = ("evaluate", "sample")
  if variant == "genmd4":
    config.objective.name = "genmd4"
    config.sampler.name = "token_ancestral"
    config.evaluators.token_power = {}
  if variant == "vmd":
    config.latent.update({"name": "gaussian", "width": 32, "reader_depth": 1})
    config.objective.update({"name": "vmd", "form": "step", "step_counts": (4, 8, 16, 32)})
    config.objective.grid = config.sampler.grid
    config.objective.update({"kl_hold": 200, "kl_warmup": 800})
    config.evaluators.latent = {}
    config.sampler.steps = 16
  return config
