import numpy as np
import pytest

from md4vmd.data import sudoku_rules as rules

SOLVED_9 = "562974813947381652183526749471639528395842167628715934236198475854267391719453286"


def tokens(text):
  return np.array([int(mark) - 1 for mark in text], np.uint8)


def blank(size):
  return np.full(size * size, size, np.uint8)


def test_every_cell_is_in_one_row_one_column_and_one_box():
  for size in (4, 9):
    assert (np.bincount(rules.units(size).ravel()) == 3).all()
  assert rules.units(9)[-1].tolist() == [60, 61, 62, 69, 70, 71, 78, 79, 80]


def test_there_are_288_different_valid_grids_of_size_4():
  grids = rules.all_grids_4x4()
  assert len(np.unique(grids, axis=0)) == 288
  assert rules.is_valid(grids).all()


@pytest.mark.parametrize("size", [4, 9])
def test_a_grid_with_any_one_cell_changed_is_not_valid(size):
  grid = rules.random_grid(size, np.random.default_rng(0))
  changed = np.array([grid] * len(grid), np.int32)
  for replacement in ((grid + 1) % size, size, -1):
    np.fill_diagonal(changed, replacement)
    assert not rules.is_valid(changed).any()


def test_a_latin_square_with_wrong_boxes_is_not_valid():
  rows = (np.arange(4)[:, None] + np.arange(4)) % 4
  assert not rules.is_valid(rows.reshape(1, 16))[0]


def test_solved_means_valid_and_faithful_to_the_clues():
  grids = rules.all_grids_4x4()[[0, 0, 1]].astype(np.int32)
  x = rules.all_grids_4x4()[[0, 1, 0]].astype(np.int32)
  none, every = np.zeros((3, 16), bool), np.ones((3, 16), bool)
  assert rules.is_solved(grids, x, none).tolist() == [True, True, True]
  assert rules.is_solved(grids, x, every).tolist() == [True, False, False]
  masked = np.where(np.arange(16) == 3, 4, grids)
  assert not rules.is_solved(masked, x, none).any()


def test_the_solver_finds_every_solution():
  assert rules.count_solutions(blank(4), limit=1000) == 288
  assert rules.count_solutions(blank(4)) == 2
  grid = tokens(SOLVED_9)
  assert list(rules.solutions(grid)) == [grid.tolist()]
  puzzle = np.where(rules.remove_clues(grid, 0, np.random.default_rng(0), unique=True), grid, 9)
  puzzle[np.flatnonzero(puzzle < 9)[0]] = 9
  found = np.array(list(rules.solutions(puzzle)))
  assert (found == grid).all(1).any()
  assert rules.is_solved(found, grid, puzzle < 9).all()
  assert len(np.unique(found, axis=0)) == len(found) > 1


def test_clues_that_clash_have_no_solution():
  puzzle = blank(9)
  puzzle[[0, 8]] = 4
  assert rules.count_solutions(puzzle) == 0


def test_seventeen_clues_are_solved():
  text = "000000000000001002003000040000000500000040167028000000000090000000260090710000000"
  puzzle = np.array([(int(mark) - 1) % 10 for mark in text], np.uint8)
  assert list(rules.solutions(puzzle)) == [tokens(SOLVED_9).tolist()]


@pytest.mark.parametrize(("size", "clues"), [(4, 6), (9, 32)])
def test_removing_clues_leaves_a_unique_puzzle(size, clues):
  rng = np.random.default_rng(1)
  for _ in range(5):
    grid = rules.random_grid(size, rng)
    given = rules.remove_clues(grid, clues, rng, unique=True)
    assert given.sum() >= clues
    puzzle = np.where(given, grid, size)
    assert list(rules.solutions(puzzle)) == [grid.tolist()]


def test_unique_puzzles_that_can_lose_no_clue_have_no_clue_to_spare():
  rng = np.random.default_rng(2)
  grid = rules.random_grid(9, rng)
  given = rules.remove_clues(grid, 0, rng, unique=True)
  for cell in np.flatnonzero(given):
    puzzle = np.where(given & (np.arange(81) != cell), grid, 9)
    assert rules.count_solutions(puzzle) == 2


