"""Binds a network to its parameters as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax

from md4vmd.interfaces import ModelFns, Prediction


def bind(network: nn.Module, params: Any) -> ModelFns:
  """The roles that `network` plays with these parameters."""

  def denoise(
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None,
    *,
    label_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> Prediction:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    apply = cast(Callable[..., Prediction], network.apply)
    return apply(
      {"params": params},
      zt_BxL,
      t_BxG,
      label_B=label_B,
      deterministic=dropout_key is None,
      rngs=rngs,
    )

  return ModelFns(denoise=denoise)
