"""Tokens of prepared text, such as OpenWebText in the tokens of GPT-2."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from md4vmd.data import shards, tokenizers
from md4vmd.data.base import Dataset, Source, require

MASK = "[MASK]"


class Tokens(Dataset):
  """The splits train and valid that `md4vmd.data.prepare_text` wrote.

  Every example of train is L tokens; the last one of valid may be shorter and is padded with
  tokens that are not scored.

  Attributes:
    tokenizer: from text to tokens and back.
  """

  columns = 16  # words are wider than characters

  def __init__(
    self,
    *,
    path: str,
    length: int = 1024,
    tokenizer: str | None = None,
    verify: bool = True,
    prepare: str = "--source FILES --tokenizer gpt2:FOLDER",
  ):
    """Reads the manifest and the tokenizer; shards are opened when they are used.

    Args:
      path: the folder that was prepared.
      length: L; that of the preparation.
      tokenizer: name of the tokenizer that it must be, see `tokenizers.make`; None for any.
      verify: whether the SHA-256 of each shard is compared before its first use.
      prepare: options of `prepare_text` that make it, named where nothing is prepared.

    Raises:
      FileNotFoundError: nothing is prepared there.
      ValueError: a file is damaged, or tokenizer or length are not those of the preparation.
    """
    folder = Path(path)
    if not (folder / shards.MANIFEST).is_file():
      state = "is not finished" if (folder / "work").is_dir() else "does not exist"
      raise FileNotFoundError(
        f"prepared text {path} {state}: python -m md4vmd.data.prepare_text {prepare} "
        f"--length {length} --out {path}"
      )
    manifest = shards.read_manifest(folder)
    self.tokenizer = tokenizers.load(folder / shards.TOKENIZER)
    self._check(folder, manifest, length, tokenizer)
    splits: dict[str, Source] = {
      name: shards.Shards(
        folder,
        split["shards"],
        length=length,
        vocab_size=self.tokenizer.vocab_size,
        is_padded=name == "valid",
        verify=verify,
      )
      for name, split in manifest["splits"].items()
      if split["examples"]
    }
    super().__init__(
      vocab_size=self.tokenizer.vocab_size,
      length=length,
      splits=splits,
      about=f"{self.tokenizer.record['kind']} tokens of {shards.summary(manifest)}",
    )

  def _check(self, folder, manifest, length, tokenizer):
    file = folder / shards.MANIFEST
    require(
      manifest["length"] == length,
      f"{file}: the text was cut into examples of {manifest['length']} tokens; set "
      f"data.length={manifest['length']}, or prepare it again",
      length=length,
    )
    found = {"tokenizer_sha256": self.tokenizer.hash, "vocab_size": self.tokenizer.vocab_size}
    for key, value in found.items():
      require(
        manifest[key] == value,
        f"{folder / shards.TOKENIZER} is not the tokenizer of the manifest, whose {key} is "
        f"{manifest[key]}; copy it again or prepare the text again",
        **{key: value},
      )
    if tokenizer is not None:
      require(
        tokenizers.make(tokenizer).hash == self.tokenizer.hash,
        f"{file}: the text was prepared with another tokenizer; prepare it again, or unset "
        "data.tokenizer",
        tokenizer=tokenizer,
      )

  def decode(self, x_L: np.ndarray) -> str:
    """The text, with [MASK] at masks and <|endoftext|> where a document ends."""
    x_L = np.asarray(x_L)
    pieces = np.split(x_L, np.flatnonzero(x_L == self.vocab_size))
    parts = [piece[1:] if i else piece for i, piece in enumerate(pieces)]
    return MASK.join(self.tokenizer.decode(part) for part in parts)

  def encode(self, text: str) -> np.ndarray:
    """The tokens of a text; [MASK] and <|endoftext|> stand for what `decode` shows so."""
    marks = {MASK: self.vocab_size, tokenizers.EOS: self.tokenizer.eos}
    pieces = re.split("({})".format("|".join(map(re.escape, marks))), text)
    ids = [[marks[piece]] if piece in marks else self.tokenizer.encode(piece) for piece in pieces]
    return np.concatenate(ids).astype(np.int32)
