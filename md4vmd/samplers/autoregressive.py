"""Decoding from left to right, token after token or block after block, behind a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from md4vmd import rngs
from md4vmd.interfaces import ModelFns, Plan, SamplerStep, Schedule
from md4vmd.samplers import loop


def sample_tokens(
  key: jax.Array,
  fns: ModelFns,
  schedule: Schedule,
  step: SamplerStep,
  *,
  tokens_BxL: jax.Array,
  free_BxL: jax.Array,
  vocab_size: int,
  label_B: jax.Array | None = None,
  index_B: jax.Array | None = None,
) -> loop.Samples:
  """Fills the free positions one by one, each given all tokens to its left.

  Given tokens never change; those to the right of a position do not inform it. Position n costs
  network call n, which reads the token before it. The rule of unmasking draws the token; one
  position leaves it no order to choose.

  Args:
    key: as in `samplers.sample`; the draw at a position also depends on the position.
    fns: a network that sees the tokens to the left.
    schedule: read by rules that count what to reveal.
    step: the rule.
    tokens_BxL: given tokens, the mask id V at positions that stay unknown.
    free_BxL: True at the positions to fill.
    vocab_size: V.
    label_B: classes, for class-conditional networks.
    index_B: number of each sequence; its place in the batch by default.
  """
  assert fns.init_cache is not None
  batch, length = tokens_BxL.shape
  key_B = loop.sequence_keys(key, batch, index_B)
  place_1xL = jnp.arange(length, dtype=jnp.int32)[None]
  call_BxL = jnp.where(free_BxL, place_1xL, -1)
  calls_B = call_BxL.max(-1) + 1
  ends = jnp.zeros(batch), jnp.ones(batch)  # the whole way from masked to clean in one step

  def advance(carry):
    n, read_Bx1, x_BxL, cache = carry
    prediction, cache = fns.denoise(read_Bx1, None, label_B=label_B, cache=cache)
    here = lambda array_BxL: jax.lax.dynamic_slice_in_dim(array_BxL, n, 1, axis=1)
    is_free_Bx1 = here(free_BxL)
    plan = Plan(*ends, is_free_Bx1)
    key_n_B = rngs.fold_each(key_B, n)
    x_Bx1 = step.fill(key_n_B, here(x_BxL), is_free_Bx1, prediction, plan, schedule)
    return n + 1, x_Bx1, jax.lax.dynamic_update_slice_in_dim(x_BxL, x_Bx1, n, axis=1), cache

  x_BxL = jnp.where(free_BxL, vocab_size, tokens_BxL).astype(jnp.int32)
  first_Bx1 = jnp.full((batch, 1), vocab_size, jnp.int32)
  start = (jnp.zeros((), jnp.int32), first_Bx1, x_BxL, fns.init_cache(batch, length))
  _, _, x_BxL, _ = jax.lax.while_loop(lambda carry: carry[0] < calls_B.max(), advance, start)
  return loop.Samples(x_BxL, call_BxL, calls_B)


def sample_blocks(
  key: jax.Array,
  fns: ModelFns,
  schedule: Schedule,
  step: SamplerStep,
  times: jax.Array,
  *,
  tokens_BxL: jax.Array,
  free_BxL: jax.Array,
  vocab_size: int,
  label_B: jax.Array | None = None,
  index_B: jax.Array | None = None,
  latent_refresh: str = "block",
) -> loop.Samples:
  """Fills block after block, each by `samplers.sample` over the whole grid (arXiv 2503.09573).

  A block sees the given tokens of its own and of earlier blocks, none of later ones. Calls are
  numbered through all blocks. Reading a finished block into the cache predicts nothing and is not
  counted. The arguments are those of `samplers.sample`; a latent belongs to its block.

  Raises:
    ValueError: blocks that do not divide the length.
  """
  assert fns.init_cache is not None and fns.block_size is not None
  batch, length = tokens_BxL.shape
  if length % fns.block_size:
    raise ValueError(f"blocks of {fns.block_size} tokens do not divide a sequence of {length}")
  index_B = jnp.arange(batch) if index_B is None else index_B

  def advance(carry, block):
    cache, calls_B = carry
    number, tokens_BxS, free_BxS = block
    done = loop.sample(
      jax.random.fold_in(key, number),
      ModelFns(
        lambda *args, **inputs: fns.denoise(*args, cache=cache, **inputs)[0], prior=fns.prior
      ),
      schedule,
      step,
      times,
      tokens_BxL=tokens_BxS,
      free_BxL=free_BxS,
      vocab_size=vocab_size,
      label_B=label_B,
      index_B=index_B,
      latent_refresh=latent_refresh,
    )
    _, cache = fns.denoise(done.x_BxL, jnp.zeros((batch, 1)), label_B=label_B, cache=cache)
    call_BxS = jnp.where(done.call_BxL < 0, -1, done.call_BxL + calls_B[:, None])
    return (cache, calls_B + done.calls_B), (done.x_BxL, call_BxS)

  def cut(array_BxL):
    return jnp.moveaxis(array_BxL.reshape(batch, -1, fns.block_size), 1, 0)

  blocks = jnp.arange(length // fns.block_size), cut(tokens_BxL), cut(free_BxL)
  start = fns.init_cache(batch, length), jnp.zeros(batch, jnp.int32)
  (_, calls_B), filled = jax.lax.scan(advance, start, blocks)
  x_BxL, call_BxL = (jnp.moveaxis(each, 0, 1).reshape(batch, length) for each in filled)
  return loop.Samples(x_BxL, call_BxL, calls_B)
