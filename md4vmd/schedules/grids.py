"""Grids of times from 1 (all masked) down to 0 (clean)."""

import jax
import jax.numpy as jnp

GRIDS = {
  "uniform": lambda u: 1.0 - u,
  "cosine": lambda u: jnp.cos(jnp.pi / 2 * u),  # MD4, section 4: more steps while much is masked
}


def times(grid: str, steps: int) -> jax.Array:
  """[steps + 1] decreasing times, the first exactly 1 and the last exactly 0.

  Raises:
    ValueError: an unknown grid or fewer than one step.
  """
  if grid not in GRIDS:
    raise ValueError(f"sampler grid is '{grid}'; it must be one of {', '.join(GRIDS)}")
  if steps < 1:
    raise ValueError(f"sampler steps is {steps}; it must be at least 1")
  return GRIDS[grid](jnp.arange(steps + 1) / steps).at[-1].set(0.0)
