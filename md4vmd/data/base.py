"""What every dataset is: named splits of examples, and words for its tokens.

An example is a dict of arrays: "x" int32 [L], and where the data has them "given" bool [L], True at
clues, "scored" bool [L], False on padding, and "label" int32. The mask id is `vocab_size`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Item = dict[str, np.ndarray]


class Source(Protocol):
  """The examples of a split, in a fixed order and readable in any order."""

  def __len__(self) -> int:
    """Number of examples."""
    ...

  def __getitem__(self, index: int, /) -> Item:
    """The example of that number."""
    ...


class Arrays:
  """A source held in memory, one array per key with the examples along its first axis."""

  def __init__(self, x_NxL: np.ndarray, **others: np.ndarray):
    self.x_NxL = x_NxL
    self.others = others

  def __len__(self) -> int:
    """Number of examples."""
    return len(self.x_NxL)

  def __getitem__(self, index: int) -> Item:
    """The example of that number."""
    item = {key: array[index] for key, array in self.others.items()}
    return {"x": self.x_NxL[index].astype(np.int32), **item}


class Dataset:
  """Base of the datasets: a subclass checks its options, then hands its splits to this one.

  Attributes:
    vocab_size: V, the number of tokens without the mask.
    length: L, the number of tokens of an example.
    train_split: name of the split that is trained on.
    unit: what one token is in reports: "token", "character" or "dim".
    free_mark: how a prompt writes what is to be filled, for messages.
    columns: tokens in a row of a picture.
    box: side of the boxes that a picture outlines; None for none.
    image_shape: (H, W, C) where an example is an image; None where it is none.
    classes: number of labels, where examples carry them as "label"; else 0.
    support_MxL: every possible example, where they can be listed, else None.
    probabilities_M: their probabilities.
  """

  train_split = "train"
  unit = "token"
  free_mark = "[MASK:4] for 4 free tokens, or another number"
  columns = 32
  box: int | None = None
  image_shape: tuple[int, int, int] | None = None
  classes: int = 0
  support_MxL: np.ndarray | None = None
  probabilities_M: np.ndarray | None = None

  def __init__(
    self,
    *,
    vocab_size: int,
    length: int,
    splits: Mapping[str, Source],
    about: str,
    entropies_nats: Mapping[str, float] | None = None,
  ):
    """Keeps the splits.

    Args:
      vocab_size: number of tokens without the mask.
      length: tokens of an example.
      splits: the sources by name.
      about: what the examples are and how the splits were cut, for `describe`.
      entropies_nats: entropy of an example given its clues, of the splits where it is known.
    """
    self.vocab_size = vocab_size
    self.length = length
    self._splits = dict(splits)
    self._about = about
    self._entropies_nats = dict(entropies_nats or {})

  def split(self, name: str) -> Source:
    """The examples of a split. Raises ValueError where there is no such split."""
    if name not in self._splits:
      raise ValueError(f"split {name!r} does not exist: use one of {', '.join(self._splits)}")
    return self._splits[name]

  def entropy_nats(self, split: str) -> float | None:
    """Exact entropy of an example of the split given its clues, None where it is not known."""
    self.split(split)
    return self._entropies_nats.get(split)

  @functools.cached_property
  def references_bits(self) -> dict[str, float]:
    """What to compare a bound in bits per token of the training split with, by name.

    The exact entropy where it is known, else nothing; subclasses add simple models of the data.
    """
    nats = self._entropies_nats.get(self.train_split)
    if nats is None:
      return {}
    source = self.split(self.train_split)
    given = getattr(source, "others", {}).get("given")
    free = self.length if given is None else self.length - float(given.sum(-1).mean())
    return {"exact entropy": nats / free / math.log(2)}

  def augment(self, item: Item, rng: np.random.Generator) -> Item:
    """A random variant of a training example; the example itself unless a subclass varies it."""
    del rng
    return item

  def decode(self, x_L: np.ndarray) -> str:
    """The tokens as a person reads them, masks included."""
    raise NotImplementedError

  def encode(self, text: str) -> np.ndarray:
    """The tokens int32 of a text, the inverse of `decode`. Raises ValueError on other marks."""
    raise NotImplementedError

  def cells(self, x_N: np.ndarray) -> list[str]:
    """The mark of every token by itself, for pictures; any number of tokens."""
    return [self.decode(x_N[i : i + 1]) for i in range(len(x_N))]

  def describe(self) -> str:
    """One line for the log: the sizes of the splits and how they were cut."""
    sizes = ", ".join(f"{name} {len(source):,}" for name, source in self._splits.items())
    return f"{self._about}: {sizes} examples of {self.length} tokens, vocabulary {self.vocab_size}"


class Alphabet:
  """Single characters as tokens: token i is `characters[i]`, the mask is `mask`."""

  def __init__(self, characters: str, mask: str):
    self.characters = characters
    self.mask = mask
    self._ids = {mark: i for i, mark in enumerate(characters + mask)}

  def decode(self, x_L: np.ndarray) -> str:
    """The characters of the tokens."""
    marks = self.characters + self.mask
    return "".join(marks[token] for token in np.asarray(x_L).tolist())

  def encode(self, text: str) -> np.ndarray:
    """The tokens of the characters. Raises ValueError on a character that has none."""
    unknown = sorted(set(text) - set(self._ids))
    if unknown:
      raise ValueError(
        f"{unknown[0]!r} is not a token: the text may hold {self.characters!r},"
        f" and {self.mask!r} for a mask"
      )
    return np.array([self._ids[mark] for mark in text], np.int32)


def require(condition: bool, message: str, **values: Any) -> None:
  """Raises ValueError with the offending values and `message`, which says the rule and the fix."""
  if not condition:
    shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
    raise ValueError(f"{shown}: {message}")
