"""Choosing one token per row of logits."""

import jax
import jax.numpy as jnp


def draw(
  logits_KxV: jax.Array, u_K: jax.Array, *, temperature: float = 1.0, top_p: float = 1.0
) -> jax.Array:
  """One token per row by inverse CDF, which keeps the tail that float32 Gumbel noise loses.

  Args:
    logits_KxV: float32 logits; -inf is never drawn.
    u_K: one uniform in [0, 1) per row.
    temperature: divides the logits; 0 takes the most probable token.
    top_p: keeps the smallest set of most probable tokens that holds this mass.
  """
  if temperature == 0.0:
    return jnp.argmax(logits_KxV, axis=-1).astype(jnp.int32)
  mu_KxV = jax.nn.softmax(logits_KxV / temperature, axis=-1)
  if top_p < 1.0:
    sorted_KxV = -jnp.sort(-mu_KxV, axis=-1)
    before_KxV = jnp.cumsum(sorted_KxV, axis=-1) - sorted_KxV
    least_K = jnp.min(jnp.where(before_KxV < top_p, sorted_KxV, jnp.inf), axis=-1)
    mu_KxV = jnp.where(mu_KxV >= least_K[:, None], mu_KxV, 0.0)
  # A parallel sum is not exactly monotone: only tokens that can be drawn set levels and the total.
  cdf_KxV = jnp.where(mu_KxV > 0, jnp.cumsum(mu_KxV, axis=-1), 0.0)
  total_K = cdf_KxV.max(-1)
  # u * total may round up to the total itself; stay below it, so that some token lies above.
  level_K = jnp.minimum(u_K * total_K, jnp.nextafter(total_K, 0.0))
  return jnp.argmax(cdf_KxV > level_K[:, None], axis=-1).astype(jnp.int32)


def check(temperature: float, top_p: float) -> None:
  """Refuses settings that `draw` has no meaning for.

  Raises:
    ValueError: a negative temperature, or a top_p outside (0, 1].
  """
  if temperature < 0:
    raise ValueError(f"sampler temperature is {temperature}; it must be 0 (argmax) or positive")
  if not 0 < top_p <= 1:
    raise ValueError(f"sampler top_p is {top_p}; it must be in (0, 1], and 1 keeps every token")
