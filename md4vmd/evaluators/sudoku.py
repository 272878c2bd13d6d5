"""Share of Sudoku puzzles that a model completes, by order of unmasking and network calls."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from md4vmd import build, data, partitioning, rngs, samplers, steps
from md4vmd.data.sudoku_rules import is_solved


class Sudoku:
  """A puzzle is solved if the grid obeys the rules and keeps the clues.

  Args:
    model: what the config built; its dataset holds boards.
    splits: splits with clues.
    orders: names of samplers.
    calls: numbers of network calls (NFE); "ancestral" may need fewer.
    limit: puzzles per split, the first ones; None takes all.
    temperature: of the digits; 0 takes the most probable one.
    grid: grid of times, which decides how many cells each call fills.
  """

  def __init__(
    self,
    model: build.Model,
    splits: tuple[str, ...] = ("valid",),
    orders: tuple[str, ...] = ("margin", "top_prob"),
    calls: tuple[int, ...] = (1, 2, 5),
    limit: int | None = None,
    temperature: float = 0.0,
    grid: str = "uniform",
  ):
    if not hasattr(model.dataset, "size"):
      raise ValueError("evaluators.sudoku needs Sudoku boards; remove it from config.evaluators")
    build.require_all(model, "evaluators.sudoku")
    build.require_one_schedule(model, "evaluators.sudoku")
    self.model, self.splits, self.limit = model, splits, limit
    self._solvers = {
      (order, count): jax.jit(
        functools.partial(
          steps.sample_step,
          network=model.network,
          schedule=model.schedule,
          sampler=build.sampler(order, temperature=temperature),
          times=samplers.times(grid, count),
          vocab_size=model.dataset.vocab_size,
          latent_refresh=model.sampling.latent_refresh,
        )
      )
      for order in orders
      for count in calls
    }

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Solved share per split, order and number of calls; mean number of clues; puzzles."""
    del step
    figures: dict[str, Any] = {}
    for split in self.splits:
      figures |= self._run_split(split, params)
    return figures | {"convention": "solved: valid grid that keeps the clues"}

  def _run_split(self, split, params):
    solved: dict[tuple[str, int], list[np.ndarray]] = {solver: [] for solver in self._solvers}
    clues, puzzles = 0, 0
    batches = data.evaluation_batches(
      self.model.dataset.split(split),
      batch_size=self.model.run.batch_size,
      limit=self.limit,
      **partitioning.share(self.model.mesh),
    )
    key = rngs.stream(self.model.seed, 0, "sudoku")
    for arrays in batches:
      if "given_BxL" not in arrays:
        raise ValueError(
          f"evaluators.sudoku: the split '{split}' has no clues; score a split with puzzles"
        )
      batch = partitioning.put_batch(self.model.mesh, arrays)
      host = partitioning.to_host(batch)
      is_real_B = host.weight_B > 0
      clues += int(host.given_BxL[is_real_B].sum())
      puzzles += int(is_real_B.sum())
      for solver, solve in self._solvers.items():
        board_BxL = partitioning.to_host(solve(params, batch, key).x_BxL)
        solved[solver].append(is_solved(board_BxL, host.x_BxL, host.given_BxL)[is_real_B])
    figures = {
      f"{split}/solved_{order}_nfe{count}": float(np.concatenate(hits).mean())
      for (order, count), hits in solved.items()
    }
    return figures | {f"{split}/puzzles": puzzles, f"{split}/clues_mean": clues / puzzles}
