"""Sudoku as mathematics: rules, solver, puzzles and symmetries, on flat boards of size 4 or 9.

A board is an array of size**2 cells in reading order; digit d is token d-1 and a blank is `size`,
the mask id.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


@functools.cache
def units(size: int) -> np.ndarray:
  """Cell numbers of the rows, then columns, then boxes: [3 * size, size], read-only."""
  box = math.isqrt(size)
  rows = np.arange(size * size).reshape(size, size)
  boxes = rows.reshape(box, box, box, box).swapaxes(1, 2).reshape(size, size)
  cells = np.concatenate([rows, rows.T, boxes])
  cells.flags.writeable = False
  return cells


def is_valid(board_BxL: np.ndarray) -> np.ndarray:
  """True [B] where every row, column and box holds every digit once."""
  size = math.isqrt(board_BxL.shape[-1])
  is_digit_BxL = (board_BxL >= 0) & (board_BxL < size)
  bits = np.append(1 << np.arange(size, dtype=np.int16), 0).astype(np.int16)
  bit_BxL = bits[np.where(is_digit_BxL, board_BxL, size)]
  seen = np.bitwise_or.reduce(bit_BxL[:, units(size)], axis=-1)
  return (seen == (1 << size) - 1).all(-1)


def is_solved(board_BxL: np.ndarray, x_BxL: np.ndarray, given_BxL: np.ndarray) -> np.ndarray:
  """True [B] where the board obeys the rules and keeps the clues, x at the given cells.

  Any solution counts, not only x.
  """
  return is_valid(board_BxL) & ((board_BxL == x_BxL) | ~given_BxL).all(-1)


@functools.cache
def _units_of_cells(size: int) -> list[tuple[int, ...]]:
  """For each cell the numbers of its row, column and box among the units."""
  return [
    tuple(np.flatnonzero((units(size) == cell).any(1)).tolist()) for cell in range(size * size)
  ]


def solutions(puzzle_L: np.ndarray, rng: np.random.Generator | None = None) -> Iterator[list[int]]:
  """Every solution of a puzzle, one by one: backtracking on the blank with the fewest choices.

  With `rng` the digits are tried in random order. Clues that clash have no solution.
  """
  board = puzzle_L.tolist()
  size = math.isqrt(len(board))
  units_of = _units_of_cells(size)
  used = [0] * (3 * size)
  for cell, digit in enumerate(board):
    if digit < size:
      row, column, box = units_of[cell]
      if (used[row] | used[column] | used[box]) >> digit & 1:
        return
      for unit in (row, column, box):
        used[unit] |= 1 << digit
  blanks = [cell for cell, digit in enumerate(board) if digit == size]
  yield from _search(board, blanks, used, units_of, rng)


def _search(
  board: list[int],
  blanks: list[int],
  used: list[int],
  units_of: list[tuple[int, ...]],
  rng: np.random.Generator | None,
) -> Iterator[list[int]]:
  """The solutions that extend `board`; the lists are restored when it ends."""
  if not blanks:
    yield list(board)
    return
  size = len(used) // 3
  fewest, best, free = size + 1, 0, 0
  for place, cell in enumerate(blanks):
    row, column, box = units_of[cell]
    choices = ~(used[row] | used[column] | used[box]) & ((1 << size) - 1)
    count = choices.bit_count()
    if count < fewest:
      fewest, best, free = count, place, choices
      if count <= 1:
        break
  if not free:
    return
  cell = blanks[best]
  blanks[best] = blanks[-1]
  blanks.pop()
  row, column, box = units_of[cell]
  for digit in range(size) if rng is None else rng.permutation(size).tolist():
    bit = 1 << digit
    if free & bit:
      board[cell] = digit
      used[row] ^= bit
      used[column] ^= bit
      used[box] ^= bit
      yield from _search(board, blanks, used, units_of, rng)
      used[row] ^= bit
      used[column] ^= bit
      used[box] ^= bit
  board[cell] = size
  blanks.append(cell)


def count_solutions(puzzle_L: np.ndarray, limit: int = 2) -> int:
  """Number of solutions, counted up to `limit`."""
  return sum(1 for _ in itertools.islice(solutions(puzzle_L), limit))


@functools.cache
def all_grids_4x4() -> np.ndarray:
  """The 288 full grids of size 4, in lexicographic order: uint8 [288, 16], read-only."""
  grids = np.array(sorted(solutions(np.full(16, 4))), np.uint8)
  grids.flags.writeable = False
  return grids


def random_grid(size: int, rng: np.random.Generator) -> np.ndarray:
  """A random full grid [L], uint8: any may come, of size 9 not all with the same probability."""
  return np.array(next(solutions(np.full(size * size, size), rng)), np.uint8)


def remove_clues(
  grid_L: np.ndarray, clues: int, rng: np.random.Generator, *, unique: bool
) -> np.ndarray:
  """Blanks random cells of a grid until `clues` are left; returns given_L.

  With `unique` a cell stays where its removal would allow a second solution, so that more clues
  than asked for may be left.
  """
  blank = math.isqrt(len(grid_L))
  puzzle_L = grid_L.copy()
  left = len(grid_L)
  for cell in rng.permutation(len(grid_L)).tolist():
    if left == clues:
      break
    puzzle_L[cell] = blank
    if unique and _allows_other(puzzle_L, cell, int(grid_L[cell])):
      puzzle_L[cell] = grid_L[cell]
    else:
      left -= 1
  return puzzle_L < blank


def _allows_other(puzzle_L: np.ndarray, cell: int, digit: int) -> bool:
  """True where the puzzle can be solved with another digit than `digit` in the cell."""
  trial_L = puzzle_L.copy()
  for other in range(math.isqrt(len(puzzle_L))):
    trial_L[cell] = other
    if other != digit and count_solutions(trial_L, limit=1):
      return True
  return False


class Puzzles(NamedTuple):
  """Every puzzle that some sets of clue cells make of some grids.

  The solutions of puzzle p are the grids `grid_N[start_P[p] : start_P[p] + count_P[p]]`, and its
  clues are the cells of set `cells_P[p]`.
  """

  grid_N: np.ndarray
  start_P: np.ndarray
  count_P: np.ndarray
  cells_P: np.ndarray


def enumerate_puzzles(grid_MxL: np.ndarray, given_SxL: np.ndarray) -> Puzzles:
  """Groups the grids that agree on a set of cells, for each of the S sets: these are the puzzles.

  Complete where `grid_MxL` holds all the grids there are.
  """
  base = math.isqrt(grid_MxL.shape[1]) + 1
  place_L = base ** np.arange(grid_MxL.shape[1], dtype=np.int64)
  clues_SxM = given_SxL.astype(np.int64) @ ((grid_MxL + 1) * place_L).T  # one number per puzzle
  order_SxM = np.argsort(clues_SxM, axis=1, kind="stable").astype(np.int16)
  sorted_SxM = np.take_along_axis(clues_SxM, order_SxM.astype(np.int64), axis=1)
  is_first_SxM = np.ones(sorted_SxM.shape, bool)
  is_first_SxM[:, 1:] = sorted_SxM[:, 1:] != sorted_SxM[:, :-1]
  start_P = np.flatnonzero(is_first_SxM)
  count_P = np.diff(start_P, append=is_first_SxM.size)
  return Puzzles(order_SxM.ravel(), start_P, count_P, start_P // len(grid_MxL))


class Symmetry(NamedTuple):
  """A map of grids to grids: cell i of the image is cell `cells_L[i]`, its digit renamed.

  It keeps the rules, and the number of solutions of a puzzle.
  """

  cells_L: np.ndarray
  digits_V: np.ndarray

  def move(self, board_L: np.ndarray) -> np.ndarray:
    """The image of a full grid."""
    return self.digits_V[board_L[self.cells_L]]

  def move_clues(self, given_L: np.ndarray) -> np.ndarray:
    """Where the clues of the image are."""
    return given_L[self.cells_L]


def symmetry(
  rows: np.ndarray, columns: np.ndarray, digits: np.ndarray, *, transposed: bool
) -> Symmetry:
  """The symmetry with this order of the rows and columns, and these new names of the digits.

  Rows and columns of one band must stay in one band.
  """
  size = len(digits)
  cells = rows[:, None] * size + columns
  return Symmetry((cells.T if transposed else cells).ravel(), digits.astype(np.int32))


@functools.cache
def line_orders(size: int) -> np.ndarray:
  """Every order of the rows, or of the columns, that keeps bands together: [8 or 1296, size]."""
  box = math.isqrt(size)
  orders = list(itertools.permutations(range(box)))
  lines = [
    [box * band + line for band, within in zip(bands, inner, strict=True) for line in within]
    for bands in orders
    for inner in itertools.product(orders, repeat=box)
  ]
  return np.array(lines)


def random_symmetry(size: int, rng: np.random.Generator) -> Symmetry:
  """A symmetry drawn uniformly: digits, bands and stacks, lines within them, transposition."""
  orders = line_orders(size)
  rows, columns, transposed = rng.integers((len(orders), len(orders), 2)).tolist()
  return symmetry(orders[rows], orders[columns], rng.permutation(size), transposed=transposed == 1)
