"""Share of Sudoku puzzles that a model completes, by order of unmasking and network calls."""

from __future__ import annotations

import functools
from typing import Any

import jax

from md4vmd import build, rngs, samplers, steps
from md4vmd.data.sudoku_rules import is_solved
from md4vmd.evaluators import walk


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
      raise ValueError("evaluators.sudoku needs Sudoku boards; set run.evaluators to the others")
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
    source = self.model.dataset.split(split)
    if "given" not in source[0]:
      raise ValueError(
        f"evaluators.sudoku: the split '{split}' has no clues; score a split with puzzles"
      )
    key = rngs.stream(self.model.seed, 0, "sudoku")

    def measure(batch):
      boards = {solver: solve(params, batch, key).x_BxL for solver, solve in self._solvers.items()}
      return boards, batch.x_BxL, batch.given_BxL

    boards, x_NxL, given_NxL = walk.over(self.model, source, measure, limit=self.limit)
    clues, puzzles = int(given_NxL.sum()), len(x_NxL)
    figures = {
      f"{split}/solved_{order}_nfe{count}": float(is_solved(board_NxL, x_NxL, given_NxL).mean())
      for (order, count), board_NxL in boards.items()
    }
    return figures | {f"{split}/puzzles": puzzles, f"{split}/clues_mean": clues / puzzles}
