"""Binds a network to its parameters as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax

from md4vmd.interfaces import ModelFns
from md4vmd.networks.latent import LatentNetwork
from md4vmd.networks.token_power import TokenPowerNetwork
from md4vmd.networks.transformer import Transformer


def bind(network: nn.Module, params: Any) -> ModelFns:
  """The roles that `network` plays with these parameters."""
  apply = cast(Callable[..., Any], network.apply)

  def denoise(
    zt_BxL: jax.Array,
    t_BxG: jax.Array | None,
    *,
    label_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    **inputs: Any,
  ) -> Any:
    return apply(
      {"params": params},
      zt_BxL,
      t_BxG,
      label_B=label_B,
      deterministic=dropout_key is None,
      rngs=None if dropout_key is None else {"dropout": dropout_key},
      **inputs,
    )

  def role(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays, **inputs: apply({"params": params}, *arrays, method=method, **inputs)

  fns = ModelFns(denoise)
  if isinstance(network, TokenPowerNetwork):
    return fns._replace(token_power=role(network.token_power))
  if isinstance(network, Transformer | LatentNetwork) and network.attends != "all":
    fns = fns._replace(init_cache=network.empty_cache, block_size=network.block_size)
  if not isinstance(network, LatentNetwork):
    return fns
  return fns._replace(
    encode=role(network.encode) if network.family.has_posterior else None,
    prior=role(network.prior),
  )
