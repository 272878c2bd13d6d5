"""A first run: a small MD4 learns 4x4 Sudoku and says how far it is from the exact entropy.

Puzzles have 4 to 6 clues and any number of solutions, so the entropy of a solution given its
clues is above 0 and known exactly by enumeration.
Command: python -m md4vmd.main --config=configs/quickstart.py
Cost: two and a half minutes on 2 CPU cores; no files, no network.
Shows: the bound in bits per token beside the exact entropy, the share of puzzles completed by
number of network calls, three solved boards, and a picture of the unmasking.
"""

from configs import common


def get_config():
  """The config."""
  config = common.base()
  config.data.update(
    {
      "name": "sudoku",
      "size": 4,
      "clues_min": 4,
      "clues_max": 6,
      "unique": False,
      "symmetries": False,
    }
  )
  config.network.update({"width": 64, "depth": 3, "heads": 4, "absolute_positions": True})
  config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 100, "ema": 0.995})
  config.sampler.update({"name": "margin", "grid": "uniform", "steps": 8, "count": 3})
  config.run.update(
    {"steps": 4000, "batch_size": 32, "log_every": 1000, "then": ("evaluate", "sample")}
  )
  config.evaluators.likelihood.draws = 4
  config.evaluators.sudoku = {"orders": ("margin",), "calls": (1, 2, 4, 8), "limit": 1000}
  return config
