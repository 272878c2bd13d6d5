"""From sums of nats to figures for people: the one place with ratios, bits and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

_LN2 = math.log(2.0)
DRAWS = (1, 4, 16, 64)  # numbers of draws whose standard error is foretold


def report(prefix: str, name: str, nats: float, tokens: float) -> dict[str, float]:
  """Figures of `nats` spent on `tokens`, named prefix/name_unit."""
  per_token = nats / tokens
  return {
    f"{prefix}/{name}_nats_per_token": per_token,
    f"{prefix}/{name}_bits_per_token": per_token / _LN2,
  }


def train_report(sums: Mapping[str, float], tokens: float, steps: int) -> dict[str, float]:
  """Figures of a span of training.

  Args:
    sums: the train step's metrics, summed over the span.
    tokens: scored tokens of the span.
    steps: steps of the span.
  """
  figures = {
    "train/loss_nats_per_token": sums["loss_nats"] / tokens,
    "train/gradient_norm": sums["gradient_norm"] / steps,
    "train/parameter_norm": sums["parameter_norm"] / steps,
  }
  for name, nats in sums.items():
    if name == "nelbo_nats":
      figures |= report("train", "nelbo", nats, tokens)
    elif name.startswith("part_"):
      figures[f"train/{name.removeprefix('part_')}_per_token"] = nats / tokens
  return figures


def ratio_report(
  prefix: str, nats_N: np.ndarray, tokens_N: np.ndarray, *, unit: str
) -> dict[str, float]:
  """Mean per token and its standard error over examples, in every customary unit.

  The standard error is that of a ratio estimate, sum of nats over sum of tokens, with examples
  as the independent units; it covers the draws of an example and the choice of examples.

  Args:
    prefix: split and quantity, such as "valid/nelbo".
    nats_N: nats of each example, averaged over its draws.
    tokens_N: scored tokens of each example.
    unit: what a token is: "token", "character" or "dim".
  """
  tokens = float(tokens_N.sum())
  mean = float(nats_N.sum()) / tokens
  count = len(nats_N)
  residual = float(np.square(nats_N - mean * tokens_N).sum())
  error = math.sqrt(residual * count / max(count - 1, 1)) / tokens
  figures = {
    f"{prefix}_nats_per_token": mean,
    f"{prefix}_nats_per_token_standard_error": error,
  }
  for name in dict.fromkeys(("token", unit)):
    figures[f"{prefix}_bits_per_{name}"] = mean / _LN2
    figures[f"{prefix}_bits_per_{name}_standard_error"] = error / _LN2
  return figures


def importance_nats(nats_NxK: np.ndarray) -> np.ndarray:
  """-log of the mean over k of exp(-nats), in nats: [N]."""
  return math.log(nats_NxK.shape[1]) - np.logaddexp.reduce(-nats_NxK, axis=1)


def draws_report(prefix: str, nats_NxK: np.ndarray, tokens_N: np.ndarray) -> dict[str, float]:
  """What more draws would buy: the noise of one draw, and the standard error with each of DRAWS.

  With residuals d_nk = nats_nk - mean * tokens_n, W^2 the mean over examples of their variance over
  draws and S^2 the variance of their means, examples themselves vary by B^2 = S^2 - W^2 / K, and
  K' draws have the standard error sqrt((B^2 + W^2 / K') / N). Draws count as independent; spread
  over a grid they do no worse. Nothing where K is 1, or nothing is random.

  Args:
    prefix: split and quantity, such as "valid/nelbo".
    nats_NxK: nats of each example by draw.
    tokens_N: scored tokens of each example.
  """
  count, draws = nats_NxK.shape
  per_example = float(tokens_N.mean())
  mean = float(nats_NxK.mean(1).sum()) / float(tokens_N.sum())
  residual_NxK = nats_NxK - mean * tokens_N[:, None]
  if count < 2 or (nats_NxK == nats_NxK[:, :1]).all():
    return {}
  within = float(residual_NxK.var(1, ddof=1).mean())
  between = max(float(residual_NxK.mean(1).var(ddof=1)) - within / draws, 0.0)
  error = lambda k: math.sqrt((between + within / k) / count) / per_example
  return {
    f"{prefix}_nats_per_token_deviation_of_a_draw": math.sqrt(within) / per_example,
    f"{prefix}_nats_per_token_deviation_of_examples": math.sqrt(between) / per_example,
    **{f"{prefix}_{_with_draws(k)}": error(k) for k in DRAWS},
  }


def _with_draws(count: int) -> str:
  return f"nats_per_token_standard_error_with_{count}_draws"


def draws_words(prefix: str, figures: Mapping[str, float], draws: int) -> str:
  """The standard errors that `draws_report` foretells, in a line; or why there are none."""
  errors = [figures.get(f"{prefix}_{_with_draws(count)}") for count in DRAWS]
  if draws == 1:
    return "one draw does not tell its noise: set draws to 2 or more"
  if None in errors:
    return "draws do not differ"
  shown = ", ".join(f"{k}: {error:.3g}" for k, error in zip(DRAWS, errors, strict=True))
  return f"{shown} nats per token, from {draws} draws"


def likelihood_report(
  split: str, nats_N: np.ndarray, tokens_N: np.ndarray, *, unit: str
) -> dict[str, float]:
  """Figures of a bound on -log p over a split: those of `ratio_report`, perplexity and sizes.

  Args:
    split: the split.
    nats_N: bound on -log p of each example, averaged over its draws.
    tokens_N: scored tokens of each example.
    unit: what a token is: "token", "character" or "dim".
  """
  figures = ratio_report(f"{split}/nelbo", nats_N, tokens_N, unit=unit)
  mean = figures[f"{split}/nelbo_nats_per_token"]
  return figures | {
    f"{split}/perplexity_bound": math.exp(min(mean, 700.0)),
    f"{split}/tokens": float(tokens_N.sum()),
    f"{split}/examples": float(len(nats_N)),
  }
