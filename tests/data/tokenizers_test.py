import json
import os
import pathlib

import numpy as np
import pytest
import tokenizers as library

from md4vmd.data import tokenizers

VOCAB = {"a": 0, "b": 1, "ab": 2, "<": 3, "|": 4, ">": 5, "<|endoftext|>": 6}


def write_gpt2(folder, names=("encoder.json", "vocab.bpe"), vocab=VOCAB, **layout):
  folder.mkdir(exist_ok=True)
  (folder / names[0]).write_text(json.dumps(vocab, **layout))
  (folder / names[1]).write_text("#version: 0.2\na b\n")
  return f"gpt2:{folder}"


def write_library(file, vocab):
  made = library.Tokenizer(library.models.WordLevel(vocab, unk_token="[UNK]"))
  made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(["</s>"])
  made.enable_truncation(1)
  made.save(str(file))
  return str(file)


@pytest.fixture(params=["bytes", "characters", "gpt2", "library"])
def tokenizer(request, tmp_path):
  names = {
    "bytes": lambda: "bytes",
    "characters": lambda: "characters",
    "gpt2": lambda: write_gpt2(tmp_path / "gpt2"),
    "library": lambda: write_library(tmp_path / "words.json", {"ab": 0, "b": 1, "[UNK]": 2}),
  }
  return tokenizers.make(names[request.param]())


def test_a_record_says_all_of_a_tokenizer(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "saved.json")
  loaded = tokenizers.load(tmp_path / "saved.json")
  assert loaded.hash == tokenizer.hash
  assert (loaded.vocab_size, loaded.eos) == (tokenizer.vocab_size, tokenizer.eos)
  for text in ("ab", "ab b", ""):
    if tokenizer.record["kind"] != "gpt2" or " " not in text:
      np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
  assert tokenizers.make(str(tmp_path / "saved.json")).hash == tokenizer.hash


def test_the_end_of_a_document_is_shown_and_is_the_last_kind_of_token(tokenizer):
  ids = tokenizer.encode("ab")
  assert ids.dtype == np.int32 and 0 < len(ids) and ids.max() < tokenizer.vocab_size
  shown = tokenizer.decode(np.concatenate([ids, [tokenizer.eos], ids]))
  assert shown == "ab<|endoftext|>ab"


def test_tokenizers_differ_in_their_hash(tmp_path):
  names = ["bytes", "characters", write_gpt2(tmp_path / "a")]
  other = write_gpt2(tmp_path / "b", vocab=VOCAB | {"a": 1, "b": 0})
  assert len({tokenizers.make(name).hash for name in (*names, other)}) == 4


def test_the_hash_of_gpt2_does_not_depend_on_the_layout_of_its_files(tmp_path):
  one = tokenizers.make(write_gpt2(tmp_path / "a"))
  shuffled = dict(reversed(VOCAB.items()))
  names = ("vocab.json", "merges.txt")
  assert tokenizers.make(write_gpt2(tmp_path / "b", names, shuffled, indent=1)).hash == one.hash


def test_bpe_merges_and_never_reads_the_end_of_a_document_from_a_text(tmp_path):
  tokenizer = tokenizers.make(write_gpt2(tmp_path / "a"))
  assert tokenizer.encode("abba").tolist() == [2, 1, 0]
  assert tokenizer.encode("<|a|>").tolist() == [3, 4, 0, 4, 5]


def test_special_tokens_in_a_text_are_text_and_nothing_is_cut_off(tmp_path):
  tokenizer = tokenizers.make(write_library(tmp_path / "w.json", {"ab": 0, "b": 1, "[UNK]": 2}))
  assert (tokenizer.vocab_size, tokenizer.eos) == (4, 3)
  assert tokenizer.encode("ab b </s> ab").tolist() == [0, 1, 2, 0]


def test_bytes_are_utf8_and_half_characters_are_shown_as_such():
  tokenizer = tokenizers.make("bytes")
  assert tokenizer.encode("aé").tolist() == [97, 195, 169]
  assert tokenizer.decode(np.array([97, 195, 256, 98])) == "a�<|endoftext|>b"
  assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)


def test_characters_are_those_of_text8_or_of_a_file(tmp_path):
  assert tokenizers.make("characters").encode(" az").tolist() == [0, 1, 26]
  (tmp_path / "marks.txt").write_text("cabbage")
  tokenizer = tokenizers.make(f"characters:{tmp_path}/marks.txt")
  assert tokenizer.encode("bag").tolist() == [1, 0, 4]
  assert (tokenizer.vocab_size, tokenizer.eos) == (6, 5)
  with pytest.raises(ValueError, match="'x' has no token: the text may hold 'abceg'"):
    tokenizer.encode("bax")


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("{", "not a JSON file"),
    ("[" * 100_000, "not a JSON file"),
    ("[1]", "holds one object"),
    ('{"kind": "words"}', "kind='words'"),
    ('{"kind": ["bytes"]}', "there is no such kind"),
    ('{"added_tokens": [3]}', "no file of the library `tokenizers`"),
    ('{"model": {"vocab": 3}}', "no file of the library `tokenizers`"),
    ('{"kind": "characters", "characters": "aa"}', "different characters"),
    ('{"kind": "gpt2", "vocab": {"a": 1}, "merges": []}', "its ids are not 0 to V-1"),
    ('{"kind": "gpt2", "vocab": {"a": 0}, "merges": []}', "no token '<|endoftext|>'"),
    ('{"kind": "gpt2", "vocab": {"a": 0}, "merges": [["b", "c"]]}', "do not fit"),
    ('{"kind": "library", "eos": "a", "tokenizer": {}}', "cannot read it"),
    ('{"model": {"vocab": {"a": 0}}}', "to end a document"),
  ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, words):
  (tmp_path / "t.json").write_text(content)
  with pytest.raises(ValueError) as caught:
    tokenizers.make(str(tmp_path / "t.json"))
  assert words in str(caught.value)


@pytest.mark.parametrize(
  ("name", "error", "words"),
  [
    ("gpt2", ValueError, "no such tokenizer: give 'bytes'"),
    ("gpt2:nowhere", FileNotFoundError, "nowhere holds neither encoder.json and vocab.bpe nor"),
    ("nowhere.json", FileNotFoundError, "no tokenizer file nowhere.json"),
    ("characters:nowhere", FileNotFoundError, "no tokenizer file nowhere"),
  ],
)
def test_a_name_that_means_nothing_is_refused(name, error, words):
  with pytest.raises(error, match=words):
    tokenizers.make(name)


def test_a_file_too_large_for_a_tokenizer_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizers, "_LARGEST_FILE", 10)
  (tmp_path / "t.json").write_text(" " * 11)
  with pytest.raises(ValueError, match="too large for a tokenizer"):
    tokenizers.make(str(tmp_path / "t.json"))


def test_the_genuine_gpt2():
  root = os.environ.get("MD4VMD_DATA")
  if not root:
    pytest.skip("MD4VMD_DATA is not set: it names the folder of the real data")
  tokenizer = tokenizers.make(f"gpt2:{pathlib.Path(root) / 'gpt2_bpe'}")
  assert (tokenizer.vocab_size, tokenizer.eos) == (50257, 50256)
  assert tokenizer.encode("Hello world").tolist() == [15496, 995]
  text = "Größe: 3×4 = 12;\n\n\t日本語 🙂 didn't  <|endoftext|>"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.eos not in tokenizer.encode(text)
