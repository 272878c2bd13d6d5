"""Blocks of one shape over stacked parameters; many are a loop, so that one is compiled for all."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}
# So few blocks are written out, by whether they are rematerialised. They compile about as fast, and
# a loop copies what it keeps for the backward pass; three narrow blocks written out take half the
# time of a step on CPUs. What is computed again needs a loop to save memory.
FEW = {False: 4, True: 2}


def stacked(body: Any, depth: int, *, remat: str, shared: int, reverse: bool = False) -> Any:
  """The loop of `depth` blocks, each rematerialised as `remat` says: what `nn.scan` returns.

  Args:
    body: a module class, or a function of a module, that maps (carry, the block's slice of an
      input, *inputs that all blocks share) to (carry, the block's slice of an output).
    depth: number of blocks, axis 0 of the parameters, of the sliced input and of the output.
    remat: a key of REMAT.
    shared: number of inputs that all blocks share; the last one is static.
    reverse: the last block comes first.
  """
  policy = REMAT[remat]
  is_written_out = depth <= FEW[policy is not None]
  if policy is not None:
    # Only a loop keeps the compiler from merging what is computed twice.
    body = nn.remat(body, policy=policy, prevent_cse=is_written_out, static_argnums=(2 + shared,))
  return nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(0, *[nn.broadcast] * shared),  # pyright: ignore[reportArgumentType]
    length=depth,
    reverse=reverse,
    unroll=depth if is_written_out else 1,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
