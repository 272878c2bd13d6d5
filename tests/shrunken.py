"""The shipped configs, cut down to networks and runs of a second, on data made here."""

from __future__ import annotations

import gzip
import importlib
import json
import pathlib
import struct
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from md4vmd.data import prepare_text, sudoku_rules

ROOT = pathlib.Path(__file__).parent.parent
STEPS, BATCH = 6, 8
QUICK = {
  "jax_disable_most_optimizations": True,
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


# Variants that differ from another one by their data or a few settings; tests/build_test.py builds
# their models.
LIKE_ANOTHER = {
  ("sudoku", "4x4"),
  ("sudoku", "4x4-several"),
  ("sudoku", "9x9-small"),
  ("sudoku", "9x9-vmd"),
  ("sudoku", "vmd"),
  ("synthetic", "pairs_skewed"),
  ("synthetic", "d1"),
  ("synthetic", "d2"),
  ("synthetic", "vmd-pairs"),
  ("synthetic", "vmd-pairs_skewed"),
  ("synthetic", "vmd-d2"),
  ("owt", "md4"),
  ("owt", "md4-medium"),
  ("owt", "genmd4"),
  ("owt", "vmd"),
  ("owt", "sedd"),
  ("owt", "ar"),
  ("owt", "block4"),
  ("owt", "block8"),
  ("owt", "block16"),
  ("owt", "lm1b"),
  ("cifar10", "small"),
  ("cifar10", "patches"),
  ("cifar10", "md4"),
  ("cifar10", "genmd4"),
  ("cifar10", "vmd"),
  ("imagenet64", "small"),
  ("imagenet64", "class"),
  ("imagenet64", "genmd4"),
  ("imagenet64", "vmd"),
  ("mnist", "small"),
  ("mnist", "vmd"),
  ("mnist", "class"),
  ("mnist", "transformer"),
  ("text8", "block8"),
  ("text8", "block16"),
  ("text8", "d3pm"),
  ("text8", "vmd"),
  ("text8", "md4"),
}


def shipped() -> list[tuple[str, str]]:
  """(config, variant) of what configs/ offers; the variant of a plain config is ""."""
  names = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))
  modules = {name: importlib.import_module(f"configs.{name}") for name in names}
  return [
    (name, variant)
    for name, module in modules.items()
    if hasattr(module, "get_config")
    for variant in getattr(module, "VARIANTS", [""])
    if (name, variant) not in LIKE_ANOTHER
  ]


def config(name: str, variant: str = "", folder: pathlib.Path | None = None, path: str = ""):
  """A shrunken copy of a shipped config.

  Args:
    name: the config.
    variant: its variant; "" for the default one.
    folder: where data files are made, for configs that read one.
    path: a file to read instead.
  """
  module = importlib.import_module(f"configs.{name}")
  full = module.get_config(variant) if variant else module.get_config()
  full.network.update({"width": 16, "depth": 1, "heads": 2})
  if "middle_width" in full.network:
    full.network.update({"middle_width": 16, "middle_depth": 1})
  if full.network.condition_width is not None:
    full.network.condition_width = 8
  # A constant rate, so that the same program serves runs of any number of steps.
  full.optimizer.update({"warmup_steps": 2, "shape": "constant"})
  full.run.update(
    {"steps": STEPS, "batch_size": BATCH, "log_every": 2, "checkpoint_every": 3, "keep": 3}
  )
  full.run.update({"evaluate_every": 0, "then": ()})
  full.sampler.update({"steps": 3, "count": 2})
  full.evaluators.likelihood.update({"draws": 1, "limit": 20})
  if "any_order" in full.evaluators:
    full.evaluators.any_order.update({"orders": 2, "limit": 20})
  if "blocks" in full.evaluators:
    full.evaluators.blocks.update({"cells": ((1, 1),), "draws": 200})
  if "importance_weighted" in full.evaluators:
    full.evaluators.importance_weighted.paths = 2
  if "latent" in full.evaluators:
    full.evaluators.latent.update({"limit": 8, "draws": 2})
  if "fid" in full.evaluators:
    del full.evaluators.fid  # its weights are the user's
  if "sudoku" in full.evaluators:
    full.evaluators.sudoku.update({"calls": (2,), "limit": 10})
  if full.data.name == "sudoku":
    full.data.update({"valid_puzzles": 30, "clues_max": full.data.clues_min})
  elif full.data.name == "sudoku_csv":
    full.data.update({"path": path or str(write_puzzles(folder)), "valid_fraction": 0.25})
  elif full.data.name == "text":
    full.data.update({"path": path or str(write_text(folder)), "length": 16})
  elif full.data.name == "tokens":
    full.data.update({"path": path or str(prepare_bytes(folder)), "length": 16})
    full.evaluators.zero_shot.update({"sets": (f"ag_news={folder / 'lines.txt'}",), "limit": 8})
    full.evaluators.answers.update({"path": str(write_questions(folder)), "draws": 2})
  elif full.data.name == "images":
    full.data.path = path or str(write_digits(folder) if name == "mnist" else write_images(folder))
    full.sampler.count = 3
  return full


