"""Sudoku puzzles from csv files, plain or gzip: columns puzzle, solution and any others."""

from __future__ import annotations

import glob
import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from md4vmd.data import sudoku_rules as rules
from md4vmd.data.base import Arrays, require
from md4vmd.data.sudoku import Boards, Cut


class SudokuCsv(Boards):
  """Puzzles with one solution from csv files, cut by solution grid.

  A grid's side is a hash of the grid and the seed, so it is the same whatever files are read, and
  all puzzles of one grid fall on one side. That a puzzle has one solution is taken on trust.

  Beside `train` and `valid` there is a split `valid_NAME` of the held-out puzzles of each file, if
  there are several, NAME being the file's up to its first dot.
  """

  def __init__(
    self, *, path: str, valid_fraction: float = 0.05, symmetries: bool = True, seed: int = 0
  ):
    """Reads and checks the files.

    Args:
      path: files or glob patterns, separated by commas.
      valid_fraction: share of the grids that is held out, between 0 and 1.
      symmetries: move training puzzles by random symmetries, never onto a held-out grid.
      seed: seed of the cut.
    """
    require(
      0 < valid_fraction < 1, "give a fraction between 0 and 1", valid_fraction=valid_fraction
    )
    files = find_files(path)
    parts = [read_puzzles(file) for file in files]
    widths = sorted({x_NxL.shape[1] for x_NxL, _ in parts})
    require(len(widths) == 1, "the boards of all the files have one size", path=path, cells=widths)
    x_NxL, given_NxL = (np.concatenate(part) for part in zip(*parts, strict=True))
    is_valid_N = hash_fraction(x_NxL, seed) < valid_fraction
    require(
      0 < int(is_valid_N.sum()) < len(x_NxL),
      f"no puzzle for train or valid among {len(x_NxL)}: change it, or read more puzzles",
      valid_fraction=valid_fraction,
    )
    size, chosen = math.isqrt(widths[0]), {"train": ~is_valid_N, "valid": is_valid_N}
    if len(files) > 1:
      name_N = np.repeat([file.name.split(".")[0] for file in files], [len(x) for x, _ in parts])
      held = sorted(set(name_N[is_valid_N]))
      chosen |= {f"valid_{name}": is_valid_N & (name_N == name) for name in held}
    cut = Cut(
      {name: Arrays(x_NxL[is_N], given=given_NxL[is_N]) for name, is_N in chosen.items()},
      about=f"Sudoku {size}x{size} from {len(files)} csv, valid cut by a hash of the solution",
      held_grids=x_NxL[is_valid_N],
      entropies_nats=dict.fromkeys(chosen, 0.0),
    )
    super().__init__(size, cut, symmetries=symmetries)


def find_files(path: str) -> list[Path]:
  """The files that the comma-separated names and glob patterns stand for, each once, in order.

  Raises FileNotFoundError where one of them stands for none.
  """
  files: dict[Path, None] = {}
  for pattern in path.split(","):
    found = sorted(glob.glob(pattern.strip()))
    if not found:
      raise FileNotFoundError(f"path={path!r}: {pattern.strip()!r} names no file; correct the path")
    files.update(dict.fromkeys(map(Path, found)))
  return list(files)


def read_puzzles(file: Path) -> tuple[np.ndarray, np.ndarray]:
  """The puzzles of one file: solutions x_NxL, uint8 tokens, and given_NxL, bool.

  Raises ValueError with file, line and rule at the first row that is not a puzzle and its solution,
  and where a gzip file is cut short or damaged.
  """
  open_text = gzip.open if file.suffix == ".gz" else open
  try:
    with open_text(file, "rt", encoding="latin-1") as lines:
      if next(lines, "").rstrip().split(",")[:2] != ["puzzle", "solution"]:
        raise ValueError(f"{file}, line 1: the header must begin with puzzle,solution")
      rows = [line.rstrip("\r\n").split(",") for line in lines]
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{file}: the gzip file is cut short or damaged; fetch it again") from error
  if not rows:
    raise ValueError(f"{file}: there is no puzzle below the header")
  cells = len(rows[0][0])
  if cells not in (16, 81):
    raise _row_error(file, 0, f"a puzzle has 16 or 81 cells, not {cells}", rows)
  for n, row in enumerate(rows):
    if len(row) < 2 or len(row[0]) != cells or len(row[1]) != cells:
      raise _row_error(file, n, f"puzzle and solution need {cells} cells each", rows)
  puzzle_NxL = _digits("".join(row[0] for row in rows).replace(".", "0"), cells)
  solution_NxL = _digits("".join(row[1] for row in rows), cells)
  size = math.isqrt(cells)
  given_NxL = puzzle_NxL != 0
  x_NxL = solution_NxL - np.uint8(1)
  rules_of_rows = {
    f"a puzzle holds the digits 1 to {size}, and 0 or . for a blank": (puzzle_NxL <= size).all(1),
    f"a solution holds each of 1 to {size} once in every row, column and box": rules.is_valid(
      x_NxL
    ),
    "the clues must agree with the solution": (~given_NxL | (puzzle_NxL == solution_NxL)).all(1),
  }
  for rule, is_kept_N in rules_of_rows.items():
    if not is_kept_N.all():
      raise _row_error(file, int(np.argmin(is_kept_N)), rule, rows)
  return x_NxL, given_NxL


def _digits(text: str, cells: int) -> np.ndarray:
  """The digits [N, cells], uint8; what is no digit is above 9."""
  return np.frombuffer(text.encode("latin-1"), np.uint8).reshape(-1, cells) - np.uint8(ord("0"))


def _row_error(file: Path, n: int, rule: str, rows: list[list[str]]) -> ValueError:
  return ValueError(f"{file}, line {n + 2}: {rule}: {','.join(rows[n])!r}")


def hash_fraction(board_NxL: np.ndarray, seed: int) -> np.ndarray:
  """A number in [0, 1) for every board and seed, the same on every machine."""
  salt = seed.to_bytes(16, "little", signed=True)
  digest = lambda board: hashlib.blake2b(board.tobytes(), digest_size=8, salt=salt).digest()
  hashes = np.frombuffer(b"".join(digest(board) for board in board_NxL), "<u8")
  return (hashes >> np.uint64(11)) / 2.0**53
