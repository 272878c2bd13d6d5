"""Three documents of every zero-shot set, with what is counted in them by hand, in bytes."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from md4vmd.data import corpora

LENGTH = 16  # of a chunk


class Chunks(NamedTuple):
  """What a convention makes: chunks, bytes that are dropped; a's and ends that are scored."""

  count: int
  dropped: int
  a: int
  ends: int


class Three(NamedTuple):
  """A set.

  Attributes:
    rows: three rows as published.
    joined: the documents as they are scored, each with | behind it for its end.
    tokens: bytes of the joined documents and their ends.
    words: words of the rows.
    chunks: by convention.
  """

  rows: tuple[str, str, str]
  joined: str
  tokens: int
  words: int
  chunks: dict[str, Chunks]


def _three(rows, joined, tokens, words, radd, mdlm) -> Three:
  return Three(rows, joined, tokens, words, {"radd-v1": Chunks(*radd), "mdlm-v1": Chunks(*mdlm)})


SETS = {
  "lambada": _three(
    ("“a b,” it ’s", " ``a n't a ", "to a.\nA ban"),
    '\n"a b," it ’s|\n``a n\'t a|\nto a.\nA ban|',
    40,
    11,
    (2, 8, 4, 2),
    (2, 12, 3, 6),
  ),
  "lambada_tokenized": _three(
    ("`` a b , '' it 's", "a did n't , a", "to a ."),
    "\n\"a b,\" it's|\na didn't, a|\nto a.|",
    33,
    15,
    (2, 1, 4, 2),
    (2, 5, 3, 6),
  ),
  "wikitext2": _three(
    ("", " = A a = ", " b , c ( a ) . a @-@ a "),
    "| = A a =\n| b, c (a). a-a\n|",
    27,
    14,
    (1, 11, 1, 2),
    (1, 13, 1, 4),
  ),
  "wikitext103": _three(
    ("", " = = A = = ", ' 1 @,@ 5 " a " a ; a '),
    '| == A ==\n| 1,5 "a" a; a\n|',
    26,
    14,
    (1, 10, 0, 2),
    (1, 12, 0, 4),
  ),
  "ptb": _three(
    (" a 's $ N b ", " <unk> did n't a N N ", " the as ' N\\/a a "),
    "a's $1 b|? didn't a 1 N|the as' N/a a|",
    38,
    16,
    (2, 6, 3, 2),
    (2, 10, 2, 6),
  ),
  "1bw": _three(
    ("a , b ? a", "c a at http : / / x y .", '$ d : " a " !'),
    'a, b? a|c a at http://x y.|$d: "a"!|',
    36,
    22,
    (2, 4, 4, 2),
    (2, 8, 4, 6),
  ),
  "ag_news": _three(
    ("a , b #36;a", "ca t", "a dull a"),
    "a , b #36;a|ca t|a dull a|",
    26,
    9,
    (1, 10, 3, 1),
    (1, 12, 3, 3),
  ),
  "pubmed": _three(
    ("a ( b ) , a ?", "ca ; a", "d ? ab"),
    "a (b), a?|ca; a|d? ab|",
    22,
    13,
    (1, 6, 4, 2),
    (1, 8, 3, 3),
  ),
  "arxiv": _three(
    ("a @xmath0 , b", "ca : a", "d ! at @xcite"),
    "a @xmath0, b|ca: a|d! at @xcite|",
    32,
    11,
    (2, 0, 5, 3),
    (2, 4, 5, 6),
  ),
}


def write(folder: pathlib.Path, name: str, rows: tuple[str, ...] | None = None) -> pathlib.Path:
  """A file of JSON lines with the rows of a set."""
  field, path = corpora.SETS[name].fields[0], folder / f"{name}.jsonl"
  lines = [json.dumps({field: row}) for row in rows or SETS[name].rows]
  path.write_text("\n".join(lines) + "\n")
  return path
