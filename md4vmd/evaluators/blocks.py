"""Exact law of decoding in blocks, left to right, with a given number of network calls."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from md4vmd import networks, partitioning, rngs
from md4vmd.build import Model, require_all, require_one_schedule
from md4vmd.evaluators.enumeration import latent_values

_SEQUENCES_AT_ONCE = 2**15
_FOLDS = 10  # of the latent draws, for the standard error

Path = tuple[tuple[int, ...], ...]  # the positions of every call


class Visible(NamedTuple):
  """The states of one set of visible positions: what is seen, and which one each example is in."""

  zt_UxL: np.ndarray
  state_M: np.ndarray


def paths(length: int, blocks: int, calls: int) -> list[Path]:
  """Every order of revealing equal blocks from left to right, equal parts of a block per call.

  Raises:
    ValueError: blocks or calls do not divide.
  """
  if blocks < 1 or length % blocks or calls % blocks or (length // blocks) % (calls // blocks):
    raise ValueError(
      f"evaluators.blocks.cells: {length} tokens cannot be decoded in {blocks} equal blocks with "
      f"{calls} equal calls"
    )
  size, parts = length // blocks, calls // blocks
  within = {
    tuple(tuple(sorted(order[i * size // parts : (i + 1) * size // parts])) for i in range(parts))
    for order in itertools.permutations(range(size))
  }
  shifted = [
    [tuple(tuple(b * size + n for n in part) for part in path) for path in sorted(within)]
    for b in range(blocks)
  ]
  return [sum(choice, start=()) for choice in itertools.product(*shifted)]


class Blocks:
  """Accuracy and KL(data || model) of decoding in blocks, for data with a support.

  A call reveals equal parts of a block in random order, all its tokens from one network call and
  one latent, which the next call draws anew. The probability of every example is averaged over
  all orders; within a call it is averaged over the latent, exactly for enumerated latents and
  models without one, over at least `draws` draws for each set of visible positions otherwise.

  Args:
    model: what the config built; its dataset lists `support_MxL` and `probabilities_M`.
    cells: pairs (number of blocks, network calls in all).
    draws: latent draws.
  """

  def __init__(
    self,
    model: Model,
    cells: tuple[tuple[int, int], ...] = ((1, 1), (1, 4), (2, 2), (2, 4)),
    draws: int = 100_000,
  ):
    require_all(model, "evaluators.blocks")
    require_one_schedule(model, "evaluators.blocks")
    if model.dataset.support_MxL is None:
      raise ValueError("evaluators.blocks needs data whose support is known, such as 'synthetic'")
    if model.objective.latent_refresh != "step" and isinstance(
      model.network, networks.LatentNetwork
    ):
      raise ValueError(
        "evaluators.blocks draws a latent at every call and this objective holds one; set "
        "run.evaluators to the others"
      )
    self.model, self.draws = model, draws
    self.x_MxL = np.asarray(model.dataset.support_MxL)
    self.cells = {cell: paths(self.x_MxL.shape[1], *cell) for cell in map(tuple, cells)}
    self._reveal = jax.jit(self._revealed, static_argnames="count")

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Figures per cell, named blocks/b<blocks>_nfe<calls>_: shares in [0, 1], nats."""
    del step
    q = np.asarray(self.model.dataset.probabilities_M, np.float64)
    chances = self._chances(params)
    figures: dict[str, Any] = {}
    for (blocks, calls), cell in self.cells.items():
      name = f"blocks/b{blocks}_nfe{calls}"
      p_FxM, argmax_FxM = (_law(cell, chances, kind) for kind in (0, 1))
      kl = lambda p_M: float(np.sum(q * (np.log(q) - np.log(np.maximum(p_M, 1e-300)))))
      figures |= {
        f"{name}_accuracy": float(p_FxM[-1].sum()),
        f"{name}_accuracy_argmax": float(argmax_FxM[-1].sum()),
        f"{name}_kl_nats": kl(p_FxM[-1]),
        f"{name}_kl_nats_standard_error": _jackknife([kl(p_M) for p_M in p_FxM[:-1]]),
      }
    convention = "exact law of decoding in blocks, a latent per call, averaged over latents"
    return figures | {"convention": convention, "latent_draws": self.draws}

  def _chances(self, params):
    """(visible set, revealed set) -> [2, F + 1, M]: P(revealed | visible), by folds left out.

    Kind 0 draws tokens from mu, kind 1 takes the most probable ones given the latent. The last
    row uses all draws.
    """
    needed: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for path in itertools.chain(*self.cells.values()):
      for i, revealed in enumerate(path):
        visible = tuple(sorted(sum(path[:i], start=())))
        needed.setdefault(visible, set()).add(revealed)
    key = rngs.stream(self.model.seed, 0, "blocks")
    chances = {}
    for number, (visible, sets) in enumerate(sorted(needed.items())):
      states = self._states(visible)
      order = sorted(sets)
      is_revealed_RxL = np.array([np.isin(np.arange(self.x_MxL.shape[1]), r) for r in order])
      at_once = min(_SEQUENCES_AT_ONCE, -(-self.draws // _FOLDS))
      count = -(-at_once // len(states.zt_UxL))
      rounds = -(-self.draws // (count * len(states.zt_UxL) * _FOLDS)) * _FOLDS
      sums_FxKxMxR = np.zeros((_FOLDS, 2, len(self.x_MxL), len(order)))
      for i in range(rounds):
        key_i = jax.random.fold_in(jax.random.fold_in(key, number), i)
        revealed = self._reveal(
          params, states.zt_UxL, states.state_M, is_revealed_RxL, key_i, count=count
        )
        mean_KxMxR, is_exact = partitioning.to_host(revealed)
        sums_FxKxMxR[i % _FOLDS] += mean_KxMxR.astype(np.float64) / rounds
        if is_exact:
          sums_FxKxMxR[:] = mean_KxMxR.astype(np.float64) / _FOLDS
          break
      total = sums_FxKxMxR.sum(0)
      left_out = (total - sums_FxKxMxR) * _FOLDS / (_FOLDS - 1)
      by_fold = np.concatenate([left_out, total[None]])
      for r, revealed in enumerate(order):
        chances[visible, revealed] = np.moveaxis(by_fold[..., r], 1, 0)
    return chances

  def _states(self, visible: tuple[int, ...]) -> Visible:
    is_visible_L = np.isin(np.arange(self.x_MxL.shape[1]), visible)
    zt_MxL = np.where(is_visible_L, self.x_MxL, self.model.dataset.vocab_size)
    zt_UxL, state_M = np.unique(zt_MxL, axis=0, return_inverse=True)
    return Visible(zt_UxL, state_M.reshape(-1))

  def _revealed(self, params, zt_UxL, state_M, is_revealed_RxL, key, *, count):
    """mean_KxMxR over latents of P(x_S | x_t, z) and of whether x_S is most probable; exact?"""
    fns = networks.bind(self.model.network, params)
    key_U = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(zt_UxL)))
    values = latent_values(fns, zt_UxL, key_U, count)
    draws = values.log_weight_UxK.shape[1]
    masked_L = (zt_UxL == self.model.dataset.vocab_size)[0]
    t_U = self.model.schedule.alpha_inverse(1.0 - masked_L.mean() * jnp.ones(len(zt_UxL)))
    repeat = lambda array: jnp.repeat(array, draws, axis=0)
    logits = fns.denoise(repeat(zt_UxL), repeat(t_U[:, None]), **values.inputs).logits()
    logits_UxKxLxV = logits.reshape(len(zt_UxL), draws, *logits.shape[1:])
    log_mu_UxKxLxV = jax.nn.log_softmax(logits_UxKxLxV)
    first_UxKxL = jnp.argmax(logits_UxKxLxV, axis=-1)

    def of_example(state, x_L):
      log_mu_KxL = jnp.take_along_axis(log_mu_UxKxLxV[state], x_L[None, :, None], axis=-1)[..., 0]
      is_first_KxL = first_UxKxL[state] == x_L[None]
      log_p_KxR = log_mu_KxL @ is_revealed_RxL.T.astype(log_mu_KxL.dtype)
      all_first_KxR = (is_first_KxL[:, None] | ~is_revealed_RxL[None]).all(-1)
      weight_K = jnp.exp(values.log_weight_UxK[state])
      return jnp.stack([weight_K @ jnp.exp(log_p_KxR), weight_K @ all_first_KxR])

    mean_MxKxR = jax.lax.map(
      lambda example: of_example(*example), (state_M, jnp.asarray(self.x_MxL)), batch_size=8
    )
    return jnp.swapaxes(mean_MxKxR, 0, 1), values.is_exact


def _law(cell: list[Path], chances: Any, kind: int) -> np.ndarray:
  """p_FxM: probability of every example, the mean over paths of the product over calls."""
  laws = []
  for path in cell:
    law: Any = 1.0
    for i, revealed in enumerate(path):
      law = law * chances[tuple(sorted(sum(path[:i], start=()))), revealed][kind]
    laws.append(law)
  return np.mean(laws, axis=0)


def _jackknife(values: list[float]) -> float:
  """Standard error of a figure from its values with one fold of the draws left out."""
  count, deviations = len(values), np.array(values) - np.mean(values)
  return float(np.sqrt((count - 1) / count * np.sum(np.square(deviations))))
