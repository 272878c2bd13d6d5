"""Two- and four-token distributions whose every probability can be enumerated.

The failure that a latent is to mend: tokens of one step are decoded independently, so one step
gives 10 % of the pairs and .1 % of D1 right (riccizz.github.io/VMD, synthetic tables).

Variants: pairs (default), pairs_skewed, d1, d2, vmd-pairs, vmd-pairs_skewed, vmd-d1, vmd-d2.

The first four are MD4. The vmd ones have a Gaussian latent and are trained on single jumps.
Command: python -m md4vmd.main --config=configs/synthetic.py:d1
Cost: under a minute on 2 cores, a VMD two.
Expected: exact/T4_accuracy near 1, exact/T1_accuracy .1 (pairs), .001 (d1), .01 (d2); the tables of
python -m benchmarks.vmd_tables for VMD.
"""

from configs import common

DISTRIBUTIONS = ["pairs", "pairs_skewed", "d1", "d2"]
VARIANTS = DISTRIBUTIONS + [f"vmd-{distribution}" for distribution in DISTRIBUTIONS]


def get_config(variant: str = "pairs"):
  """The config of a distribution."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.data.update({"name": "synthetic", "distribution": variant.removeprefix("vmd-")})
  config.network.update({"width": 32, "depth": 2, "heads": 2})
  config.optimizer.update({"learning_rate": 3e-3, "ema": 0.995})
  config.run.update({"steps": 2000, "batch_size": 64, "log_every": 200, "then": ("evaluate",)})
  config.sampler.steps = 4
  config.evaluators.likelihood.draws = 16
  config.evaluators.exact = {"steps": (1, 2, 4), "grid": "uniform"}
  config.evaluators.any_order = {"orders": 8}
  if variant.startswith("vmd-"):
    config.network.update({"heads": 1, "condition_width": 32, "open_gates": True})
    config.latent.name = "gaussian"
    config.objective.update({"name": "vmd", "form": "jump", "samples": 8, "all_masked": 0.6})
    config.objective.kl_warmup = 800 if "pairs" in variant else 2000
    config.optimizer.warmup_steps = 200
    config.run.steps = 2500 if "pairs" in variant else 3500
    config.run.calibrate = 64  # eight draws leave the tokens too unsure given z
    del config.evaluators.exact  # it lists latents, and a Gaussian has too many
    del config.evaluators.any_order  # it multiplies tokens, which a latent ties together
    cells = ((1, 1),) if "pairs" in variant else ((1, 1), (1, 4), (2, 2), (2, 4))
    config.evaluators.blocks = {"cells": cells}
    config.evaluators.latent = {}
    # So sure of the tokens given z, the mean over single draws of z is a loose bound.
    config.evaluators.importance_weighted = {"paths": 256}
  return config
