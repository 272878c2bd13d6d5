"""The sampling job: sequences, boards, images, infilled prompts and in-painted images."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from md4vmd import (
  build,
  networks,
  partitioning,
  rngs,
  sample_files,
  samplers,
  steps,
  train_state,
)
from md4vmd.data import images, prompts
from md4vmd.writers import say


def sample(config: build.Config, workdir: pathlib.Path, step: train_state.Step = "latest") -> None:
  """Samples from the averaged parameters of a checkpoint of the workdir, the newest by default.

  What is filled: the prompts, if the config has any; a region of the images of a split, if it
  names one; the puzzles of a split, if the data has clues; else whole sequences. Writes
  samples/<step>.npz, .png and .json, which says what made them; of text also .txt, and .jsonl for
  prompts; of images also -film.png and .gif, whose pictures show the first 64. Those of an earlier
  job are deleted once the new samples are there.

  Raises:
    ValueError: a prompt is too long, has nothing to fill, or holds characters without a token; a
      region or labels that do not fit the data.
    FileNotFoundError: no checkpoint, or no such file of prompts.
  """
  model = build.model(config)
  texts, tokens_BxL, free_BxL = prepare(model)
  with partitioning.use(model.mesh):
    restored = train_state.load_average(model, workdir, step)
    label_B = _labels(model, len(tokens_BxL))
    samples = _run(model, restored.state["ema"], tokens_BxL, free_BxL, label_B)
  if jax.process_index() == 0:
    made = tokens_BxL, free_BxL, label_B, samples
    sample_files.write(model, workdir, restored.step, texts, *made)
    _tell_of_equals(model, *made)


def prepare(model: build.Model) -> tuple[list[str], np.ndarray, np.ndarray]:
  """(prompts, tokens_BxL, free_BxL) of what the config asks to sample; errors as in `sample`."""
  sampling = model.sampling
  asked = prompts.read(sampling.prompt, sampling.prompts_file)
  starts = _starts(model, asked)
  _labels(model, len(starts[0]))
  return [prompt.text for prompt in asked for _ in range(sampling.count)], *starts


def _starts(model: build.Model, asked: list[prompts.Prompt]) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and free positions before sampling."""
  dataset, count, length = model.dataset, model.sampling.count, model.sampling.length
  if model.sampling.inpaint:
    return _inpainted(model)
  if asked:
    tokens_PxL, free_PxL = prompts.parse_all(dataset, asked, length)
    return np.repeat(tokens_PxL, count, axis=0), np.repeat(free_PxL, count, axis=0)
  source = dataset.split(model.sampling.split)
  if "given" in source[0]:
    if length != dataset.length:
      raise ValueError(f"sampler.length is {length} and puzzles have {dataset.length}; unset it")
    puzzles = {}  # a puzzle with several solutions stands in a split more than once
    for item in (source[i] for i in range(len(source))):
      tokens_L = np.where(item["given"], item["x"], dataset.vocab_size)
      puzzles[tokens_L.tobytes()] = tokens_L, ~item["given"]
      if len(puzzles) == count:
        break
    tokens, free = zip(*puzzles.values(), strict=True)
    return np.stack(tokens), np.stack(free)
  shape = (count, length)
  return np.full(shape, dataset.vocab_size, np.int32), np.ones(shape, bool)


def _inpainted(model: build.Model) -> tuple[np.ndarray, np.ndarray]:
  """The first images of a split and the part of them that is painted anew."""
  shape, sampling = model.dataset.image_shape, model.sampling
  if shape is None or sampling.prompt or sampling.prompts_file:
    raise ValueError(
      f"sampler.inpaint is '{sampling.inpaint}' and "
      f"{'this data has no images' if shape is None else 'there is a prompt too'}; unset it"
    )
  source = model.dataset.split(sampling.split)
  items = [source[i] for i in range(min(sampling.count, len(source)))]
  free_BxL = np.tile(images.region(sampling.inpaint, shape), (len(items), 1))
  tokens_BxL = np.stack([item["x"] for item in items])
  return np.where(free_BxL, model.dataset.vocab_size, tokens_BxL), free_BxL


