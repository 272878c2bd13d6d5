import math

import numpy as np
import pytest

from md4vmd.data import sudoku_rules as rules
from md4vmd.data.sudoku import Sudoku, blank_out


def all_of(dataset, name):
  items = [dataset.split(name)[i] for i in range(len(dataset.split(name)))]
  return {key: np.stack([item[key] for item in items]) for key in items[0]}


def keys(boards):
  return {board.tobytes() for board in boards.astype(np.uint8)}


def puzzle_keys(items):
  return keys(blank_out(items["x"], items["given"]))


def augmented(dataset, rounds, seed=0):
  rng = np.random.default_rng(seed)
  train = dataset.split("train")
  items = [dataset.augment(train[i % len(train)], rng) for i in range(rounds)]
  return {key: np.stack([item[key] for item in items]) for key in items[0]}


def test_without_clues_4x4_is_uniform_over_its_grids():
  dataset = Sudoku(size=4)
  for name in ("train", "valid"):
    assert len(keys(all_of(dataset, name)["x"])) == len(dataset.split(name)) == 288
    assert dataset.entropy_nats(name) == math.log(288)
  assert "given" not in dataset.split("train")[0]
  assert dataset.split("train")[0]["x"].dtype == np.int32


def test_held_out_grids_never_reach_training():
  dataset = Sudoku(size=4, holdout_grids=58)
  heldout = keys(all_of(dataset, "heldout")["x"])
  seen = keys(all_of(dataset, "train")["x"])
  assert (len(heldout), len(seen)) == (58, 230)
  assert not heldout & seen
  assert dataset.entropy_nats("train") == math.log(230)
  assert keys(augmented(dataset, 5000)["x"]) == seen


def test_symmetries_keep_the_uniform_distribution_of_the_seen_grids():
  rounds = 230 * 40
  images = augmented(Sudoku(size=4, holdout_grids=58), rounds)["x"]
  counts = np.unique(images, axis=0, return_counts=True)[1]
  chi_squared = ((counts - 40) ** 2 / 40).sum() + 40 * (230 - len(counts))
  assert chi_squared < 330  # 229 degrees of freedom: exceeded with probability 1e-5


@pytest.fixture(scope="module")
def unique_4x4():
  return Sudoku(
    size=4, clues_min=4, clues_max=6, train_puzzles=3000, valid_puzzles=2000, holdout_grids=58
  )


def test_4x4_puzzles_have_one_solution_and_the_clues_asked_for(unique_4x4):
  for name, count in (("train", 3000), ("valid", 2000), ("heldout", 2000)):
    items = all_of(unique_4x4, name)
    assert len(puzzle_keys(items)) == count
    assert set(items["given"].sum(1)) <= {4, 5, 6}
    assert items["given"].dtype == bool
    for x, given in zip(items["x"][:100], items["given"], strict=False):
      assert list(rules.solutions(np.where(given, x, 4))) == [x.tolist()]
    assert unique_4x4.entropy_nats(name) == 0


def test_4x4_splits_are_unseen_puzzles_of_seen_grids_and_of_held_out_grids(unique_4x4):
  train, valid, heldout = (all_of(unique_4x4, name) for name in ("train", "valid", "heldout"))
  assert not puzzle_keys(train) & puzzle_keys(valid)
  assert keys(valid["x"]) <= keys(train["x"])
  assert not keys(heldout["x"]) & keys(train["x"])


def test_symmetries_of_training_puzzles_avoid_valid_and_held_out(unique_4x4):
  moved = augmented(unique_4x4, 10_000)
  assert not puzzle_keys(moved) & puzzle_keys(all_of(unique_4x4, "valid"))
  assert not keys(moved["x"]) & keys(all_of(unique_4x4, "heldout")["x"])
  # Unguarded, some would have landed there.
  rng = np.random.default_rng(0)
  item = unique_4x4.split("train")[0]
  bare = [rules.random_symmetry(4, rng).move(item["x"]) for _ in range(200)]
  assert any(unique_4x4.is_held_out({**item, "x": x}) for x in bare)


def test_an_example_without_an_allowed_image_stays_as_it_is():
  dataset = Sudoku(size=4, holdout_grids=287)
  item = dataset.split("train")[0]
  # Of the 288 grids one is left: it is reached again, or kept as the last resort.
  for seed in range(3):
    assert (dataset.augment(item, np.random.default_rng(seed))["x"] == item["x"]).all()


def test_symmetries_are_optional_and_keep_other_keys():
  rng = np.random.default_rng(0)
  still = Sudoku(size=4, symmetries=False)
  item = {**still.split("train")[3], "index": np.int32(3)}
  assert still.augment(item, rng) is item
  assert Sudoku(size=4).augment(item, rng)["index"] == 3


