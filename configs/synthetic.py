"""Two- and four-token distributions whose every probability can be enumerated.

The failure that a latent is to mend: tokens of one step are decoded independently, so one step
gives 10 % of the pairs and .1 % of D1 right (riccizz.github.io/VMD, synthetic tables).

Variants: pairs (default), pairs_skewed, d1, d2.
Command: python -m md4vmd.main --config=configs/synthetic.py:d1
Cost: under a minute on 2 cores.
Expected: exact/T4_accuracy near 1, exact/T1_accuracy .1 (pairs), .001 (d1), .01 (d2).
"""

from configs import common

VARIANTS = ["pairs", "pairs_skewed", "d1", "d2"]


def get_config(variant: str = "pairs"):
  """The config of a distribution."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.data.update({"name": "synthetic", "distribution": variant})
  config.network.update({"width": 32, "depth": 2, "heads": 2})
  config.optimizer.update({"learning_rate": 3e-3, "ema": 0.995})
  config.run.update({"steps": 2000, "batch_size": 64, "log_every": 200, "then": ("evaluate",)})
  config.sampler.steps = 4
  config.evaluators.likelihood.draws = 16
  config.evaluators.exact = {"steps": (1, 2, 4), "grid": "uniform"}
  return config
