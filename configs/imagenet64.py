"""ImageNet 64x64x3, as sequences of 12,288 tokens of 256 values.

Paper: MD4 (arXiv 2406.04329), 3.40 bits per dimension with a U-ViT of 24 residual blocks a side and
a transformer of 12 blocks in the middle, batch 512, 2M steps. FID of 50,000 samples by schedule at
T=64/128/256/512: linear 193.8/128.2/72.9/50.2; linear over a cosine grid of times
42.1/25.2/18.3/18.2; cosine 47.5/23.8/17.8/18.7; class-conditional cosine 30.8/11.4/7.1/7.8.

Data: Downsampled ImageNet's npz files (a pattern for --config.data.path and the validation file for
--config.data.valid_path), which are read into memory; a folder of records, made by
python -m md4vmd.data.prepare_images --train=train --valid=val --size=64 --fit=stretch
--out=imagenet64; or tfds:NAME. Sets called ImageNet 64x64 differ, so compare bits on the same files
only: tfds:downsampled_imagenet/64x64 holds the unlabelled archives of image-net.org/small, while
Downsampled ImageNet's files (arXiv 1707.08819), which are tfds:imagenet_resized/64x64 too, have
labels, as have those that you prepare from folders of classes.

Variants:
  small (default): a U-Net on patches of 4x4 pixels, to try the data on a CPU.
  md4: the settings of the paper, on a pod. The width of the residual blocks, 256, is ours. 198M
    parameters, 3.10 TFLOP per image and training step with remat, 3,170 EFLOP in all. On a v5e 8x8
    slice 7.7 GB per chip (python -m benchmarks.tpu_compile --config=configs/imagenet64.py:md4
    --topology=v5e:8x8 --image_shape=64x64x3).
  class: md4 with labels and the cosine schedule.
  genmd4: md4 with a learned schedule for every value and its own sampler.
  vmd: md4 with a Gaussian latent, trained on the bounds of samplers with 16 to 128 steps.
Command: python -m md4vmd.main --config=configs/imagenet64.py:md4 --config.data.path=imagenet64
FID: --mode=evaluate --config.evaluators.fid.weights_path=inception.safetensors; see
  docs/maths/evaluation.md.
In-painting: --mode=sample --config.sampler.inpaint=center
"""

from ml_collections import ConfigDict

from configs import common

VARIANTS = ["small", "md4", "class", "genmd4", "vmd"]


def get_config(variant: str = "small"):
  """The config of a size or a model."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.data.update(
    {
      "name": "images",
      "path": "imagenet64",
      "valid_path": common.placeholder(str),
      "flip": False,
      "class_conditional": variant == "class",
    }
  )
  config.network = ConfigDict(common.unet())
  config.sampler.update({"steps": 256, "count": 16})
  config.run.then = ("evaluate", "sample")
  config.evaluators.fid = ConfigDict(common.fid())
  if variant == "small":
    config.network.update({"width": 96, "depth": 2, "patch": 4, "head_width": 32, "ordinal": True})
    config.network.update({"embedding_width": 8, "time_conditioning": False, "dropout": 0.1})
    config.optimizer.update({"learning_rate": 2e-3})
    config.run.update({"steps": 2000, "batch_size": 8, "log_every": 100, "checkpoint_every": 250})
    return config
  config.network.update({"name": "uvit", "width": 256, "depth": 24, "condition_width": 256})
  config.network.update({"middle_width": 768, "middle_depth": 12, "middle_patch": 2, "heads": 12})
  config.network.update({"conditioned_norms": True, "dtype": "bfloat16", "remat": "full"})
  if variant in ("md4", "class"):
    config.objective.estimator = "time"
  if variant == "class":
    config.schedule.name = "cosine"
    config.sampler.grid = "uniform"
  config.optimizer.update(
    {"learning_rate": 2e-4, "warmup_steps": 100, "weight_decay": 0.01, "ema": 0.9999}
  )
  config.run.update({"steps": 2_000_000, "batch_size": 512, "log_every": 100})
  config.run.update({"checkpoint_every": 10_000, "evaluate_every": 50_000})
  if variant == "genmd4":
    config.objective.name = "genmd4"
    config.sampler.name = "token_ancestral"
    config.evaluators.token_power = {}
  if variant == "vmd":
    config.latent.update({"name": "gaussian", "width": 256, "reader_depth": 4})
    config.latent.update({"reader_width": 128})
    config.objective.update({"name": "vmd", "form": "step", "step_counts": (16, 32, 64, 128)})
    config.objective.grid = config.sampler.grid
    config.objective.update({"kl_hold": 10_000, "kl_warmup": 90_000})
    config.evaluators.latent = {}
    config.sampler.steps = 64
  return config
