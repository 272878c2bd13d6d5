"""Corpora for zero-shot likelihood: what a document is, and how its published spacing is undone.

The sets are published as tokens with spaces between; language models are scored on text. The rules
are the customary ones (of GPT-2's and Megatron's evaluations, as used by SEDD, RADD and MDLM), and
each is a function from text to text. Two conventions of packing exist and do not agree; a figure
names its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from md4vmd.data import documents
from md4vmd.data.base import Arrays, require
from md4vmd.data.tokenizers import Tokenizer


def _replace(text: str, *pairs: tuple[str, str]) -> str:
  for old, new in pairs:
    text = text.replace(old, new)
  return text


def wikitext(text: str) -> str:
  """Undoes WikiText's spacing: `@-@` in numbers, before punctuation, within quotes and brackets."""
  text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text.replace("s '", "s'"))
  text = _replace(text, (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
  text = _replace(text, *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"))
  for opening, closing in (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")):
    a, z = re.escape(opening), re.escape(closing)
    text = re.sub(rf"{a}\s*([^{z}]*?)\s*{z}", rf"{opening}\1{closing}", text)
  return _replace(
    text,
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
  )


def ptb(text: str) -> str:
  """Undoes the Penn Treebank's spacing; its numbers N become 1 and its <unk> a question mark."""
  text = _replace(text, (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"))
  text = _replace(text, (" \n ", "\n"), ("\\/", "/"))
  while " N " in text:
    text = text.replace(" N ", " 1 ")
  return _replace(text, ("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))


def lm1b(text: str) -> str:
  """Undoes the spacing of the One Billion Word Benchmark."""
  text = _replace(text, ("http : / / ", "http://"), ("https : / / ", "https://"))
  text = re.sub(r" '(\w+)", r"'\1", text)
  text = re.sub(r" (\w+) \. ", r" \1. ", text)
  text = re.sub(r" (\w+) \.$", r" \1.", text)
  text = re.sub(r" \?$", "?", text.replace(" ? ", "? "))
  text = re.sub(r" !$", "!", text.replace(" ! ", "! "))
  text = _replace(text, (" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/"))
  for opening, closing in (('"', '"'), ("'", "'"), ("(", ")"), ("[", "]")):
    a, z = re.escape(opening), re.escape(closing)
    text = re.sub(rf"{a} ([^{a}{z}]+) {z}", rf"{opening}\1{closing}", text)
  return _replace(text, ("$ ", "$"), ("£ ", "£"))


def lambada(text: str) -> str:
  """Of LAMBADA as plain text: straight double quotes, no space around, a line break in front."""
  return "\n" + _replace(text, ("“", '"'), ("”", '"')).strip()


def lambada_tokenized(text: str) -> str:
  """Of LAMBADA's release in lower-case tokens: `lambada`, then its spacing and quotes undone.

  A rule of our own; the published ones are for plain text.
  """
  text = _replace(lambada(text), ("‘", "'"), ("’", "'"))
  text = _replace(text, ("`` ", '"'), (" ''", '"'), ("``", '"'), ("''", '"'), (" n't", "n't"))
  text = re.sub(r" ('(?:s|m|d|re|ve|ll)\b)", r"\1", text)
  return re.sub(r" ([,.;:!?])(?= |$|\")", r"\1", text)


def scientific(text: str) -> str:
  """Of the papers of PubMed and arXiv: WikiText's rules, then those of the One Billion Words."""
  return lm1b(wikitext(text))


DETOKENIZERS: Mapping[str, Callable[[str], str]] = {
  "none": str,
  "wikitext": wikitext,
  "ptb": ptb,
  "lm1b": lm1b,
  "lambada": lambada,
  "lambada_tokenized": lambada_tokenized,
  "scientific": scientific,
}


class Corpus(NamedTuple):
  """How a set is read.

  Attributes:
    detokenizer: one of DETOKENIZERS.
    unit: what a document of plain text is.
    fields: where the text is in JSON objects and tables, the first of these that there is; a list
      of texts is joined by line breaks.
    row: what a row is of its line: "line" as it is, "break" with its line break where it is not
      empty, or "stripped" of the space around it.
  """

  detokenizer: str
  unit: str = "line"
  fields: tuple[str, ...] = ("text",)
  row: str = "line"


# A row of the published set is a document, the empty lines of WikiText included.
SETS = {
  "lambada": Corpus("lambada"),
  "lambada_tokenized": Corpus("lambada_tokenized"),
  "wikitext2": Corpus("wikitext", row="break"),
  "wikitext103": Corpus("wikitext", row="break"),
  "ptb": Corpus("ptb", fields=("sentence",), row="stripped"),
  "1bw": Corpus("lm1b"),
  "ag_news": Corpus("none"),
  "pubmed": Corpus("scientific", "file", ("article", "article_text")),
  "arxiv": Corpus("scientific", "file", ("article", "article_text")),
}

PASSAGES = frozenset(("lambada", "lambada_tokenized"))  # sets that ask for the last word


def read(name: str, path: Path) -> Iterator[tuple[str, str]]:
  """(text as published, text as it is scored) of every document of a set, in order.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there is no such set, or the file is damaged or of another kind.
  """
  require(name in SETS, f"there is no such set; known: {', '.join(SETS)}", set=name)
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path} of the set '{name}'; correct the path")
  require(
    ".csv" not in path.suffixes,
    f"{path}: tables of text are not read; write JSON lines with the field "
    f"'{SETS[name].fields[0]}' (of AG News, title and description with a space between)",
    set=name,
  )
  corpus = SETS[name]
  is_json = documents.seems_json(path)
  require(
    not is_json or corpus.unit == "file",
    f"{path}: its first line is a JSON object and its name that of plain text; call it .jsonl",
    set=name,
  )
  detokenize = DETOKENIZERS[corpus.detokenizer]
  texts = documents.read(path, unit=corpus.unit, field=corpus.fields, is_json=is_json)
  for text in texts:
    if corpus.row == "break":
      text = text.rstrip("\n") + "\n" if text.strip() else ""
    elif corpus.row == "stripped":
      text = text.strip()
    yield text, detokenize(text)


# Every document ends in the end-of-document token, documents are joined in order and cut into
# chunks of which every token is scored; what fills no chunk is dropped. A chunk is framed by this
# many end-of-document tokens on either side.
CONVENTIONS = {"radd-v1": 0, "mdlm-v1": 1}


class Packed(NamedTuple):
  """A set as a model scores it.

  Attributes:
    source: the chunks; every token of them is scored.
    documents: number of documents.
    tokens: tokens of the joined documents, their ends included, before packing.
    dropped: those of them that are in no chunk.
    framed: tokens of a chunk that are not of the text, but frame it.
    words: words of the text as published, between white space.
    bytes: utf-8 bytes of the text as it is scored.
  """

  source: Arrays
  documents: int
  tokens: int
  dropped: int
  framed: int
  words: int
  bytes: int


def pack(name: str, path: Path, tokenizer: Tokenizer, *, length: int, convention: str) -> Packed:
  """A set in chunks of `length` tokens by a convention.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: set or convention do not exist, or the set fills no chunk.
  """
  require(
    convention in CONVENTIONS,
    f"there is no such convention; known: {', '.join(CONVENTIONS)}",
    convention=convention,
  )
  count = words = size = 0
  ids = []
  for published, text in read(name, path):
    ids += [tokenizer.encode(text), np.array([tokenizer.eos], np.int32)]
    count, words, size = count + 1, words + len(published.split()), size + len(text.encode())
  stream_N = np.concatenate([np.zeros(0, np.int32), *ids])
  frame = CONVENTIONS[convention]
  inner = length - 2 * frame
  chunks = len(stream_N) // inner if inner > 0 else 0
  require(chunks > 0, f"{path} has {len(stream_N)} tokens, too few for a chunk", length=length)
  x_CxM = stream_N[: chunks * inner].reshape(chunks, inner)
  x_CxL = np.pad(x_CxM, ((0, 0), (frame, frame)), constant_values=tokenizer.eos)
  dropped = len(stream_N) - chunks * inner
  return Packed(Arrays(x_CxL), count, len(stream_N), dropped, 2 * frame, words, size)
