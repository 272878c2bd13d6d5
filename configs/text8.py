"""text8: the first 100M characters of an English Wikipedia, 27 characters.

Paper: MD4 (arXiv 2406.04329), 1.37 bits per character at 12 layers x 768, batch 512, 1M steps on
the test part of the published cut 90M/5M/5M (--config.evaluators.likelihood.split=test). Give the
file with --config.data.path; a shorter file is cut 90/5/5, and with --config.data.valid_path the
two files are train and valid.

Variants:
  small (default): 3 layers x 192, length 128, for two CPU cores; MD4 by tilted counts, whose
    gradient is less noisy on text than that of plain ones.
  genmd4: small with a learned schedule for every character (w from 1) and its own sampler.
  sedd: small trained by score entropy; the part "normalised" of its bound is MD4's.
  d3pm: small in 1000 discrete steps with the auxiliary cross-entropy of D3PM.
  vmd: small with a Gaussian latent, trained on the bounds of samplers with 8 to 64 steps.
  ar: small, from left to right; its likelihood is exact.
  block4: small, by block diffusion (BD3-LM, arXiv 2503.09573): blocks of 4 characters, one after
    another from left to right.
  block8: the same in blocks of 8.
  block16: the same in blocks of 16.
  md4: the settings of the paper, with its continuous-time estimator and windows that start at
    every character. Batch 512 wants an accelerator or several.
Command: python -m md4vmd.main --config=configs/text8.py --config.data.path=text8.gz
Cost of small: see docs/results.md for the measured time and figure.
Infilling: --mode=sample --config.sampler.prompt="skydiving is a fun sport [MASK:40]"
"""

from configs import common

BLOCKS = {"block4": 4, "block8": 8, "block16": 16}
VARIANTS = ["small", "genmd4", "sedd", "d3pm", "ar", *BLOCKS, "vmd", "md4"]


def get_config(variant: str = "small"):
  """The config of a size."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.data.update({"name": "text", "path": "text8.gz", "length": 128})
  config.data.update({"valid_path": common.placeholder(str), "stride": common.placeholder(int)})
  config.sampler.update({"steps": 128, "count": 4})
  config.evaluators.likelihood.draws = 4
  config.run.then = ("evaluate", "sample")
  if variant != "md4":
    config.network.update({"width": 192, "depth": 3, "heads": 3})
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 200})
    config.run.update({"steps": 3000, "batch_size": 32, "log_every": 100, "checkpoint_every": 500})
  if variant == "small":
    config.objective.estimator = "tilted"
  if variant in ("genmd4", "d3pm"):
    config.network.update({"time_conditioning": True, "condition_width": 64})
  if variant == "genmd4":
    config.objective.name = "genmd4"
    config.sampler.name = "token_ancestral"
    config.evaluators.token_power = {}
  if variant == "sedd":
    config.objective.name = "sedd"
  if variant == "d3pm":
    config.objective.update({"estimator": "steps", "steps": 1000, "auxiliary": 0.01})
  if variant == "vmd":
    config.network.update({"condition_width": 64, "open_gates": True})
    config.latent.update({"name": "gaussian", "width": 32, "reader_depth": 1})
    config.objective.update({"name": "vmd", "form": "step", "step_counts": (8, 16, 32, 64)})
    config.objective.grid = config.sampler.grid
    config.objective.update({"kl_hold": 200, "kl_warmup": 800})
    config.evaluators.latent = {}
    config.evaluators.text_samples = {"calls": (8, 16, 32, 64), "count": 64}
    config.sampler.steps = 32
  if variant == "ar":
    config.objective.name = "ar"
    config.evaluators.likelihood.draws = 1  # nothing is drawn
  if variant in BLOCKS:
    config.objective.block_size = BLOCKS[variant]
  if variant == "md4":
    config.data.update({"length": 256, "stride": 1})
    config.objective.estimator = "time"
    config.network.update(
      {
        "width": 768,
        "depth": 12,
        "heads": 12,
        "mlp": "glu",
        "time_conditioning": True,
        "condition_width": 768,
        "dropout": 0.05,
        "dtype": "bfloat16",
        "remat": "dots",
      }
    )
    config.optimizer.update(
      {
        "learning_rate": 5e-4,
        "warmup_steps": 2000,
        "b2": 0.999,
        "weight_decay": 0.03,
        "ema": 0.9999,
      }
    )
    config.run.update(
      {
        "steps": 1_000_000,
        "batch_size": 512,
        "log_every": 100,
        "checkpoint_every": 10_000,
        "evaluate_every": 50_000,
      }
    )
  return config
