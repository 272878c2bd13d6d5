"""Sudoku: clues are given, the rest is filled in any order.

Variants:
  4x4 (default): 4 to 6 clues, one solution; 58 of the 288 grids are held out altogether.
  4x4-several: 3 clues and any number of solutions, whose exact entropy is known.
  vmd: 4x4-several with a Gaussian latent whose prior sees the clues, trained on single jumps; its
    baseline with the denoiser's parameters is --config.latent.switched_off=True.
  9x9: puzzles of a csv (puzzle,solution per line, also .gz; globs and commas allowed), given with
    --config.data.path; cut by solution grid. About 6M parameters, the size of arXiv 2502.06768,
    which reports 6.88 % solved in random order, 18.51 % by top_prob and 89.49 % by margin. For an
    accelerator. Of several files, the held-out puzzles of each are a split: score them with
    --config.evaluators.sudoku.splits="('valid_null_easy', 'valid_null_expert')".
  9x9-vmd: 9x9 with the latent of vmd; its baseline is --config.latent.switched_off=True.
  9x9-small: the same data at .8M parameters, for CPU cores.
Command: python -m md4vmd.main --config=configs/sudoku.py
Cost and figures: docs/results.md.
"""

from configs import common

VARIANTS = ["4x4", "4x4-several", "vmd", "9x9", "9x9-vmd", "9x9-small"]


def get_config(variant: str = "4x4"):
  """The config of a board."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.sampler.update({"name": "margin", "grid": "uniform", "steps": 6, "count": 3})
  config.run.then = ("evaluate", "sample")
  # Rows, columns and boxes are positions: without them learning takes many times as long.
  config.network.absolute_positions = True
  if variant.startswith("9x9"):
    config.data.update({"name": "sudoku_csv", "path": "sudoku.csv", "valid_fraction": 0.05})
    config.network.update({"width": 256, "depth": 8, "heads": 8})
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 1000, "ema": 0.999})
    config.run.update(
      {"steps": 50_000, "batch_size": 128, "log_every": 100, "checkpoint_every": 1000}
    )
    if variant == "9x9-small":
      config.network.update({"width": 128, "depth": 4, "heads": 4})
      config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 200})
      config.run.update(
        {"steps": 3000, "batch_size": 32, "checkpoint_every": 500, "evaluate_every": 1000}
      )
    config.sampler.steps = 20
    config.evaluators.sudoku = {
      "splits": ("valid",),
      "orders": ("margin", "top_prob"),
      "calls": (5, 10, 20),
      "limit": 1000,
    }
    if variant == "9x9-vmd":
      _give_latent(config)
    return config
  clues = {"clues_min": 4, "clues_max": 6, "holdout_grids": 58}
  if variant in ("4x4-several", "vmd"):
    clues = {"clues_min": 3, "clues_max": 3, "unique": False}
  # Every puzzle is in the list already, so symmetries would add nothing.
  config.data.update({"name": "sudoku", "size": 4, "symmetries": False, **clues})
  config.network.update({"width": 64, "depth": 4, "heads": 4})
  config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 200, "weight_decay": 0.1})
  config.run.update({"steps": 2000, "batch_size": 128, "log_every": 200})
  splits = ("valid", "heldout") if variant == "4x4" else ("valid",)
  config.evaluators.sudoku = {
    "splits": splits,
    "orders": ("margin", "top_prob", "ancestral"),
    "calls": (1, 2, 4, 6),
    # Without a limit all solutions of a puzzle are among the examples, for the coverage.
    "limit": 1000 if variant == "4x4" else common.placeholder(int),
  }
  if variant == "vmd":
    config.network.depth = 3
    config.run.update({"steps": 5000, "batch_size": 64})
    config.evaluators.sudoku.update({"orders": ("top_prob",), "calls": (1, 2, 5)})
    _give_latent(config)
  return config


def _give_latent(config):
  """A Gaussian latent whose prior sees the clues, as what it may be depends on them."""
  config.network.update({"condition_width": 64, "open_gates": True})
  config.latent.update({"name": "gaussian", "width": 16, "reader_depth": 2})
  config.latent.prior = "conditional"
  config.objective.update({"name": "vmd", "form": "jump", "kl_hold": 1000, "kl_warmup": 1500})
  config.objective.kl_warmup_masks = "all"  # over whole masks alone, this latent collapses
  config.evaluators.latent = {}
