import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest

from md4vmd.data import sudoku_rules as rules
from md4vmd.data.sudoku_csv import SudokuCsv, hash_fraction, read_puzzles

HEADER = "puzzle,solution,rating\n"


def row(grid, given):
  solution = "".join(str(digit + 1) for digit in grid)
  puzzle = "".join(mark if clue else "0" for mark, clue in zip(solution, given, strict=True))
  return f"{puzzle},{solution},1.5\n"


@pytest.fixture
def rows():
  """Three puzzles of each of the 288 grids."""
  rng = np.random.default_rng(0)
  return [row(g, rng.permutation(16) < 6) for g in rules.all_grids_4x4() for _ in range(3)]


@pytest.fixture
def file(tmp_path, rows):
  path = tmp_path / "boards.csv"
  path.write_text(HEADER + "".join(rows))
  return path


def test_rows_are_read_as_written(file, rows):
  x, given = read_puzzles(file)
  assert x.shape == given.shape == (864, 16)
  assert [row(*board) for board in zip(x, given, strict=True)] == rows


def test_gzip_dots_and_missing_ratings_are_read_too(tmp_path, file, rows):
  path = tmp_path / "boards.csv.gz"
  lines = [f"{line.split(',')[0].replace('0', '.')},{line.split(',')[1]}\r\n" for line in rows]
  path.write_bytes(gzip.compress((HEADER + "".join(lines)).encode()))
  for ours, theirs in zip(read_puzzles(path), read_puzzles(file), strict=True):
    assert (ours == theirs).all()


def test_the_cut_is_by_grid_and_stays_when_files_are_added(tmp_path, file, rows):
  first = SudokuCsv(path=str(file), valid_fraction=0.3)
  grids = {
    name: {first.split(name)[i]["x"].tobytes() for i in range(len(first.split(name)))}
    for name in ("train", "valid")
  }
  assert not grids["train"] & grids["valid"]
  assert len(first.split("train")) + len(first.split("valid")) == 864
  assert 0.2 < len(grids["valid"]) / 288 < 0.4
  (tmp_path / "more.csv").write_text(HEADER + "".join(rows[:30]))
  both = SudokuCsv(path=f"{tmp_path}/more.csv, {tmp_path}/b*.csv", valid_fraction=0.3)
  assert {both.split("valid")[i]["x"].tobytes() for i in range(len(both.split("valid")))} == grids[
    "valid"
  ]
  rng = np.random.default_rng(0)
  for i in range(500):
    moved = first.augment(first.split("train")[i], rng)
    assert moved["x"].tobytes() not in grids["valid"]
    assert moved["given"].sum() == 6


def test_the_held_out_puzzles_of_each_of_several_files_are_a_split(tmp_path, rows):
  paths = [tmp_path / name for name in ("easy.csv", "hard.set.csv.gz")]
  paths[0].write_text(HEADER + "".join(rows[:300]))
  paths[1].write_bytes(gzip.compress((HEADER + "".join(rows[300:])).encode()))
  boards = SudokuCsv(path=",".join(map(str, paths)), valid_fraction=0.3)
  parts = [boards.split(f"valid_{name}") for name in ("easy", "hard")]
  for path, part in zip(paths, parts, strict=True):
    x_NxL, given_NxL = read_puzzles(path)
    ours = {(part[i]["x"].tobytes(), part[i]["given"].tobytes()) for i in range(len(part))}
    theirs = {
      (x.tobytes(), given.tobytes())
      for x, given in zip(x_NxL.astype(np.int32), given_NxL, strict=True)
    }
    assert ours and ours < theirs
  assert sum(map(len, parts)) == len(boards.split("valid"))
  with pytest.raises(ValueError, match="valid_easy, valid_hard"):
    boards.split("hard")
  with pytest.raises(ValueError, match=r"use one of train, valid$"):
    SudokuCsv(path=str(paths[0]), valid_fraction=0.3).split("valid_easy")


