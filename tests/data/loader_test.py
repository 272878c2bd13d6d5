import itertools

import numpy as np
import pytest

from md4vmd.data import TABLE, evaluation_batches, train_batches
from md4vmd.data.base import Arrays, Dataset
from md4vmd.data.sudoku import Sudoku


class Numbers(Dataset):
  """Example n is (n, 0); augmentation replaces the 0 by noise."""

  def __init__(self, count):
    x = np.stack([np.arange(count), np.zeros(count, int)], axis=1)
    super().__init__(
      vocab_size=count, length=2, splits={"train": Arrays(x), "valid": Arrays(x)}, about="numbers"
    )

  def augment(self, item, rng):
    noise = np.array([0, rng.integers(1_000_000)], np.int32)
    return {**item, "x": item["x"] + noise}


DATASET = Numbers(5000)


def take(count, dataset=DATASET, batch_size=8, seed=1, **options):
  stream = train_batches(dataset, batch_size=batch_size, seed=seed, **options)
  return list(itertools.islice(stream, count))


def values(batches):
  return np.concatenate([batch["x_BxL"] for batch in batches])


def test_batches_have_the_fields_of_the_contract():
  puzzles = Sudoku(size=4, clues_min=5, clues_max=6, train_puzzles=50, valid_puzzles=9)
  (batch,) = take(1, puzzles)
  shapes = {key: (array.shape, array.dtype.name) for key, array in batch.items()}
  assert shapes == {
    "x_BxL": ((8, 16), "int32"),
    "given_BxL": ((8, 16), "bool"),
    "weight_B": ((8,), "float32"),
    "index_B": ((8,), "int32"),
  }
  assert (batch["weight_B"] == 1).all()
  valid = next(evaluation_batches(puzzles.split("valid"), batch_size=8))
  assert {key: (array.shape, array.dtype.name) for key, array in valid.items()} == shapes


def test_the_index_is_the_number_in_the_split():
  for batch in take(3):
    assert (batch["index_B"] == batch["x_BxL"][:, 0]).all()


def test_the_seed_decides_the_stream():
  assert (values(take(5)) == values(take(5))).all()
  assert (values(take(5)) != values(take(5, seed=2))).any(1).mean() > 0.9


# The parts of the rows that each process reads.
SHARES = [
  [(0,)],
  [(0,), (1,)],
  [(0,), (1,), (2,), (3,)],
  [(0, 3), (1, 2)],
  [(0, 1, 2), (3,)],
]


def join(arrays, shares):
  """The rows that the processes read, in the order of the parts."""
  parts = sum(map(len, shares))
  found = {}
  for own, array in zip(shares, arrays, strict=True):
    found |= dict(zip(own, np.split(array, len(own)), strict=True))
  return np.concatenate([found[part] for part in range(parts)])


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("start", [0, 24, 5000])
def test_any_number_of_processes_continues_the_straight_run(shares, start):
  straight = take(start // 8 + 3)[start // 8 :]
  parts = sum(map(len, shares))
  read = [take(3, start=start, own=own, parts=parts) for own in shares]
  for step, batch in enumerate(straight):
    for key, array in batch.items():
      assert (join([batches[step][key] for batches in read], shares) == array).all()


def test_every_epoch_holds_every_example_in_another_order():
  numbers = values(take(2000, batch_size=10))[:, 0].reshape(4, 5000)
  assert (np.sort(numbers, axis=1) == np.arange(5000)).all()
  for first, second in itertools.combinations(numbers, 2):
    assert (first == second).mean() < 0.01


def test_augmentation_differs_between_epochs():
  rows = values(take(1000, batch_size=10))
  first, second = (epoch[np.argsort(epoch[:, 0])] for epoch in rows.reshape(2, 5000, 2))
  assert (first[:, 1] == second[:, 1]).mean() < 0.01


def test_small_splits_are_shuffled_in_equal_shares():
  dataset = TABLE["synthetic"](distribution="d1")
  stream = values(take(410, dataset, batch_size=10))[:4100]
  counts = np.unique(stream, axis=0, return_counts=True)[1]
  assert counts.tolist() == [410] * 10
  assert (stream[:2050] != stream[2050:]).any()


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"batch_size": 6, "parts": 4}, "batch_size=6, parts=4"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"start": 12}, "start=12, batch_size=8"),
    ({"start": -8}, "start=-8"),
    ({"own": (2,), "parts": 2}, r"own=\(2,\)"),
    ({"own": (1, 0), "parts": 2}, r"own=\(1, 0\)"),
    ({"own": (), "parts": 2}, r"own=\(\)"),
    ({"seed": -1}, "seed=-1"),
  ],
)
def test_wrong_options_are_named_at_once(options, words):
  with pytest.raises(ValueError, match=words):
    train_batches(DATASET, **{"batch_size": 8, "seed": 0, **options})


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(("limit", "count"), [(None, 21), (10, 10), (16, 16), (100, 21), (1, 1)])
def test_evaluation_covers_the_split_once_on_any_number_of_processes(shares, limit, count):
  source, parts = Numbers(21).split("valid"), sum(map(len, shares))
  read = [
    list(evaluation_batches(source, batch_size=8, own=own, parts=parts, limit=limit))
    for own in shares
  ]
  assert {len(batches) for batches in read} == {-(-count // 8)}
  steps = list(zip(*read, strict=True))
  joined = {
    key: np.concatenate([join([batch[key] for batch in step], shares) for step in steps])
    for key in read[0][0]
  }
  assert joined["weight_B"].sum() == count
  assert joined["weight_B"].tolist() == [1] * count + [0] * (-count % 8)
  assert joined["index_B"].tolist() == [*range(count)] + [count - 1] * (-count % 8)
  assert (joined["x_BxL"][:, 0] == joined["index_B"]).all()
  assert joined["x_BxL"][:, 1].sum() == 0  # evaluation is not augmented


def test_evaluation_names_wrong_options_at_once():
  source = Numbers(5).split("valid")
  with pytest.raises(ValueError, match="limit=0"):
    evaluation_batches(source, batch_size=4, limit=0)
  with pytest.raises(ValueError, match="batch_size=3, parts=2"):
    evaluation_batches(source, batch_size=3, parts=2)
  with pytest.raises(ValueError, match="the split is empty"):
    evaluation_batches(Arrays(np.zeros((0, 4))), batch_size=4)
