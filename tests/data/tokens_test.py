import json
import shutil

import numpy as np
import pytest

from md4vmd.data import loader, prepare_text, prompts, shards
from md4vmd.data.tokens import Tokens
from tests import shrunken

LENGTH = 16


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  return shrunken.prepare_bytes(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def copy(prepared, tmp_path):
  """A copy that a test may damage."""
  return shutil.copytree(prepared, tmp_path / "copy")


def read(folder, **settings):
  return Tokens(path=str(folder), **({"length": LENGTH} | settings))


def damage(file, place):
  raw = bytearray(file.read_bytes())
  raw[place] ^= 1
  file.write_bytes(raw)


def test_examples_are_read_in_any_order_and_by_the_loader(prepared):
  dataset = read(prepared)
  train, valid = dataset.split("train"), dataset.split("valid")
  assert len(train) == 187 and len(valid) == 6
  assert (train[186]["x"] == read(prepared).split("train")[186]["x"]).all()
  assert train[0]["x"].shape == (LENGTH,) and train[0]["x"].dtype == np.int32
  assert valid[0]["scored"].all() and 0 < valid[5]["scored"].sum() < LENGTH
  batch = next(loader.train_batches(dataset, batch_size=4, seed=0))
  assert batch["x_BxL"].shape == (4, LENGTH) and "scored_BxL" not in batch
  scored = [b["scored_BxL"] for b in loader.evaluation_batches(valid, batch_size=4)]
  assert np.concatenate(scored)[:6].sum() == 93
  with pytest.raises(ValueError, match="index=187: there are 187 examples"):
    _ = train[187]


def test_text_and_marks_become_tokens_and_text_again(prepared):
  dataset = read(prepared)
  text = "to be [MASK] not<|endoftext|>that é"
  ids = dataset.encode(text)
  assert ids[6] == dataset.vocab_size == 257 and (ids == 256).sum() == 1
  assert dataset.decode(ids) == text
  assert dataset.cells(ids[5:9]) == [" ", "[MASK]", " ", "n"]


def test_prompts_are_tokens_with_masks_where_they_are_to_be_filled(prepared):
  tokens_L, free_L = prompts.parse(read(prepared), "be [MASK:2] not")
  assert tokens_L[:9].tolist() == [98, 101, 32, 257, 257, 32, 110, 111, 116]
  assert np.flatnonzero(free_L).tolist() == [3, 4]


def test_a_corrupt_shard_is_named_when_it_is_first_used(copy):
  file = copy / "train-00000-of-00001.arrayrecord"
  damage(file, file.stat().st_size // 2)
  dataset = read(copy)
  with pytest.raises(ValueError) as caught:
    _ = dataset.split("train")[0]
  assert str(file) in str(caught.value) and "SHA-256" in str(caught.value)
  assert len(dataset.split("valid")[0]["x"]) == LENGTH


def test_without_checksums_a_damaged_record_is_named_when_it_is_read(copy):
  file = copy / "train-00000-of-00001.arrayrecord"
  record = read(copy).split("train")[100]["x"].astype("<u2").tobytes()
  damage(file, file.read_bytes().index(record) + 3)
  train = read(copy, verify=False).split("train")
  assert train[0]["x"].shape == (LENGTH,)
  with pytest.raises(ValueError, match=r"train-00000-of-00001\.arrayrecord is corrupt: record 100"):
    _ = train[100]


@pytest.mark.parametrize("change", ["missing", "short", "swapped"])
def test_shards_that_are_not_those_of_the_manifest_are_named(copy, change):
  file = copy / "train-00000-of-00001.arrayrecord"
  if change == "missing":
    file.unlink()
  elif change == "short":
    file.write_bytes(file.read_bytes()[:-1])
  else:
    rows = [np.zeros(LENGTH, "<u2")] * 187
    shards.write_shard(file, rows, copy)
  with pytest.raises(ValueError, match=r"train-00000-of-00001\.arrayrecord"):
    _ = read(copy).split("train")[0]


@pytest.mark.parametrize(
  ("row", "words"),
  [
    (np.full(LENGTH, 257, "<u2"), "holds no tokens of a vocabulary of this size"),
    (np.zeros(LENGTH - 1, "<u2"), "record 1 has 15 tokens, not 16"),
    (np.zeros(2 * LENGTH + 1, "u1"), "record 1 has 33 bytes"),
  ],
)
def test_records_that_are_no_examples_are_refused(tmp_path, row, words):
  file = tmp_path / "train.arrayrecord"
  shard = shards.write_shard(file, [np.zeros(LENGTH, "<u2"), row, row], tmp_path)
  source = shards.Shards(tmp_path, [shard], length=LENGTH, vocab_size=257, is_padded=False)
  assert source[0]["x"].shape == (LENGTH,)
  with pytest.raises(ValueError, match=words) as caught:
    _ = source[1]
  assert str(file) in str(caught.value)


def test_another_length_is_refused_with_the_right_one(prepared):
  with pytest.raises(ValueError, match=r"length=32: .*manifest\.json: .*set data\.length=16"):
    read(prepared, length=32)


def test_another_tokenizer_is_refused(copy):
  assert read(copy, tokenizer="bytes").vocab_size == 257
  with pytest.raises(
    ValueError, match=r"tokenizer='characters': .*prepared with another tokenizer"
  ):
    read(copy, tokenizer="characters")
  (copy / "tokenizer.json").write_text('{"kind": "characters", "characters": "abc"}')
  with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer of the manifest"):
    read(copy)
  (copy / "tokenizer.json").write_text('{"kind": "words"}')
  with pytest.raises(ValueError, match=r"tokenizer\.json: kind='words'"):
    read(copy)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"version": "tokens-v0"}, "its version is 'tokens-v0' and not 'tokens-v1'"),
    ({"vocab_size": 300}, "vocab_size is 300"),
    ({"length": -1}, "damaged"),
    ({"splits": {"train": {}}}, "damaged"),
    ({"splits": {"train": {"documents": None}}}, "damaged (key='documents': must be a number)"),
    ({"splits": []}, "damaged"),
  ],
)
def test_a_damaged_manifest_is_named(copy, change, words):
  file = copy / "manifest.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(ValueError) as caught:
    read(copy)
  assert words in str(caught.value) and "copy" in str(caught.value)


