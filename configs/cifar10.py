"""CIFAR-10, 32x32x3, as sequences of 3072 tokens of 256 values.

Paper: MD4 (arXiv 2406.04329), 2.75 bits per dimension with a U-Net of 28M parameters, batch 256, 2M
steps. Give the official cifar-10-binary.tar.gz, its folder, or an .npz with --config.data.path; its
10,000 test images are the split "valid", as in the paper.

Variants:
  small (default): a U-Net of .8M parameters on patches of 2x2 pixels, for one CPU core.
  patches: small with one residual block a side around a transformer over 64 patches.
  md4: the settings of the paper. 28.4M parameters, 190 GFLOP per image and training step with
    remat, 97 EFLOP in all. On a v5e 4x4 slice 1.5 GB per chip (python -m benchmarks.tpu_compile
    --config=configs/cifar10.py:md4 --topology=v5e:4x4).
  class: md4 with labels; --config.sampler.labels="(3, 5)" chooses them.
  genmd4: md4 with a learned schedule for every value and its own sampler.
  vmd: md4 with a Gaussian latent, trained on the bounds of samplers with 16 to 128 steps.
Cost of small: some 12 minutes of two cores for 3,000 images, 5.57 bits per dimension on 400
  others; see docs/results.md.
Command: python -m md4vmd.main --config=configs/cifar10.py --config.data.path=cifar10.npz
FID: --mode=evaluate --config.evaluators.fid.weights_path=inception.safetensors; see
  docs/maths/evaluation.md.
In-painting: --mode=sample --config.sampler.inpaint=left
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ["small", "patches", "md4", "class", "genmd4", "vmd"]


def get_config(variant: str = "small"):
  """The config of a size or a model."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.data.update(
    {
      "name": "images",
      "path": "cifar-10-binary.tar.gz",
      "valid_path": common.placeholder(str),
      "flip": True,
      "class_conditional": variant == "class",
    }
  )
  config.network = ConfigDict(common.unet())
  config.network.update({"dropout": 0.1})
  config.sampler.update({"steps": 256, "count": 16})
  config.run.then = ("evaluate", "sample")
  config.evaluators.fid = ConfigDict(common.fid())
  if variant in ("small", "patches"):
    config.network.update({"width": 64, "depth": 2, "patch": 2, "head_width": 32, "ordinal": True})
    config.network.update({"embedding_width": 16, "condition_width": 64})
    config.network.time_conditioning = False
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50, "ema": 0.99})
    config.run.update({"steps": 2000, "batch_size": 8, "log_every": 100, "checkpoint_every": 250})
    config.evaluators.likelihood.draws = 4
    if variant == "patches":
      config.network.update({"name": "uvit", "depth": 1, "heads": 6, "conditioned_norms": False})
      config.network.update({"middle_width": 192, "middle_depth": 6, "middle_patch": 2})
      config.run.steps = 1400  # the time of small's
    return config
  config.network.update({"width": 128, "depth": 32, "condition_width": 128})
  config.network.update({"dtype": "bfloat16", "remat": "full"})
  config.objective.estimator = "time" if variant in ("md4", "class") else None
  config.optimizer.update(
    {"learning_rate": 2e-4, "warmup_steps": 100, "weight_decay": 0.01, "ema": 0.9999}
  )
  config.run.update({"steps": 2_000_000, "batch_size": 256, "log_every": 100})
  config.run.update({"checkpoint_every": 10_000, "evaluate_every": 50_000})
  if variant == "genmd4":
    config.objective.name = "genmd4"
    config.sampler.name = "token_ancestral"
    config.evaluators.token_power = {}
  if variant == "vmd":
    config.network.conditioned_norms = True
    config.latent.update({"name": "gaussian", "width": 128, "reader_depth": 4})
    config.objective.update({"name": "vmd", "form": "step", "step_counts": (16, 32, 64, 128)})
    config.objective.grid = config.sampler.grid
    config.objective.update({"kl_hold": 10_000, "kl_warmup": 90_000})
    config.evaluators.latent = {}
    config.sampler.steps = 64
  return config
