"""Sudoku grids and puzzles made here: 4x4 by enumeration, 9x9 by a generator.

4x4 has 288 grids, so its splits and entropies are exact. Read puzzles with `sudoku_csv`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from md4vmd.data import sudoku_rules as rules
from md4vmd.data.base import Alphabet, Arrays, Dataset, Item, require

_TRIES = 100  # symmetries tried before an example stays as it is


class Cut(NamedTuple):
  """Boards cut into splits.

  Attributes:
    splits: the sources by name.
    about: what the boards are and how they were cut.
    held_grids: full grids [., L], uint8, that training must never show.
    held_puzzles: puzzles [., L], uint8 with `size` at blanks, that training must never show.
    entropies_nats: entropy of a solution given its clues, where it is known.
  """

  splits: dict[str, Arrays]
  about: str
  held_grids: np.ndarray | None = None
  held_puzzles: np.ndarray | None = None
  entropies_nats: Mapping[str, float] | None = None


class Boards(Dataset):
  """Base of the Sudoku datasets: boards as text, and symmetries that avoid what is held out.

  Attributes:
    size: digits, and cells in a row: 4 or 9.
    symmetries: True where training examples are moved by random symmetries.
  """

  free_mark = "a dot, 0 or _ for a free cell"

  def __init__(self, size: int, cut: Cut, *, symmetries: bool):
    """Keeps the splits and remembers what training must never show."""
    super().__init__(
      vocab_size=size,
      length=size * size,
      splits=cut.splits,
      about=cut.about,
      entropies_nats=cut.entropies_nats,
    )
    self.size = size
    self.columns, self.box = size, math.isqrt(size)
    self.symmetries = symmetries
    self._held_grids = _as_set(cut.held_grids)
    self._held_puzzles = _as_set(cut.held_puzzles)
    self._alphabet = Alphabet("123456789"[:size], ".")

  def augment(self, item: Item, rng: np.random.Generator) -> Item:
    """The example moved by a random symmetry, clues and all, to one that is not held out."""
    if not self.symmetries:
      return item
    for _ in range(_TRIES):
      symmetry = rules.random_symmetry(self.size, rng)
      moved = {**item, "x": symmetry.move(item["x"])}
      if "given" in item:
        moved["given"] = symmetry.move_clues(item["given"])
      if not self.is_held_out(moved):
        return moved
    return item

  def is_held_out(self, item: Item) -> bool:
    """True where the grid, or the puzzle that its clues make, is kept from training."""
    x_L = item["x"]
    if x_L.astype(np.uint8).tobytes() in self._held_grids:
      return True
    return bool(self._held_puzzles) and (
      blank_out(x_L, item["given"]).tobytes() in self._held_puzzles
    )

  def decode(self, x_L: np.ndarray) -> str:
    """The board with lines between its boxes and a dot at every blank."""
    box = math.isqrt(self.size)
    marks = self._alphabet.decode(x_L)
    cells = [" ".join(marks[i : i + box]) for i in range(0, self.length, box)]
    rows = [" | ".join(cells[i : i + box]) for i in range(0, len(cells), box)]
    line = "\n" + "-+-".join(["-" * (2 * box - 1)] * box) + "\n"
    return line.join("\n".join(rows[i : i + box]) for i in range(0, self.size, box))

  def cells(self, x_N: np.ndarray) -> list[str]:
    """The digit of every cell."""
    return list(self._alphabet.decode(x_N))

  def encode(self, text: str) -> np.ndarray:
    """A board from its digits in reading order; 0, dot or underscore is a blank.

    White space and the lines of `decode` are passed over. Raises ValueError on another mark or
    another number of cells.
    """
    marks = "".join(mark for mark in text if mark not in "|+-" and not mark.isspace())
    require(
      len(marks) == self.length,
      f"a {self.size}x{self.size} board has {self.length} cells, this one {len(marks)}; "
      f"write {self.free_mark}",
      board=text,
    )
    return self._alphabet.encode(marks.replace("0", ".").replace("_", "."))


def blank_out(x_NxL: np.ndarray, given_NxL: np.ndarray) -> np.ndarray:
  """The puzzles of the grids: uint8, the mask id `size` wherever there is no clue."""
  size = math.isqrt(x_NxL.shape[-1])
  return np.where(given_NxL, x_NxL, size).astype(np.uint8)


def _as_set(board_NxL: np.ndarray | None) -> set[bytes]:
  return set() if board_NxL is None else {board_L.tobytes() for board_L in board_NxL}


class Sudoku(Boards):
  """Sudoku made here.

  Without clues (clues_max=0) the examples are full grids and nothing is given. 4x4: training and
  "valid" are both the uniform distribution over the grids that are not held out, each grid once.
  9x9: random grids, those of "valid" unseen in training.

  With clues an example is a grid whose clues are given. 4x4: a random choice among all puzzles with
  that many clues; "valid" holds unseen puzzles of seen grids, "heldout" puzzles of held-out grids,
  and a puzzle with several solutions stands in its split once per solution. 9x9: one solution per
  puzzle, the number of clues uniform in the range; "valid" holds puzzles of unseen grids.
  """

  def __init__(
    self,
    *,
    size: int,
    clues_min: int = 0,
    clues_max: int = 0,
    unique: bool = True,
    train_puzzles: int | None = None,
    valid_puzzles: int = 1000,
    holdout_grids: int = 0,
    symmetries: bool = True,
    seed: int = 0,
  ):
    """Makes the splits, the same for the same options.

    Args:
      size: 4 or 9.
      clues_min: fewest clues of a puzzle.
      clues_max: most clues of a puzzle; 0 for full grids without clues.
      unique: True where every puzzle has one solution, False where it may have several.
      train_puzzles: number of training puzzles, or of 9x9 grids without clues; None takes all the
        puzzles that there are, which is for 4x4 only.
      valid_puzzles: the same for "valid", and the most that "heldout" holds.
      holdout_grids: number of 4x4 grids that are kept from training.
      symmetries: move training examples by random symmetries, never onto what is held out.
      seed: seed of the puzzles and of the splits.
    """
    require(size in (4, 9), "the size is 4 or 9", size=size)
    require(
      0 <= clues_min <= clues_max < size * size,
      f"give 0 <= clues_min <= clues_max < {size * size}",
      clues_min=clues_min,
      clues_max=clues_max,
    )
    require(valid_puzzles > 0, "must be positive", valid_puzzles=valid_puzzles)
    wanted = _Wanted(clues_min, clues_max, unique, train_puzzles, valid_puzzles, holdout_grids)
    rng = np.random.default_rng(seed)
    if size == 9:
      cut = _made_9x9(wanted, rng)
    elif clues_max:
      cut = _puzzles_4x4(wanted, rng)
    else:
      cut = _grids_4x4(wanted, rng)
    super().__init__(size, cut, symmetries=symmetries)


class _Wanted(NamedTuple):
  """The options of `Sudoku` that choose the boards."""

  clues_min: int
  clues_max: int
  unique: bool
  train_puzzles: int | None
  valid_puzzles: int
  holdout_grids: int


def _seen_and_held(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """The 4x4 grids in random order, the last `count` of them apart."""
  require(0 <= count < 288, "of the 288 grids some must be left to train on", holdout_grids=count)
  grids = rng.permutation(rules.all_grids_4x4())
  return grids[: 288 - count], grids[288 - count :]


def _grids_4x4(wanted: _Wanted, rng: np.random.Generator) -> Cut:
  """Every 4x4 grid, without clues."""
  if wanted.train_puzzles is not None:
    raise ValueError(
      f"train_puzzles={wanted.train_puzzles}: without clues 4x4 trains on every grid that is not"
      " held out; leave it out, or set clues_max"
    )
  seen, held = _seen_and_held(wanted.holdout_grids, rng)
  splits = {"train": Arrays(seen), "valid": Arrays(seen)}
  if len(held):
    splits["heldout"] = Arrays(held)
  return Cut(
    splits,
    about="Sudoku 4x4, full grids, valid = the training distribution",
    held_grids=held,
    entropies_nats={name: math.log(len(source)) for name, source in splits.items()},
  )


def _puzzles_4x4(wanted: _Wanted, rng: np.random.Generator) -> Cut:
  """A choice among all 4x4 puzzles with the wanted numbers of clues."""
  require(
    wanted.unique or not wanted.holdout_grids,
    "a puzzle may have both seen and held-out solutions: hold out none, or ask for unique ones",
    unique=wanted.unique,
    holdout_grids=wanted.holdout_grids,
  )
  seen, held = _seen_and_held(wanted.holdout_grids, rng)
  grids = np.concatenate([seen, held])
  given_SxL = _clue_sets(16, wanted.clues_min, wanted.clues_max)
  puzzles = rules.enumerate_puzzles(grids, given_SxL)
  is_wanted = (puzzles.count_P == 1) | (not wanted.unique)
  order = rng.permutation(np.flatnonzero(is_wanted))
  is_held = puzzles.grid_N[puzzles.start_P[order]] >= len(seen)
  order, heldout = order[~is_held], order[is_held]
  left = len(order) - wanted.valid_puzzles
  train_puzzles = left if wanted.train_puzzles is None else wanted.train_puzzles
  require(
    0 < train_puzzles <= left,
    f"there are {len(order)} such puzzles in all: ask for fewer, or allow other numbers of clues",
    train_puzzles=train_puzzles,
    valid_puzzles=wanted.valid_puzzles,
  )
  valid, train = order[: wanted.valid_puzzles], order[wanted.valid_puzzles :][:train_puzzles]
  chosen = {"train": train, "valid": valid}
  if len(held):
    chosen["heldout"] = heldout[: wanted.valid_puzzles]
  splits = {name: _with_solutions(puzzles, p, grids, given_SxL) for name, p in chosen.items()}
  kind = "one solution" if wanted.unique else "any number of solutions"
  return Cut(
    splits,
    about=f"Sudoku 4x4, {wanted.clues_min} to {wanted.clues_max} clues, {kind}, cut by puzzle",
    held_grids=held,
    held_puzzles=blank_out(splits["valid"].x_NxL, splits["valid"].others["given"]),
    entropies_nats={name: _entropy_nats(puzzles.count_P[p]) for name, p in chosen.items()},
  )


def _entropy_nats(count_P: np.ndarray) -> float:
  """Entropy of a solution given its puzzle, where every solution of every puzzle stands once."""
  return float(np.average(np.log(count_P), weights=count_P)) if len(count_P) else 0.0


def _clue_sets(cells: int, clues_min: int, clues_max: int) -> np.ndarray:
  """given_SxL: every set of between `clues_min` and `clues_max` cells."""
  given_SxL = (np.arange(2**cells)[:, None] >> np.arange(cells) & 1).astype(bool)
  clues_S = given_SxL.sum(1)
  return given_SxL[(clues_min <= clues_S) & (clues_S <= clues_max)]


def _with_solutions(
  puzzles: rules.Puzzles, chosen: np.ndarray, grids: np.ndarray, given_SxL: np.ndarray
) -> Arrays:
  """The chosen puzzles, each once per solution."""
  count = puzzles.count_P[chosen]
  rank = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
  solution = puzzles.grid_N[np.repeat(puzzles.start_P[chosen], count) + rank]
  return Arrays(grids[solution], given=given_SxL[np.repeat(puzzles.cells_P[chosen], count)])


def _made_9x9(wanted: _Wanted, rng: np.random.Generator) -> Cut:
  """Random 9x9 grids, with clues where they are wanted."""
  has_clues = wanted.clues_max > 0
  require(
    not (wanted.unique and has_clues) or wanted.clues_max >= 24,
    "with one solution the generator seldom gets below 24 clues: raise it, or read a csv",
    clues_max=wanted.clues_max,
  )
  require(
    wanted.holdout_grids == 0,
    "9x9 always validates on unseen grids, valid_puzzles of them: leave it out",
    holdout_grids=wanted.holdout_grids,
  )
  if wanted.train_puzzles is None or wanted.train_puzzles <= 0:
    raise ValueError(f"train_puzzles={wanted.train_puzzles}: 9x9 needs a positive number")
  given_of: dict[bytes, np.ndarray] = {}
  while len(given_of) < wanted.train_puzzles + wanted.valid_puzzles:
    grid_L = rules.random_grid(9, rng)
    clues = int(rng.integers(wanted.clues_min, wanted.clues_max + 1))
    is_unique = wanted.unique and has_clues
    given_L = rules.remove_clues(grid_L, clues, rng, unique=is_unique)
    if given_L.sum() <= wanted.clues_max:
      given_of[grid_L.tobytes()] = given_L
  x_NxL = np.frombuffer(b"".join(given_of), np.uint8).reshape(-1, 81)
  given_NxL = np.array(list(given_of.values()))

  def part(rows: slice) -> Arrays:
    return Arrays(x_NxL[rows], given=given_NxL[rows]) if has_clues else Arrays(x_NxL[rows])

  kind = f"{wanted.clues_min} to {wanted.clues_max} clues" if has_clues else "full grids"
  valid, train = slice(wanted.valid_puzzles), slice(wanted.valid_puzzles, None)
  return Cut(
    {"train": part(train), "valid": part(valid)},
    about=f"Sudoku 9x9 made here, {kind}, cut by grid",
    held_grids=x_NxL[valid],
    entropies_nats={"train": 0.0, "valid": 0.0} if wanted.unique and has_clues else None,
  )
