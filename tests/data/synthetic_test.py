import math

import numpy as np
import pytest

from md4vmd.data.synthetic import DISTRIBUTIONS, Synthetic

TABLES = {
  "pairs": {(k, (k + 1) % 10): 1 / 10 for k in range(10)},
  "pairs_skewed": {(k, (k + 1) % 10): (k + 1) / 55 for k in range(10)},
  "d1": {(k, (k + 1) % 10, (k + 2) % 10, (k + 3) % 10): 1 / 10 for k in range(10)},
  "d2": {
    (k, (k + 1) % 10, j, (j + 1) % 10): 1 / 100 for k in range(10) for j in range(10)
  },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_support_probabilities_and_splits_are_the_distribution(name):
  dataset, table = Synthetic(distribution=name), TABLES[name]
  support = [tuple(row) for row in dataset.support_MxL.tolist()]
  assert dict(zip(support, dataset.probabilities_M, strict=True)) == pytest.approx(table)
  assert (dataset.vocab_size, dataset.length) == (10, len(support[0]))
  entropy = -sum(p * math.log(p) for p in table.values())
  for split in ("train", "valid"):
    source = dataset.split(split)
    rows = [tuple(source[i]["x"].tolist()) for i in range(len(source))]
    assert {row: rows.count(row) / len(rows) for row in rows} == pytest.approx(table)
    assert dataset.entropy_nats(split) == pytest.approx(entropy)
    assert source[0]["x"].dtype == np.int32


def test_the_skewed_split_holds_k_plus_one_copies():
  assert len(Synthetic(distribution="pairs_skewed").split("valid")) == 55


def test_sequences_are_printed_and_read_back():
  dataset = Synthetic(distribution="d1")
  assert dataset.decode(np.array([8, 9, 10, 1])) == "89_1"
  assert dataset.encode("89_1").tolist() == [8, 9, 10, 1]


def test_an_unknown_distribution_names_those_that_exist():
  with pytest.raises(ValueError, match="'d3' does not exist: use one of pairs, pairs_skewed, d1"):
    Synthetic(distribution="d3")