@pytest.mark.parametrize("name", ["../train.arrayrecord", "/etc/passwd", ".hidden"])
def test_no_shard_lies_outside_of_the_folder(copy, name):
  manifest = json.loads((copy / "manifest.json").read_text())
  manifest["splits"]["train"]["shards"][0]["name"] = name
  (copy / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match="a shard lies in the folder itself"):
    read(copy)


def test_what_is_not_prepared_is_told_in_one_line(tmp_path):
  with pytest.raises(FileNotFoundError) as caught:
    read(tmp_path / "none")
  assert "none does not exist: python -m md4vmd.data.prepare_text --source" in str(caught.value)
  assert "\n" not in str(caught.value)
  (tmp_path / "none/work").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="none is not finished"):
    read(tmp_path / "none")


def test_a_shard_is_found_by_the_number_of_the_example(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare_text, "_SHARD", 10)
  many = shrunken.prepare_bytes(tmp_path)
  assert len(list(many.glob("train-*"))) == 19
  train, valid = read(many).split("train"), read(many).split("valid")
  stream = np.concatenate([train[i]["x"] for i in range(len(train))])
  lines = (tmp_path / "lines.txt").read_text().splitlines()
  held = read(many).decode(
    np.concatenate([x["x"][x["scored"]] for x in map(valid.__getitem__, range(6))])
  )
  kept = "".join(f"{line}<|endoftext|>" for line in lines if line not in held)
  assert kept.startswith(read(many).decode(stream)) and len(stream) == 187 * LENGTH
