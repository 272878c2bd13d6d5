"""FID: how far the features of samples lie from those of images (arXiv 1706.08500)."""

from __future__ import annotations

import functools
import pathlib
import zipfile
import zlib
from typing import Any

import jax
import numpy as np

from md4vmd import build, partitioning, rngs, steps, weights
from md4vmd.evaluators import walk
from md4vmd.networks import inception


class FID:
  """The Frechet distance between normal distributions of Inception features.

  Samples are made as config.sampler says, with classes in turn where the model has classes.

  Args:
    model: what the config built; its dataset holds images of 3 channels.
    weights_path: a safetensors file with the arrays of pt_inception-2015-12-05 by their names; ""
      measures nothing.
    count: samples. The figure falls as it grows: compare equal counts alone, published ones 50,000.
    split: images that the samples are compared with.
    statistics: an npz with the `mu` and `sigma` of other images, in place of the split's; "" for
      none.
    limit: images of the split, the first ones; None takes all.

  Raises:
    ValueError: files that do not hold what they should, data that is no such images, or fewer than
      two samples or images.
  """

  def __init__(
    self,
    model: build.Model,
    weights_path: str = "",
    count: int = 50_000,
    split: str = "train",
    statistics: str = "",
    limit: int | None = None,
  ):
    shape = model.dataset.image_shape
    if shape is None or shape[2] != 3 or model.dataset.vocab_size != 256:
      raise ValueError(
        "evaluators.fid needs images of 3 channels; set run.evaluators to the others"
      )
    if count < 2 or (limit is not None and limit < 2):
      raise ValueError(f"evaluators.fid: count is {count} and limit {limit}; a covariance needs 2")
    self.model, self.count, self.limit = model, count, limit
    self.source = model.dataset.split(split)
    self.about = statistics or f"the images of {split}"
    self._reference = read_moments(statistics) if statistics else None
    self._params = None
    if weights_path:
      read = inception.read(weights.read_arrays(pathlib.Path(weights_path)))
      self._params = jax.device_put(read, partitioning.replicated(model.mesh))
    self._features = jax.jit(
      lambda params, x_BxL: inception.Inception().apply(
        {"params": params}, x_BxL.reshape(-1, *shape)
      )
    )
    self._sample = jax.jit(functools.partial(steps.sample_step, **model.filling()))

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """FID, number of samples and their network calls on average."""
    del step
    if self._params is None:
      return {
        "convention": "no FID without the weights of Inception, which are not ours to ship: set "
        "evaluators.fid.weights_path to pt_inception-2015-12-05 as safetensors"
      }
    key = rngs.stream(self.model.seed, 0, "fid")

    def draw(batch):
      samples = self._sample(params, batch, key)
      return self._features(self._params, samples.x_BxL), samples.calls_B

    blank = walk.Blank(self.count, self.model.dataset)
    features_NxF, calls_N = walk.over(self.model, blank, draw)
    if self._reference is None:
      look = lambda batch: self._features(self._params, batch.x_BxL)
      self._reference = moments(walk.over(self.model, self.source, look, limit=self.limit))
    return {
      "samples/fid": frechet(*moments(features_NxF), *self._reference),
      "samples/count": self.count,
      "samples/network_calls_mean": float(calls_N.mean()),
      "convention": f"FID of pt_inception-2015-12-05, {self.count} samples against {self.about}",
    }


def moments(features_NxF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(mean_F, covariance_FxF) in float64, the covariance over N - 1."""
  wide_NxF = features_NxF.astype(np.float64)
  return wide_NxF.mean(0), np.cov(wide_NxF, rowvar=False)


def frechet(
  mean_F: np.ndarray, cov_FxF: np.ndarray, other_mean_F: np.ndarray, other_cov_FxF: np.ndarray
) -> float:
  """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two normal distributions.

  The trace of the root is that of the symmetric (C^(1/2) C' C^(1/2))^(1/2), whose eigenvalues are
  real; what rounding leaves below 0 counts as 0.
  """
  values_F, vectors_FxF = np.linalg.eigh(cov_FxF)
  root_FxF = vectors_FxF * np.sqrt(np.maximum(values_F, 0.0))[None, :]
  inner_F = np.linalg.eigvalsh(root_FxF.T @ other_cov_FxF @ root_FxF)
  trace = np.trace(cov_FxF) + np.trace(other_cov_FxF) - 2 * np.sqrt(np.maximum(inner_F, 0)).sum()
  return float(np.square(mean_F - other_mean_F).sum() + trace)


def read_moments(path: str) -> tuple[np.ndarray, np.ndarray]:
  """The `mu` and `sigma` of an npz.

  Raises:
    ValueError: no such file, no npz or a damaged one, or other arrays.
  """
  try:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
      raise ValueError("it is one array and no npz")
    with loaded as file:
      mean_F, cov_FxF = (file[name].astype(np.float64) for name in ("mu", "sigma"))
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f"evaluators.fid.statistics: {path} has no mu and sigma: {error}") from error
  size = inception.FEATURES
  if mean_F.shape != (size,) or cov_FxF.shape != (size, size):
    raise ValueError(
      f"evaluators.fid.statistics: {path} has a mu of {mean_F.shape} and a sigma of "
      f"{cov_FxF.shape}; features are {size}"
    )
  return mean_F, cov_FxF
