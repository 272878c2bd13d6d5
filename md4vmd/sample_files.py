"""What the sampling job writes: text or images, arrays, and pictures of the unmasking."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from md4vmd import build, image_grids, pictures, provenance, samplers
from md4vmd.writers import dump, replace_file, say

_FRAMES = 8
_GIF_FRAMES = 32
_ROWS = 8  # images in a film strip
_ENDS = (".json", ".npz", ".txt", ".jsonl", ".png", "-film.png", ".gif")  # of what a job writes
MOST_PICTURED = 64  # images in a grid and in a GIF


def write(
  model: build.Model,
  workdir: pathlib.Path,
  step: int,
  prompts: list[str],
  tokens_BxL: np.ndarray,
  free_BxL: np.ndarray,
  label_B: np.ndarray | None,
  samples: samplers.Samples,
) -> None:
  """Writes samples/<step>.* and shows what can be read; arrays hold all, pictures the first ones.

  What an earlier job left under these names is deleted first. The .json is written last: it says
  what made the files beside it.

  Args:
    model: what the config built.
    workdir: of the run.
    step: of the checkpoint.
    prompts: texts that were infilled, one per sample, or none.
    tokens_BxL: given tokens; the mask id where nothing was known.
    free_BxL: True where the samples were filled.
    label_B: classes, for class-conditional models.
    samples: finished sequences.
  """
  folder = workdir / "samples"
  folder.mkdir(parents=True, exist_ok=True)
  for end in _ENDS:
    (folder / f"{step}{end}").unlink(missing_ok=True)
  arrays = {"x_BxL": samples.x_BxL, "free_BxL": free_BxL}
  arrays |= {"call_BxL": samples.call_BxL, "calls_B": samples.calls_B}
  if label_B is not None:
    arrays["label_B"] = label_B
  np.savez_compressed(folder / f"{step}.npz", **arrays)
  calls = f"samples at step {step}, {samples.calls_B.mean():.1f} network calls each"
  if model.dataset.image_shape is not None:
    say(f"\n{calls}")
    _write_images(folder, step, model.dataset.image_shape, samples)
  else:
    _write_text(model, folder, step, prompts, free_BxL, tokens_BxL, samples, calls)
  about = dump(_about(model, workdir, step), indent=2)
  replace_file(folder / f"{step}.json", about + "\n")


def _about(model, workdir, step) -> dict[str, Any]:
  """What made the samples."""
  return {
    "checkpoint": provenance.source(workdir, step, model.run.initial),
    "step": step,
    "config_hash": model.config_hash,
    "seed": model.seed,
    "sampler": model.config["sampler"],
  }


def _write_images(folder, step, shape, samples) -> None:
  """A grid and a GIF of the first MOST_PICTURED samples, and a film strip of fewer of them."""
  count = len(samples.x_BxL)
  x_BxL, call_BxL = samples.x_BxL[:MOST_PICTURED], samples.call_BxL[:MOST_PICTURED]
  *_, finished = gif = image_grids.stages(x_BxL, call_BxL, shape, _GIF_FRAMES)
  image_grids.grid(finished).save(folder / f"{step}.png")
  film = image_grids.stages(x_BxL[:_ROWS], call_BxL[:_ROWS], shape, _FRAMES)
  image_grids.film(film).save(folder / f"{step}-film.png")
  image_grids.save_gif(gif, folder / f"{step}.gif")
  shown = f" of the first {MOST_PICTURED} of {count}" if count > MOST_PICTURED else ""
  say(f"wrote {folder / str(step)}.npz, .json, and .png, -film.png and .gif{shown}")


def _write_text(model, folder, step, prompts, free_BxL, tokens_BxL, samples, calls) -> None:
  dataset = model.dataset
  is_known_BxL = free_BxL | (tokens_BxL != dataset.vocab_size)
  texts = [
    dataset.decode(x_L[known_L]) for x_L, known_L in zip(samples.x_BxL, is_known_BxL, strict=True)
  ]
  shown = "\n\n".join(texts)
  say(f"\n{calls}\n\n{shown}\n")
  (folder / f"{step}.txt").write_text(shown + "\n", encoding="utf-8")
  if prompts:
    lines = [
      json.dumps({"prompt": prompt, "text": text, "calls": int(calls)})
      for prompt, text, calls in zip(prompts, texts, samples.calls_B, strict=True)
    ]
    (folder / f"{step}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
  known_L = is_known_BxL[0]
  picture = pictures.film_strip(
    dataset.cells(samples.x_BxL[0][known_L]),
    samples.call_BxL[0][known_L],
    columns=dataset.columns,
    box=dataset.box,
  )
  picture.save(folder / f"{step}.png")
  say(f"wrote {folder / str(step)}.txt, .npz, .json{', .jsonl' if prompts else ''} and .png")
