import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from md4vmd.data import text as text_module
from md4vmd.data.text import TEXT8, Text, bigram_entropy_bits, unigram_entropy_bits


@pytest.fixture
def write(tmp_path):
  def write_file(text, name="corpus.txt"):
    path = tmp_path / name
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(path)

  return write_file


def characters(count, alphabet=TEXT8, seed=0):
  return "".join(np.random.default_rng(seed).choice(list(alphabet), count))


def scored_text(dataset, name):
  source = dataset.split(name)
  items = [source[i] for i in range(len(source))]
  return "".join(dataset.decode(item["x"][item["scored"]]) for item in items)


def test_text8_characters_have_the_published_tokens(write):
  dataset = Text(path=write("the cat " * 50), length=10)
  assert dataset.vocab_size == 27
  assert dataset.encode(" az_").tolist() == [0, 1, 26, 27]
  assert dataset.decode(np.array([20, 27, 5])) == "t_e"


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.txt.gz"])
def test_another_file_is_cut_in_proportion(write, name):
  text = characters(1013)
  dataset = Text(path=write(text, name), length=20)
  assert dataset.decode(dataset.train_tokens_N) == text[:911]
  assert scored_text(dataset, "valid") == text[911:962]
  assert scored_text(dataset, "test") == text[962:]
  assert "cut 90/5/5 in proportion" in dataset.describe()


def test_the_whole_text8_is_cut_as_published(write, monkeypatch):
  monkeypatch.setattr(text_module, "_TEXT8_CHARACTERS", 1000)
  assert "published cut of text8" in Text(path=write(characters(1000)), length=10).describe()
  other = Text(path=write(characters(1000, TEXT8 + "!")), length=10)
  assert "in proportion" in other.describe()


def test_every_character_is_scored_once_and_padding_never(write):
  dataset = Text(path=write(characters(2000)), length=32)
  for name, padding in (("valid", 28), ("test", 28)):
    source = dataset.split(name)
    items = [source[i] for i in range(len(source))]
    assert sum(item["scored"].sum() for item in items) == 100
    assert (~items[-1]["scored"]).sum() == padding
    assert (items[-1]["x"][~items[-1]["scored"]] == 0).all()
    assert all(item["x"].shape == (32,) and item["x"].dtype == np.int32 for item in items)


@pytest.mark.parametrize(("stride", "count"), [(None, 9), (5, 17), (1, 81)])
def test_training_windows_start_every_stride(write, stride, count):
  dataset = Text(path=write(characters(100)), length=10, stride=stride)
  train = dataset.split("train")
  assert len(train) == count
  for i in range(count):
    start = i * (stride or 10)
    assert (train[i]["x"] == dataset.train_tokens_N[start : start + 10]).all()
  assert len(train[count - 1]["x"]) == 10


def test_separate_files_are_used_whole(write):
  train, valid = characters(100), characters(37, seed=1)
  dataset = Text(path=write(train, "a.txt"), valid_path=write(valid, "b.txt"), length=10)
  assert dataset.decode(dataset.train_tokens_N) == train
  assert scored_text(dataset, "valid") == valid
  assert "files of their own" in dataset.describe()
  with pytest.raises(ValueError, match="'test' does not exist: use one of train, valid"):
    dataset.split("test")


def test_other_alphabets_are_those_of_the_training_part(write):
  text = "Größe_Ω\n" * 30
  dataset = Text(path=write(text), length=8)
  assert dataset.characters == "".join(sorted(set(text)))
  assert dataset.decode(dataset.train_tokens_N) == text[:216]
  assert dataset.encode("_").tolist() != [dataset.vocab_size]
  assert dataset.encode("█").tolist() == [dataset.vocab_size]
  with pytest.raises(ValueError, match="'q' is not a token"):
    dataset.encode("q")


def test_characters_unseen_in_training_are_named(write):
  with pytest.raises(ValueError, match=r"valid, character 3: 'Z' does not occur"):
    Text(path=write("Abc " * 9, "a.txt"), valid_path=write("AbcZ", "b.txt"), length=4)


def test_files_that_cannot_be_read(write, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no text file at .*nowhere.*Matt Mahoney"):
    Text(path="nowhere.txt")
  with pytest.raises(ValueError, match="not utf-8 at byte 0"):
    Text(path=write(b"\xff\xfe" * 100))
  whole = gzip.compress(characters(1000).encode())
  (tmp_path / "cut.txt.gz").write_bytes(whole[:-50])
  with pytest.raises(ValueError, match=r"cut.txt.gz: the gzip file is cut short"):
    Text(path=str(tmp_path / "cut.txt.gz"))
  with pytest.raises(ValueError, match="300 different characters: at most 255"):
    Text(path=write("".join(map(chr, range(0x400, 0x400 + 300))) * 20), length=4)


@pytest.mark.parametrize("options", [{"length": 0}, {"stride": 0}, {"length": 91}])
def test_wrong_options_are_named(write, options):
  name, value = next(iter(options.items()))
  with pytest.raises(ValueError, match=f"{name}={value}"):
    Text(path=write(characters(100)), **options)


def test_entropies_of_known_sources():
  rng = np.random.default_rng(0)
  uniform = rng.integers(8, size=200_000).astype(np.uint8)
  assert unigram_entropy_bits(uniform, 8) == pytest.approx(3, abs=1e-3)
  assert bigram_entropy_bits(uniform, 8) == pytest.approx(3, abs=1e-3)
  cycle = np.tile(np.arange(200, dtype=np.uint8), 50)
  assert unigram_entropy_bits(cycle, 255) == pytest.approx(np.log2(200))
  assert bigram_entropy_bits(cycle, 255) == pytest.approx(0, abs=1e-12)


def test_real_text8():
  root = os.environ.get("MD4VMD_DATA")
  if not root:
    pytest.skip("MD4VMD_DATA is not set: it names the folder of the real data")
  folder = Path(root) / "text8_prefix"
  dataset = Text(
    path=str(folder / "text8_train.txt.gz"), valid_path=str(folder / "text8_valid.txt.gz")
  )
  tokens = dataset.train_tokens_N
  assert len(tokens) == 6_190_041 and dataset.vocab_size == 27
  assert unigram_entropy_bits(tokens, 27) == pytest.approx(4.12, abs=0.01)
  assert bigram_entropy_bits(tokens, 27) == pytest.approx(3.43, abs=0.01)