def test_hashes_are_stored_values_and_uniform():
  grids = rules.all_grids_4x4()
  assert hash_fraction(grids[:2], 0).tolist() == [0.47353063837982756, 0.3174377761082616]
  assert (hash_fraction(grids, 1) != hash_fraction(grids, 0)).all()
  shares = np.histogram(hash_fraction(grids, 0), bins=4, range=(0, 1))[0] / 288
  assert (abs(shares - 0.25) < 0.1).all()


GRID = "1234341221434321"


@pytest.mark.parametrize(
  ("line", "rule"),
  [
    (f"{'0' * 15},{GRID}", "16 cells each"),
    (f"{'0' * 16},{GRID[:15]}", "16 cells each"),
    ("0" * 16, "16 cells each"),
    ("", "16 cells each"),
    (f"x{'0' * 15},{GRID}", "digits 1 to 4"),
    (f"5{'0' * 15},{GRID}", "digits 1 to 4"),
    (f"é{'0' * 15},{GRID}", ""),
    (f"{'0' * 16},0{GRID[1:]}", "once in every row"),
    (f"{'0' * 16},{GRID[:12]}4312", "once in every row"),
    (f"2{'0' * 15},{GRID}", "agree with the solution"),
  ],
)
def test_a_bad_row_is_named_with_file_line_and_rule(tmp_path, rows, line, rule):
  path = tmp_path / "bad.csv"
  path.write_text(HEADER + "".join(rows[:5]) + line + "\n" + rows[6], encoding="utf-8")
  with pytest.raises(ValueError, match=rf"bad.csv, line 7: .*{rule}"):
    read_puzzles(path)


@pytest.mark.parametrize(
  ("text", "rule"),
  [
    ("", "line 1: the header"),
    ("quizzes,solutions\n", "line 1: the header"),
    (HEADER, "no puzzle"),
    (HEADER + "123,123\n", "16 or 81 cells, not 3"),
  ],
)
def test_files_that_are_no_puzzle_files(tmp_path, text, rule):
  path = tmp_path / "bad.csv"
  path.write_text(text)
  with pytest.raises(ValueError, match=rule):
    read_puzzles(path)


@pytest.mark.parametrize("damage", ["truncated", "not gzip"])
def test_a_damaged_gzip_file_is_named(tmp_path, rows, damage):
  path = tmp_path / "cut.csv.gz"
  whole = gzip.compress((HEADER + "".join(rows)).encode())
  path.write_bytes(whole[:-200] if damage == "truncated" else b"puzzle" + whole)
  with pytest.raises(ValueError, match=r"cut.csv.gz: the gzip file is cut short or damaged"):
    SudokuCsv(path=str(path))


def test_wrong_options_are_named(file):
  with pytest.raises(FileNotFoundError, match=r"'none/\*.csv' names no file"):
    SudokuCsv(path=f"{file},none/*.csv")
  with pytest.raises(ValueError, match=r"valid_fraction=1\.5"):
    SudokuCsv(path=str(file), valid_fraction=1.5)
  with pytest.raises(ValueError, match="no puzzle for train or valid"):
    SudokuCsv(path=str(file), valid_fraction=1e-9)


def test_boards_of_two_sizes_do_not_mix(tmp_path, file):
  grid = rules.random_grid(9, np.random.default_rng(0))
  (tmp_path / "nine.csv").write_text(HEADER + row(grid, grid > 3))
  with pytest.raises(ValueError, match=r"cells=\[16, 81\]"):
    SudokuCsv(path=f"{tmp_path}/*.csv")


def test_real_puzzles_load_in_about_a_second():
  root = os.environ.get("MD4VMD_DATA")
  if not root:
    pytest.skip("MD4VMD_DATA is not set: it names the folder of the real data")
  started = time.process_time()
  dataset = SudokuCsv(path=str(Path(root) / "sudoku" / "clue17.csv.gz"))
  assert time.process_time() - started < 5
  assert len(dataset.split("train")) + len(dataset.split("valid")) == 47_130
  item = dataset.split("valid")[0]
  assert item["given"].sum() == 17
  assert rules.is_solved(item["x"][None], item["x"][None], item["given"][None])[0]
