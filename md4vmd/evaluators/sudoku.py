"""Share of Sudoku puzzles that a model completes, by order of unmasking and network calls."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from md4vmd import build, data, rngs, samplers, sections, steps
from md4vmd.data.sudoku import blank_out
from md4vmd.data.sudoku_rules import is_solved
from md4vmd.evaluators import walk

# The sampler left out is for models with a schedule for each token, which are refused.
_ORDERS = {name: rule for name, rule in samplers.TABLE.items() if name != "token_ancestral"}


class Sudoku:
  """A puzzle is solved if the grid obeys the rules and keeps the clues.

  A puzzle that stands in the split several times, once per solution, is filled as many times; the
  solved share is its mean. Its coverage is the number of different solutions found over the number
  of times; `coverage_exact` is what draws from the data itself are expected to cover.

  Args:
    model: what the config built; its dataset holds boards.
    splits: splits with clues.
    orders: names of samplers.
    calls: numbers of network calls (NFE); "ancestral" may need fewer.
    limit: examples per split, the first ones; None takes all.
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
    for order in orders:
      sections.check_name(order, _ORDERS, "evaluators.sudoku.orders")
    sections.check_name(grid, samplers.GRIDS, "evaluators.sudoku.grid")
    if temperature < 0:
      raise ValueError(f"evaluators.sudoku.temperature is {temperature}; it must be at least 0")
    self.model, self.limit = model, limit
    self.sources = {split: _with_clues(model, split) for split in splits}
    self._solvers = {
      (order, count): jax.jit(
        functools.partial(
          steps.sample_step,
          **model.filling(
            sampler=build.sampler(order, temperature=temperature), times=samplers.times(grid, count)
          ),
        )
      )
      for order in orders
      for count in calls
    }

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Solved share per split, order and number of calls; coverage where puzzles stand several
    times; mean number of clues; puzzles."""
    del step
    figures: dict[str, Any] = {}
    for split, source in self.sources.items():
      figures |= self._run_split(split, source, params)
    return figures | {"convention": "solved: valid grid that keeps the clues"}

  def _run_split(self, split, source, params):
    key = rngs.stream(self.model.seed, 0, "sudoku")

    def measure(batch):
      boards = {solver: solve(params, batch, key).x_BxL for solver, solve in self._solvers.items()}
      return boards, batch.x_BxL, batch.given_BxL

    boards, x_NxL, given_NxL = walk.over(self.model, source, measure, limit=self.limit)
    _, puzzle_N, rows_P = np.unique(
      blank_out(x_NxL, given_NxL), axis=0, return_inverse=True, return_counts=True
    )
    puzzle_N, figures = puzzle_N.reshape(-1), {}
    for (order, count), board_NxL in boards.items():
      name = f"{order}_nfe{count}"
      solved_N = is_solved(board_NxL, x_NxL, given_NxL)
      solved_P = np.bincount(puzzle_N, solved_N) / rows_P
      figures[f"{split}/solved_{name}"] = float(solved_P.mean())
      if rows_P.max() > 1:
        found = np.unique(np.column_stack([puzzle_N, board_NxL])[solved_N], axis=0)
        distinct_P = np.bincount(found[:, 0], minlength=len(rows_P))
        figures[f"{split}/coverage_{name}"] = float(np.mean(distinct_P / rows_P))
    if rows_P.max() > 1:
      figures[f"{split}/coverage_exact"] = float(np.mean(1.0 - (1.0 - 1.0 / rows_P) ** rows_P))
    return figures | {
      f"{split}/puzzles": len(rows_P),
      f"{split}/clues_mean": float(given_NxL.sum() / len(x_NxL)),
    }


def _with_clues(model: build.Model, split: str) -> data.Source:
  source = model.dataset.split(split)
  if "given" not in source[0]:
    raise ValueError(
      f"evaluators.sudoku.splits: the split '{split}' has no clues; score a split with puzzles"
    )
  return source