def test_enumeration_of_4x4_puzzles_agrees_with_the_solver_and_the_known_count():
  cells = np.array([[m >> i & 1 for i in range(16)] for m in range(2**16) if m.bit_count() == 4])
  grids = rules.all_grids_4x4()
  puzzles = rules.enumerate_puzzles(grids, cells.astype(bool))
  assert (puzzles.count_P == 1).sum() == 25728  # the 4-clue puzzles of 4x4 Sudoku
  assert puzzles.count_P.sum() == 288 * len(cells)
  for p in np.random.default_rng(3).integers(len(puzzles.count_P), size=50):
    numbers = puzzles.grid_N[puzzles.start_P[p] :][: puzzles.count_P[p]]
    puzzle = np.where(cells[puzzles.cells_P[p]], grids[numbers[0]], 4)
    assert sorted(rules.solutions(puzzle)) == sorted(grids[numbers].tolist())


def symmetries_by_kind(size, rng):
  """One random symmetry of each generating kind, the others left as they are."""
  box = int(size**0.5)
  same, bands = np.arange(size), np.arange(size).reshape(box, box)
  swap_bands = rng.permutation(bands).ravel()
  swap_within = rng.permuted(bands, axis=1).ravel()
  make = rules.symmetry
  return {
    "digits": make(same, same, rng.permutation(size), transposed=False),
    "bands": make(swap_bands, same, same, transposed=False),
    "stacks": make(same, swap_bands, same, transposed=False),
    "rows": make(swap_within, same, same, transposed=False),
    "columns": make(same, swap_within, same, transposed=False),
    "transposed": make(same, same, same, transposed=True),
  }


@pytest.mark.parametrize("kind", ["digits", "bands", "stacks", "rows", "columns", "transposed"])
@pytest.mark.parametrize("size", [4, 9])
def test_each_kind_of_symmetry_does_what_it_says(size, kind):
  rng = np.random.default_rng(4)
  box = int(size**0.5)
  grid = rules.random_grid(size, rng)
  moves = [symmetries_by_kind(size, rng)[kind] for _ in range(20)]
  images = np.array([move.move(grid) for move in moves])
  assert rules.is_valid(images).all()
  assert (images != grid).any()
  square, squares = grid.reshape(size, size), images.reshape(-1, size, size)
  for move, image in zip(moves, squares, strict=True):
    if kind == "digits":
      assert (image == move.digits_V[square]).all()
    elif kind == "transposed":
      assert (image == square.T).all()
    else:
      before, after = (square, image) if kind in ("bands", "rows") else (square.T, image.T)
      lines = [before.tolist().index(line) for line in after.tolist()]
      assert sorted(lines) == list(range(size))
      for band in np.reshape(lines, (box, box)):
        assert len(set(band // box)) == 1
        if kind in ("bands", "stacks"):
          assert (np.diff(band) == 1).all()
      if kind in ("rows", "columns"):
        assert (np.array(lines) // box == np.arange(size) // box).all()


@pytest.mark.parametrize(("size", "orders"), [(4, 8), (9, 1296)])
def test_line_orders_are_all_the_orders_that_keep_bands(size, orders):
  lines = rules.line_orders(size)
  assert len(np.unique(lines, axis=0)) == len(lines) == orders
  box = int(size**0.5)
  bands = lines.reshape(-1, box, box) // box
  assert (bands == bands[:, :, :1]).all()
  assert (np.sort(lines, axis=1) == np.arange(size)).all()


def test_symmetries_of_the_4x4_grids_form_two_orbits():
  rng = np.random.default_rng(5)
  number = {grid.tobytes(): n for n, grid in enumerate(rules.all_grids_4x4().astype(np.int32))}
  moves = [rules.random_symmetry(4, rng) for _ in range(2000)]
  orbits = {
    frozenset(number[move.move(grid).tobytes()] for move in moves)
    for grid in rules.all_grids_4x4()[::24]
  }
  assert sorted(map(len, orbits)) == [96, 192]


@pytest.mark.parametrize("size", [4, 9])
def test_clues_move_with_their_cells_and_stay_unique(size):
  rng = np.random.default_rng(6)
  grid = rules.random_grid(size, rng)
  given = rules.remove_clues(grid, 6 if size == 4 else 30, rng, unique=True)
  for _ in range(5):
    move = rules.random_symmetry(size, rng)
    puzzle = np.append(move.digits_V, size)[np.where(given, grid, size)[move.cells_L]]
    moved_grid, moved_given = move.move(grid), move.move_clues(given)
    assert (np.where(moved_given, moved_grid, size) == puzzle).all()
    assert list(rules.solutions(puzzle)) == [moved_grid.tolist()]
