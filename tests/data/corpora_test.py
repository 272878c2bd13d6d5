import gzip
import json

import numpy as np
import pytest

from md4vmd.data import answers, corpora, tokenizers
from tests.three_documents import LENGTH, SETS, write

BYTES = tokenizers.make("bytes")
E = 256  # ends a document of bytes


@pytest.mark.parametrize(
  ("name", "published", "text"),
  [
    ("none", "a , b", "a , b"),
    ("wikitext", " = Homarus = \n", " = Homarus =\n"),
    ("wikitext", "1 @,@ 500 @-@ 2 @.@ 5 m", "1,500-2.5 m"),
    ("wikitext", "a ( b ) , c . d : e ; f !", "a (b), c. d: e; f !"),
    ("wikitext", 'only " lobster red " on [ x ]', 'only "lobster red" on [x]'),
    ("wikitext", "it 's 5 ° C", "it's 5°C"),
    ("ptb", "mr. <unk> did n't pay $ N or N N", "mr. ? didn't pay $1 or 1 N"),
    ("ptb", "the firm 's and\\/or the firms ' N N x", "the firm's and/or the firms' 1 1 x"),
    ("lm1b", 'He said : " no " , didn \'t he ?', 'He said: "no", didn\'t he?'),
    ("lm1b", "It cost $ 5 ( or £ 4 ) at http : / / x y .", "It cost $5 (or £4) at http://x y."),
    ("lambada", " “Straight” it ’s\nok , ``n't . ", '\n"Straight" it ’s\nok , ``n\'t .'),
    (
      "lambada_tokenized",
      "`` nineteen , '' she did n't say , i 'm",
      "\n\"nineteen,\" she didn't say, i'm",
    ),
    ("lambada_tokenized", "“Straight” it ’s", '\n"Straight" it\'s'),
    ("scientific", "a ( b ) , c ?", "a (b), c?"),
  ],
)
def test_published_spacing_is_undone(name, published, text):
  assert corpora.DETOKENIZERS[name](published) == text


def test_every_set_has_its_three_documents():
  assert SETS.keys() == corpora.SETS.keys()


@pytest.mark.parametrize("name", sorted(corpora.SETS))
def test_a_set_is_read_as_published_and_as_it_is_scored(tmp_path, name):
  assert "".join(f"{text}|" for _, text in corpora.read(name, write(tmp_path, name))) == (
    SETS[name].joined
  )


@pytest.mark.parametrize("name", sorted(corpora.SETS))
def test_radd_v1_joins_documents_by_their_end_and_drops_what_fills_no_chunk(tmp_path, name):
  three = SETS[name]
  stream = [E if byte == ord("|") else byte for byte in three.joined.encode()]
  path = write(tmp_path, name)
  packed = corpora.pack(name, path, BYTES, length=LENGTH, convention="radd-v1")
  assert packed.source.x_NxL.ravel().tolist() == stream[: LENGTH * three.chunks["radd-v1"].count]
  assert packed.framed == 0


def test_mdlm_v1_frames_every_chunk_by_ends_of_documents(tmp_path):
  path = write(tmp_path, "ag_news", ("abc", "de", "f"))  # a b c E d e E f E
  packed = corpora.pack("ag_news", path, BYTES, length=6, convention="mdlm-v1")
  a, b, c, d, e, f = b"abcdef"
  assert packed.source.x_NxL.tolist() == [[E, a, b, c, E, E], [E, d, e, E, f, E]]
  assert (packed.tokens, packed.dropped, packed.framed, packed.bytes) == (9, 1, 2, 6)


def test_a_line_of_plain_text_is_a_document(tmp_path):
  (tmp_path / "wiki.txt").write_text(" \n = A = \n b \n")
  packed = corpora.pack("wikitext2", tmp_path / "wiki.txt", BYTES, length=3, convention="radd-v1")
  stream = [E, *b" = A =\n", E, *b" b\n", E]
  assert packed.source.x_NxL.ravel().tolist() == stream[:12] and packed.dropped == 1


def test_the_plain_text_of_the_penn_treebank_is_its_published_rows(tmp_path):
  rows = write(tmp_path, "ptb")
  (tmp_path / "ptb.txt").write_text("".join(f"{row}\n" for row in SETS["ptb"].rows))
  assert list(corpora.read("ptb", tmp_path / "ptb.txt")) == list(corpora.read("ptb", rows))
  (tmp_path / "ptb.txt").write_text(" pay $ N \n sales of N \n")
  assert [text for _, text in corpora.read("ptb", tmp_path / "ptb.txt")] == [
    "pay $ N",  # as in the published rows, a number that ends a line stays N
    "sales of N",
  ]


@pytest.mark.parametrize("file", ["test.txt", "test.txt.gz", "test.jsonl"])
def test_the_release_of_papers_is_read_as_articles(tmp_path, file):
  rows = [{"article_id": "1", "article_text": ["a b , c", "d"], "abstract_text": ["no"]}]
  rows.append({"article_id": "2", "article_text": ["e"]})
  raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
  (tmp_path / file).write_bytes(gzip.compress(raw) if file.endswith(".gz") else raw)
  read = list(corpora.read("arxiv", tmp_path / file))
  assert read == [("a b , c\nd", "a b, c\nd"), ("e", "e")]


