"""Quality of sampled characters: the n-grams, and what the evaluator counts."""

import dataclasses
import itertools

import numpy as np
import pytest

from md4vmd import build, partitioning
from md4vmd.data.ngrams import Ngrams
from md4vmd.evaluators import TextSamples, text_samples
from tests import shrunken, toys
from tests.evaluators_test import Fake

pytestmark = pytest.mark.usefixtures("quick_compilation")


def plain(text, context, token, vocab_size, order):
  """p(token | context) by Witten and Bell's recursion, from counts of strings."""
  p = 1.0 / vocab_size
  for n in range(1, order + 1):
    if n - 1 > len(context):
      break
    history = context[len(context) - n + 1 :]
    followers = [
      text[i + n - 1] for i in range(len(text) - n + 1) if text[i : i + n - 1] == history
    ]
    if followers:
      different = len(set(followers))
      p = (followers.count(token) + different * p) / (len(followers) + different)
  return p


def test_ngrams_follow_the_recursion_of_witten_and_bell():
  rng = np.random.default_rng(0)
  text = rng.choice(3, p=[0.6, 0.3, 0.1], size=60).tolist()
  model = Ngrams(np.array(text, np.uint8), 3, order=3)
  rows = [list(row) for row in itertools.product(range(3), repeat=4)]
  found = model.log_prob(np.array(rows))
  expected = [[np.log(plain(text, row[:i], row[i], 3, 3)) for i in range(len(row))] for row in rows]
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  np.testing.assert_allclose(np.exp(found.sum(-1)).sum(), 1.0, rtol=1e-12)


def test_the_order_fits_the_alphabet():
  assert Ngrams(np.zeros(9, np.uint8), 27).order == 5
  assert Ngrams(np.zeros(9, np.uint8), 255).order == 3


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A model of words over the characters of text8, in sequences of 16."""
  return build.model(shrunken.config("text8", "small", folder=tmp_path_factory.mktemp("data")))


def judge(model, x_L):
  """The figures of a network that knows one sequence."""
  fake = Fake(toys.posterior(np.array([x_L]), np.ones(1), model.dataset.vocab_size))
  evaluator = TextSamples(dataclasses.replace(model, network=fake), calls=(1, 3), count=5)
  with partitioning.use(model.mesh):
    return evaluator.run(0, {})


def test_words_between_spaces_are_looked_up_in_the_training_text(text):
  known = text.dataset.decode(text.dataset.split("train")[0]["x"]).split(" ")[1]
  sequence = f"q {known} zqzq".ljust(16)[:16]
  assert len(known) <= 8
  figures = judge(text, text.dataset.encode(sequence))
  for calls in (1, 3):
    assert figures[f"T{calls}/valid_words"] == 0.5  # the first and the last may be cut
    assert figures[f"T{calls}/different_words"] == pytest.approx(2 / 10)
  assert figures["valid/valid_words"] > 0.9
  assert figures["T1/network_calls_mean"] == 1.0


def test_text_of_the_corpus_has_fewer_bits_than_noise(text):
  real, noise = text.dataset.split("train")[0]["x"], np.arange(16) % 5 + 20
  bits = [judge(text, x_L)["T1/ngram_bits_per_character"] for x_L in (real, noise)]
  assert bits[0] < 2.0 < 5.0 < bits[1]


def test_words_that_a_piece_cuts_stay_whole(text, monkeypatch):
  whole = set(text.dataset.decode(text.dataset.train_tokens_N).split(" "))
  for piece in (1, 7, 10_000_000):
    monkeypatch.setattr(text_samples, "_PIECE", piece)
    assert text_samples._words(text.dataset) == whole


def test_only_characters_have_words():
  model = build.model(shrunken.config("synthetic", "pairs"))
  with pytest.raises(ValueError, match="needs characters"):
    TextSamples(model)
