"""Prompts: what is given, what is to be filled, and where a bad one stands."""

import pytest

from md4vmd import build
from md4vmd.data import prompts
from tests import shrunken

MASK = 27  # of text8's characters


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  config = shrunken.config("text8", "small", folder=tmp_path_factory.mktemp("data"))
  return build.model(config).dataset


@pytest.fixture(scope="module")
def boards():
  return build.model(shrunken.config("sudoku", "4x4")).dataset


def tokens(text):
  return [" abcdefghijklmnopqrstuvwxyz_".index(character) for character in text]


@pytest.mark.parametrize(
  "prompt, expected",
  [
    ("to be [MASK:3] not", "to be ___ not"),
    ("[MASK]b", "_b"),
    ("a[MASK]", "a_"),
    ("[MASK:2][MASK]x[MASK:1]", "___x_"),
    ("a_b__", "a_b__"),
    ("[MASK:16]", "_" * 16),
    ("a[MASK:0]b_", "ab_"),
  ],
)
def test_a_prompt_is_its_text_with_masks_where_it_is_to_be_filled(dataset, prompt, expected):
  tokens_L, free_L = prompts.parse(dataset, prompt)
  count = len(expected)
  assert tokens_L[:count].tolist() == tokens(expected)
  assert free_L[:count].tolist() == [character == "_" for character in expected]


def test_positions_behind_the_prompt_are_unknown_and_not_to_be_filled(dataset):
  tokens_L, free_L = prompts.parse(dataset, "ab[MASK:2]")
  assert tokens_L.shape == free_L.shape == (16,)
  assert (tokens_L[4:] == MASK).all()
  assert not free_L[4:].any()


def test_a_board_is_a_prompt_of_its_blanks(boards):
  tokens_L, free_L = prompts.parse(boards, "1234 34.. 2... 432.")
  assert tokens_L.tolist() == [0, 1, 2, 3, 2, 3, 4, 4, 1, 4, 4, 4, 3, 2, 1, 4]
  assert free_L.tolist() == [token == 4 for token in tokens_L]


@pytest.mark.parametrize(
  "prompt, words",
  [
    ("abc[MASK:14]", ["17 tokens", "sequences 16", "shorten"]),
    ("to be or not", ["'to be or not'", "nothing to fill", "[MASK:4]"]),
    ("", ["nothing to fill"]),
    ("To be [MASK:3]", ["'T' is not a token", "correct the prompt 'To be [MASK:3]'"]),
    ("a" * 99 + "?[MASK]", ["'?' is not a token", "aaa...'"]),
  ],
)
def test_a_prompt_that_cannot_be_filled_is_refused_with_the_reason(dataset, prompt, words):
  with pytest.raises(ValueError) as caught:
    prompts.parse(dataset, prompt)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
  "mark",
  ["[MASK:4", "[mask:4]", "MASK:4]", "[Mask]", "[MASK 4]", "[MASK:x]", "[MASK:-1]", "[MASK=4]"],
)
def test_a_misspelt_mark_is_answered_with_how_it_is_spelt(dataset, mark):
  with pytest.raises(ValueError) as caught:
    prompts.parse(dataset, f"a[MASK]b {mark} c")
  assert f"{mark!r} in the prompt" in str(caught.value)
  assert "write [MASK:4] for 4 free tokens" in str(caught.value)


def test_words_that_begin_like_a_mark_are_text():
  for text in ("a [masked] ball", "wear a mask: 3 reasons", "MASK", "unmask [it]"):
    assert not prompts._MISSPELT.search(text)


def test_a_board_of_another_size_is_refused(boards):
  with pytest.raises(ValueError, match="a 4x4 board has 16 cells, this one 5; write a dot"):
    prompts.parse(boards, "1234.")


def test_a_full_board_is_answered_with_what_a_free_cell_looks_like(boards):
  with pytest.raises(ValueError, match="nothing to fill; write a dot, 0 or _ for a free cell"):
    prompts.parse(boards, "1234 3412 2143 4321")


@pytest.fixture
def read(tmp_path):
  """A function (lines of a file) -> (the file, its prompts or the message of the error)."""

  def run(*lines):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    try:
      return file, prompts.read("", str(file))
    except ValueError as error:
      return file, str(error)

  return run


def test_prompts_know_where_they_stand(read):
  file, found = read(b'{"prompt": "a"}', b"", b'{"prompt": "b"}')
  assert found == [("a", f"{file}, line 1"), ("b", f"{file}, line 3")]
  assert prompts.read("c", "") == [("c", "sampler.prompt")]
  assert prompts.read("", "") == []


@pytest.mark.parametrize(
  "text, reason",
  [("Hi [MASK]", "'H' is not a token"), ("", "the prompt '' leaves nothing to fill")],
)
def test_a_prompt_that_cannot_be_filled_is_named_by_its_place(dataset, text, reason):
  asked = [prompts.Prompt("a[MASK]", "p.jsonl, line 1"), prompts.Prompt(text, "p.jsonl, line 2")]
  with pytest.raises(ValueError) as caught:
    prompts.parse_all(dataset, asked, 16)
  assert str(caught.value).startswith(f"p.jsonl, line 2: {reason}")


@pytest.mark.parametrize(
  "line, value",
  [
    (b"to be [MASK]", "'to be [MASK]'"),
    (b'{"text": "a[MASK]"}', "{'text': 'a[MASK]'}"),
    (b'["a"]', "['a']"),
    (b'{"prompt": 3}', "{'prompt': 3}"),
    (b'{"prompt": "\xff"}', "byte 0xff at position 12 of the line is not utf-8; convert"),
  ],
)
def test_a_bad_line_of_a_file_of_prompts_is_named_with_what_a_line_is_like(read, line, value):
  file, error = read(b'{"prompt": "a[MASK]"}', line)
  assert error.startswith(f"{file}, line 2: ")
  assert value in error
  assert error.endswith('a line is like {"prompt": "to be [MASK:20]"}')


def test_a_file_without_prompts_is_named(read):
  file, error = read(b"")
  assert error.startswith(f"sampler.prompts_file is '{file}', which holds no prompts; ")


def test_only_ends_of_lines_part_the_prompts_of_a_file(read):
  _, found = read('{"prompt": "a\u2028[MASK]"}'.encode())
  assert [prompt.text for prompt in found] == ["a\u2028[MASK]"]


def test_a_file_of_prompts_that_cannot_be_opened_is_named_with_its_key(tmp_path):
  missing = tmp_path / "no_prompts.jsonl"
  with pytest.raises(FileNotFoundError) as caught:
    prompts.read("", str(missing))
  start = f"sampler.prompts_file is '{missing}': No such file or directory; correct the path"
  assert str(caught.value) == start
  with pytest.raises(IsADirectoryError, match=r"^sampler\.prompts_file is"):
    prompts.read("", str(tmp_path))