def set_in(config, key: str, value) -> None:
  """Sets a key of a config, whether it knows the key or not."""
  with config.unlocked():
    config.update_from_flattened_dict({key: value})


def write_puzzles(folder: pathlib.Path, count: int = 40) -> pathlib.Path:
  """A csv of 9x9 puzzles with 60 clues."""
  rng = np.random.default_rng(0)
  rows = ["puzzle,solution"]
  for _ in range(count):
    x_L = sudoku_rules.random_grid(9, rng)
    given_L = sudoku_rules.remove_clues(x_L, 60, rng, unique=False)
    digits = lambda board_L: "".join(map(str, board_L))
    rows.append(f"{digits(np.where(given_L, x_L + 1, 0))},{digits(x_L + 1)}")
  path = folder / "puzzles.csv"
  path.write_text("\n".join(rows) + "\n")
  return path


def write_text(folder: pathlib.Path, count: int = 2950) -> pathlib.Path:
  """A file of words over the characters of text8; its last chunk of 16 is not full."""
  rng = np.random.default_rng(0)
  words = ["to", "be", "or", "not", "that", "is", "the", "question"]
  text = " ".join(rng.choice(words, count))[:count]
  path = folder / "words.txt"
  path.write_text(text)
  return path


def prepare_bytes(folder: pathlib.Path, count: int = 100) -> pathlib.Path:
  """Lines of words, lines.txt, prepared as bytes in examples of 16."""
  words = write_text(folder, 30 * count).read_text()
  lines = [words[i : i + 30] for i in range(0, len(words), 30)]
  (folder / "lines.txt").write_text("\n".join(lines) + "\n")
  source, out = str(folder / "lines.txt"), folder / "prepared"
  prepare_text.prepare(prepare_text.Options(source, out, "bytes", 16, unit="line"))
  return out


def write_questions(folder: pathlib.Path) -> pathlib.Path:
  """Two prompts with an answer each, as JSON lines."""
  path = folder / "questions.jsonl"
  pairs = [{"prompt": "abc ", "answer": "ab"}, {"prompt": "c", "answer": "bc a"}]
  path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  return path


def images(count: int, channels: int) -> np.ndarray:
  """Images of 8x8 that get brighter to the right, [count, 8, 8, channels] of uint8."""
  noise = np.random.default_rng(count).integers(30, size=(count, 8, 8, channels))
  return (noise + 20 * np.arange(8)[:, None]).astype(np.uint8)


def write_images(folder: pathlib.Path) -> pathlib.Path:
  """An npz of `images` with labels 0 to 2."""
  arrays = {}
  for split, count in (("train", 24), ("valid", 6)):
    arrays[f"{split}_images"] = images(count, 3)
    arrays[f"{split}_labels"] = np.arange(count) % 3
  path = folder / "images.npz"
  np.savez(path, **arrays)
  return path


def write_digits(folder: pathlib.Path) -> pathlib.Path:
  """A folder of MNIST's idx files, of which one is gzip, with `images` of labels 0 to 2."""
  path = folder / "digits"
  path.mkdir()
  for split, count in (("train", 24), ("t10k", 6)):
    label_N = (np.arange(count) % 3).astype(np.uint8)
    for kind, array in (("images", images(count, 1)[..., 0]), ("labels", label_N)):
      axes = array.ndim
      raw = struct.pack(f">{1 + axes}I", 0x0800 + axes, *array.shape) + array.tobytes()
      name = f"{split}-{kind}-idx{axes}-ubyte"
      if name == "train-images-idx3-ubyte":
        name, raw = f"{name}.gz", gzip.compress(raw)
      (path / name).write_bytes(raw)
  return path


def quick_compilation(folder: pathlib.Path) -> Iterator[None]:
  """While it is suspended: little optimization, and each program is compiled once for all runs.

  The body of a fixture; the trainer, evaluators and sampler compile anew at every call.
  """
  settings = QUICK | {"jax_compilation_cache_dir": str(folder)}
  old = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