def _labels(model: build.Model, count: int) -> np.ndarray | None:
  """Classes of the samples: those of the in-painted images, those asked for in turn, or all."""
  classes, asked = model.dataset.classes, model.sampling.labels
  if any(not 0 <= label < classes for label in asked):
    raise ValueError(
      f"sampler.labels are {asked} and the model knows "
      + (
        f"classes 0 to {classes - 1}" if classes else "no classes; set data.class_conditional=True"
      )
    )
  if not classes:
    return None
  if model.sampling.inpaint and not asked:
    source = model.dataset.split(model.sampling.split)
    return np.array([source[i]["label"] for i in range(count)], np.int32)
  return np.resize(np.array(asked or range(classes), np.int32), count)


def _run(
  model: build.Model, params: Any, tokens_BxL, free_BxL, label_B: np.ndarray | None = None
) -> samplers.Samples:
  """Samples in batches of at most the configured size, the last one filled up."""
  sampling, count = model.sampling, len(tokens_BxL)
  size = partitioning.round_up(model.mesh, min(model.run.batch_size, count))
  fill = jax.jit(functools.partial(steps.sample_step, **model.filling()))
  fitting = model.objective.latent_refresh
  if isinstance(model.network, networks.LatentNetwork) and sampling.latent_refresh != fitting:
    say(
      f"Warning: sampler.latent_refresh is '{sampling.latent_refresh}' and this model was trained "
      f"for '{fitting}'; its samples are not those of the model that is evaluated."
    )
  _warn_of_order(model, tokens_BxL, free_BxL)
  key = rngs.stream(model.seed, 0, "sample")
  done, share = [], partitioning.share(model.mesh)
  for start in range(0, count, size):
    cut = np.minimum(start + np.arange(size), count - 1).reshape(share["parts"], -1)
    rows = cut[list(share["own"])].reshape(-1)
    arrays = {
      "x_BxL": tokens_BxL[rows],
      "given_BxL": ~free_BxL[rows],
      "weight_B": np.ones(len(rows), np.float32),
      "index_B": rows.astype(np.int32),
    }
    if label_B is not None:
      arrays["label_B"] = label_B[rows]
    batch = partitioning.put_batch(model.mesh, arrays)
    done.append(partitioning.to_host(fill(params, batch, key)))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *done)


def _warn_of_order(model: build.Model, tokens_BxL, free_BxL) -> None:
  """Says what a network that decodes from left to right cannot do."""
  if build.sees(model.network) == "all":
    return
  length, trained = tokens_BxL.shape[1], model.dataset.length
  if length > trained:
    say(f"Warning: samples of {length} tokens, and the network was trained on {trained}.")
  size = getattr(model.network, "block_size", None) or 1
  has = lambda is_there_BxL: is_there_BxL.reshape(len(is_there_BxL), -1, size).any(-1)
  is_given_BxK = has(~free_BxL & (tokens_BxL != model.dataset.vocab_size))
  is_before_BxK = np.cumsum(has(free_BxL), axis=1) - has(free_BxL) > 0
  if (is_given_BxK & is_before_BxK).any():
    say(
      "Warning: this network decodes from left to right; given tokens do not inform the free ones "
      "of earlier blocks."
      if size > 1
      else "Warning: this network decodes from left to right; given tokens do not inform the free "
      "ones to their left."
    )


def _tell_of_equals(model, tokens_BxL, free_BxL, label_B, samples: samplers.Samples) -> None:
  """Says so where samples of one start are all the same because nothing is drawn."""
  if getattr(model.sampling.step, "temperature", 1.0) > 0:
    return
  starts = [tokens_BxL, free_BxL] + ([] if label_B is None else [label_B[:, None]])
  different = lambda arrays: len({row.tobytes() for row in np.hstack(arrays)})
  kinds, count = different(starts), len(tokens_BxL)
  if kinds == different([*starts, samples.x_BxL]) < count:
    say(
      f"The samples of a start are all the same, {kinds} in {count}: at sampler.temperature=0 no "
      "token is drawn. Set it above 0, or sampler.count=1."
    )