def test_files_of_another_kind_are_refused(tmp_path):
  (tmp_path / "wiki.txt").write_text('{"text": "a"}\n')
  with pytest.raises(ValueError, match=r"wiki\.txt: its first line .* call it \.jsonl"):
    list(corpora.read("wikitext2", tmp_path / "wiki.txt"))
  (tmp_path / "wiki.txt").write_text("{ braces } are text\n")
  assert len(list(corpora.read("wikitext2", tmp_path / "wiki.txt"))) == 1
  (tmp_path / "test.csv.gz").write_bytes(b"")
  with pytest.raises(ValueError, match=r"test\.csv\.gz: tables of text are not read"):
    list(corpora.read("ag_news", tmp_path / "test.csv.gz"))


def test_sets_that_cannot_be_packed_are_refused(tmp_path):
  path = write(tmp_path, "ag_news", ("abc",))
  pack = lambda name, path, length, convention: corpora.pack(
    name, path, BYTES, length=length, convention=convention
  )
  with pytest.raises(ValueError, match="set='agnews': there is no such set; known: lambada"):
    pack("agnews", path, 4, "radd-v1")
  with pytest.raises(ValueError, match="no such convention; known: radd-v1, mdlm-v1"):
    pack("ag_news", path, 4, "radd")
  with pytest.raises(FileNotFoundError, match=r"no file .*none of the set 'ptb'"):
    pack("ptb", tmp_path / "none", 4, "radd-v1")
  for length, convention in ((5, "radd-v1"), (7, "mdlm-v1"), (2, "mdlm-v1")):
    with pytest.raises(ValueError, match="has 4 tokens, too few for a chunk"):
      pack("ag_news", path, length, convention)


# Questions.


def test_questions_are_multiple_choice_or_one_answer(tmp_path):
  path = tmp_path / "q.jsonl"
  path.write_text(
    '{"ctx": "He ", "endings": ["runs.", " sits."], "label": "1", "ind": 3}\n'
    '{"prompt": "2 + 2 =", "answer": "4"}\n'
  )
  assert answers.read(path) == [
    answers.Question("He", (" runs.", " sits."), 1),
    answers.Question("2 + 2 =", (" 4",), 0),
  ]


@pytest.mark.parametrize(
  "line",
  [
    '{"ctx": "a", "endings": ["b"], "label": 1}',
    '{"ctx": "a", "endings": ["b"], "label": "x"}',
    '{"ctx": "a", "endings": ["b", 3], "label": 0}',
    '{"prompt": "a"}',
    '{"prompt": "a", "answer": " "}',
    "[1]",
  ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line):
  (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
  with pytest.raises(ValueError, match=r"q\.jsonl, line 2: expected \{.ctx.: text"):
    answers.read(tmp_path / "q.jsonl")


def test_missing_and_empty_files_of_questions_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no file of questions"):
    answers.read(tmp_path / "q.jsonl")
  (tmp_path / "q.jsonl").write_text("\n")
  with pytest.raises(ValueError, match="holds no questions"):
    answers.read(tmp_path / "q.jsonl")


def test_only_the_answer_is_free_and_what_follows_it_is_unknown():
  packed = answers.rows(BYTES, [("ab", " c"), ("abcdef", " g")], length=6)
  a, b, c, d, e, f, g = b"abcdefg"
  assert packed.source[0]["x"].tolist() == [E, a, b, 32, c, 257]
  assert np.flatnonzero(~packed.source[0]["given"]).tolist() == [3, 4]
  assert packed.source[1]["x"].tolist() == [c, d, e, f, 32, g]
  assert np.flatnonzero(~packed.source[1]["given"]).tolist() == [4, 5]
  assert packed.shortened == 1
  with pytest.raises(ValueError, match="an answer has 7 tokens; an example has room for 1 to 6"):
    answers.rows(BYTES, [("a", " bcdefg")], length=6)


@pytest.mark.parametrize(
  ("name", "passage", "prompt", "word"),
  [
    ("lambada_tokenized", "he said hello , bob", "\nhe said hello,", " bob"),
    ("lambada_tokenized", "he said , `` bob", '\nhe said, "', "bob"),
    ("lambada_tokenized", "they did n't", "\nthey", " didn't"),
    ("lambada", "He said hello, Bob.", "\nHe said hello,", " Bob"),
    ("lambada", 'He said: "Hello Bob!"', '\nHe said: "Hello', " Bob"),
    ("lambada", "He said: “Bob.” ", '\nHe said: "', "Bob"),
    ("lambada", "He said\nBob", "\nHe said\n", "Bob"),
    ("lambada", "He is well-known", "\nHe is", " well-known"),
  ],
)
def test_the_last_words_of_passages_are_questions(tmp_path, name, passage, prompt, word):
  path = write(tmp_path, name, (passage, "word", "“word”", "..."))
  assert answers.last_words(name, path) == [answers.Question(prompt, (word,), 0)]