def test_puzzles_with_several_solutions_stand_once_per_solution():
  dataset = Sudoku(size=4, clues_min=3, clues_max=3, unique=False, valid_puzzles=50)
  items = all_of(dataset, "valid")
  puzzles = blank_out(items["x"], items["given"])
  logs = []
  for key in puzzle_keys(items):
    rows = np.flatnonzero([puzzle.tobytes() == key for puzzle in puzzles])
    solutions = sorted(rules.solutions(np.frombuffer(key, np.uint8)))
    assert len(solutions) > 1
    assert sorted(items["x"][rows].tolist()) == solutions
    logs += [math.log(len(solutions))] * len(solutions)
  assert dataset.entropy_nats("valid") == pytest.approx(np.mean(logs))
  assert not puzzle_keys(augmented(dataset, 2000)) & puzzle_keys(items)
  train, valid = len(dataset.split("train")), len(dataset.split("valid"))
  assert train + valid == 288 * math.comb(16, 3)


def test_9x9_puzzles_are_unique_and_cut_by_grid():
  dataset = Sudoku(size=9, clues_min=28, clues_max=34, train_puzzles=12, valid_puzzles=4)
  train, valid = all_of(dataset, "train"), all_of(dataset, "valid")
  assert not keys(train["x"]) & keys(valid["x"])
  assert (len(train["x"]), len(valid["x"])) == (12, 4)
  clues = train["given"].sum(1)
  assert clues.min() >= 28 and clues.max() <= 34 and len(set(clues)) > 1
  for x, given in zip(train["x"], train["given"], strict=True):
    assert list(rules.solutions(np.where(given, x, 9))) == [x.tolist()]
  moved = augmented(dataset, 12)
  assert rules.is_valid(moved["x"]).all()
  assert (moved["x"] != train["x"]).any(1).all()


def test_9x9_without_clues_and_with_several_solutions():
  grids = Sudoku(size=9, train_puzzles=5, valid_puzzles=2)
  assert set(grids.split("train")[0]) == {"x"}
  assert rules.is_valid(all_of(grids, "train")["x"]).all()
  assert grids.entropy_nats("train") is None
  several = Sudoku(
    size=9, clues_min=10, clues_max=10, unique=False, train_puzzles=5, valid_puzzles=2
  )
  assert (all_of(several, "train")["given"].sum(1) == 10).all()
  assert several.entropy_nats("train") is None


def test_the_seed_decides_the_splits():
  options = {"size": 4, "clues_min": 5, "clues_max": 5, "train_puzzles": 100, "valid_puzzles": 10}
  first, same, other = (all_of(Sudoku(**options, seed=s), "train")["x"] for s in (1, 1, 2))
  assert (first == same).all()
  assert (first != other).any()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"size": 6}, "size=6"),
    ({"size": 4, "clues_min": 7, "clues_max": 5}, "clues_min=7, clues_max=5"),
    ({"size": 4, "clues_min": 1, "clues_max": 3}, "there are 0 such puzzles"),
    ({"size": 4, "clues_max": 4, "train_puzzles": 10**6}, "there are 25728 such puzzles"),
    ({"size": 4, "train_puzzles": 10}, "without clues 4x4"),
    ({"size": 4, "holdout_grids": 288}, "holdout_grids=288"),
    ({"size": 4, "clues_max": 3, "unique": False, "holdout_grids": 5}, "held-out solutions"),
    ({"size": 9}, "train_puzzles=None"),
    ({"size": 9, "clues_max": 20, "train_puzzles": 5}, "clues_max=20"),
    ({"size": 9, "holdout_grids": 5, "train_puzzles": 5}, "holdout_grids=5"),
    ({"size": 4, "valid_puzzles": 0}, "valid_puzzles=0"),
  ],
)
def test_wrong_options_are_named(options, words):
  with pytest.raises(ValueError, match=words):
    Sudoku(**options)


def test_unknown_splits_name_those_that_exist():
  with pytest.raises(ValueError, match="'test' does not exist: use one of train, valid"):
    Sudoku(size=4).split("test")


def test_boards_are_printed_with_lines_and_read_back():
  dataset = Sudoku(size=4)
  board = dataset.encode("1234 3412 2.4_ 0321")
  assert board.tolist() == [0, 1, 2, 3, 2, 3, 0, 1, 1, 4, 3, 4, 4, 2, 1, 0]
  assert dataset.decode(board) == "1 2 | 3 4\n3 4 | 1 2\n----+----\n2 . | 4 .\n. 3 | 2 1"
  assert (dataset.encode(dataset.decode(board)) == board).all()
  nine = Sudoku(size=9, train_puzzles=1, valid_puzzles=1)
  x = nine.split("train")[0]["x"]
  assert (nine.encode(nine.decode(x)) == x).all()
  assert nine.decode(x).count("------+-------+------") == 2
  with pytest.raises(ValueError, match="16 cells, this one 3"):
    dataset.encode("123")
  with pytest.raises(ValueError, match="'9' is not a token"):
    dataset.encode("9" * 16)


def test_the_description_gives_sizes_and_convention():
  line = Sudoku(size=4, holdout_grids=58).describe()
  assert "train 230, valid 230, heldout 58" in line and "\n" not in line
