"""From documents to shards of tokens: `python -m md4vmd.data.prepare_text --help`.

Documents are tokenized, each followed by the end-of-document token, joined, and cut into examples
of L tokens across their borders. Two passes, so that neither the number of workers nor a stop in
between changes a byte of the result:

  1. Consecutive documents form pieces, as the input alone decides; a worker writes the tokens of
     a piece to a file of its own.
  2. The sizes of all pieces say where every shard begins and ends; a worker writes a shard.

A file gets its name when it is complete, so a run that is killed continues with what is missing
when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from md4vmd.data import corpora, documents, pieces, shards, tokenizers
from md4vmd.data.base import require
from md4vmd.data.workers import Workers

_SHARD = 32_768  # examples of a shard
_END = 2**16  # bytes at either end of a file that its fingerprint is made of
_LINE_EVERY = 30.0  # seconds


@dataclasses.dataclass(frozen=True)
class Options:
  """What a preparation is made from; all of it but `workers` decides the bytes.

  Attributes:
    source: glob patterns separated by commas, or hub:OWNER/NAME.
    out: folder of the result.
    tokenizer: name of a tokenizer, see `tokenizers.make`.
    length: L, tokens of an example.
    split: validation documents, one of `pieces.CONVENTIONS`.
    valid: glob patterns of the validation files, for the split "files".
    unit: what a document of plain text is.
    field: name of the text in JSON objects and tables.
    detokenizer: rules that undo the spacing of a corpus, one of `corpora.DETOKENIZERS`.
    hub_config: name of the configuration of a dataset of the hub.
    hub_split: its split that is read.
    workers: processes that work at the same time; 1 works in this one.
  """

  source: str
  out: Path
  tokenizer: str
  length: int = 1024
  split: str = "md4"
  valid: str | None = None
  unit: str = "file"
  field: str = "text"
  detokenizer: str = "none"
  hub_config: str | None = None
  hub_split: str = "train"
  workers: int = 1

  def __post_init__(self):
    require(self.length > 1, "must be at least 2", length=self.length)
    require(self.workers > 0, "must be positive", workers=self.workers)
    for key, known in {
      "split": pieces.CONVENTIONS,
      "unit": documents.UNITS,
      "detokenizer": corpora.DETOKENIZERS,
    }.items():
      value = getattr(self, key)
      require(value in known, f"use one of {', '.join(known)}", **{key: value})
    require(
      (self.split == "files") == (self.valid is not None),
      "the split 'files' and --valid belong together",
      split=self.split,
      valid=self.valid,
    )


class Cut(NamedTuple):
  """A shard to write: its file, and the tokens [start, stop) of the stream of its split."""

  file: Path
  split: str
  start: int
  stop: int


def prepare(options: Options) -> dict[str, Any]:
  """Makes the prepared text, or finishes it, and returns its manifest.

  Raises:
    FileNotFoundError: the source or the tokenizer does not exist.
    ValueError: a file is damaged, or the folder holds another preparation or lacks a shard.
    OSError: a file cannot be written, or a worker came to an end.
  """
  tokenizer = tokenizers.make(options.tokenizer)
  plan = _plan(options, tokenizer)
  out, work = options.out, options.out / "work"
  if (out / shards.MANIFEST).exists():
    manifest = shards.read_json(out / shards.MANIFEST)
    _require_same(manifest.get("plan"), plan, out)
    for split in shards.read_manifest(out)["splits"].values():
      shards.require_there(out, split["shards"])
    shutil.rmtree(work, ignore_errors=True)
    return manifest
  work.mkdir(parents=True, exist_ok=True)
  if (work / "plan.json").exists():
    _require_same(shards.read_json(work / "plan.json"), plan, out)
  else:
    tokenizer.save(work / shards.TOKENIZER)
    shards.write_json(work / "plan.json", plan)
  with Workers(options.workers) as workers:
    counts = _tokenize(options, work, workers)
    splits = _cut(options, plan, tokenizer, work, counts, workers)
  tokenizer.save(work / shards.TOKENIZER)
  shards.publish(work / shards.TOKENIZER, out / shards.TOKENIZER)
  manifest = {
    "version": shards.VERSION,
    "source": plan["source"],
    "convention": plan["convention"],
    "length": options.length,
    "vocab_size": tokenizer.vocab_size,
    "tokenizer_sha256": tokenizer.hash,
    "empty_documents": counts["empty"],
    "splits": splits,
    "plan": plan,
  }
  shards.write_json(work / shards.MANIFEST, manifest)
  shards.publish(work / shards.MANIFEST, out / shards.MANIFEST)
  shutil.rmtree(work)
  return manifest


def _plan(options: Options, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
  """What decides the bytes. Names of files without their folders, so that a copy is the same.

  A file is known by its name, its size and its first and last bytes.
  """
  listed: dict[str, Any] = {}
  if not options.source.startswith(documents.HUB):
    known = lambda patterns: [_fingerprint(file) for file in documents.files(patterns)]
    listed["files"] = known(options.source)
    listed["valid_files"] = known(options.valid) if options.valid else []
    source = f"{len(listed['files'])} files, {listed['files'][0][0]} and on"
  else:
    require(options.valid is None, "a dataset of the hub has no files", valid=options.valid)
    source = options.source
    listed |= {"hub_config": options.hub_config, "hub_split": options.hub_split}
  return listed | {
    "source": source,
    "convention": pieces.CONVENTIONS[options.split],
    "tokenizer_sha256": tokenizer.hash,
    "length": options.length,
    "unit": options.unit,
    "field": options.field,
    "detokenizer": options.detokenizer,
    "version": shards.VERSION,
  }


def _fingerprint(file: Path) -> list[Any]:
  size = file.stat().st_size
  with file.open("rb") as stream:
    digest = hashlib.sha256(stream.read(_END))
    stream.seek(max(0, size - _END))
    digest.update(stream.read(_END))
  return [file.name, size, digest.hexdigest()[:16]]


def _require_same(found: Any, plan: dict[str, Any], out: Path) -> None:
  if found != plan:
    found = found if isinstance(found, dict) else {}
    names = [key for key in {**plan, **found} if plan.get(key) != found.get(key)]
    key = names[0] if names else "plan"
    old, new = found.get(key), plan.get(key)
    if isinstance(old, list) and isinstance(new, list):
      old, new = [x for x in old if x not in new], [x for x in new if x not in old]
    raise ValueError(
      f"{out} holds a preparation of another {key} ({str(old)[:80]}, now {str(new)[:80]}); give "
      "another --out, or delete the folder"
    )


# The first pass: pieces.


def _tokenize(options: Options, work: Path, workers: Workers) -> dict[str, int]:
  """Writes the files of all pieces that are missing; counts pieces and empty documents."""
  done = work / "pieces.json"
  if done.exists():
    return shards.read_json(done)
  counts = {"pieces": 0, "empty": 0}
  is_there = lambda piece: pieces.file_of(work, piece.number).exists()
  tokens, start = 0, time.perf_counter()
  with _Progress(total=_input_bytes(options), unit="B", unit_scale=True) as progress:
    grouped = pieces.group(_documents(options, progress), counts)
    jobs = ((work, piece, options.detokenizer) for piece in grouped if not is_there(piece))
    for written in workers.run(pieces.write, jobs):
      tokens += written
      speed = tokens / (time.perf_counter() - start)
      progress.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
  if tokens:
    seconds = time.perf_counter() - start
    _say(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
  require(counts["pieces"] > 0, "the source holds no documents", source=options.source)
  shards.write_json(done, counts)
  return counts


def _documents(options: Options, progress: Any) -> Iterator[pieces.Document]:
  """The documents of the whole input in order."""
  if options.source.startswith(documents.HUB):
    name = options.source.removeprefix(documents.HUB)
    rows = documents.hub(
      name, config=options.hub_config, split=options.hub_split, field=options.field
    )
    yield from (pieces.Document(text, False, name) for text in rows)
    return
  if options.valid:
    resolved = lambda patterns: {path.resolve() for path in documents.files(patterns)}
    both = resolved(options.source) & resolved(options.valid)
    require(
      not both,
      "--source and --valid both name it; it would be trained on and held out",
      file=str(next(iter(both), "")),
    )
  read = 0
  for patterns, is_valid in ((options.source, False), (options.valid, True)):
    for path in documents.files(patterns) if patterns else []:
      place = lambda at, before=read: progress.update(max(0, before + at - progress.n))
      for text in documents.read(path, unit=options.unit, field=options.field, progress=place):
        yield pieces.Document(text, is_valid, str(path))
      read += path.stat().st_size


def _input_bytes(options: Options) -> int | None:
  if options.source.startswith(documents.HUB):
    return None
  patterns = filter(None, (options.source, options.valid))
  return sum(path.stat().st_size for each in patterns for path in documents.files(each))


# The second pass: shards.


def _cut(options, plan, tokenizer, work, counts, workers) -> dict[str, Any]:
  """Writes the shards that are missing; the part of the manifest that lists them."""
  stream = pieces.Stream(work, counts["pieces"], options.split)
  if options.split == "mdlm":
    total = sum(stream.documents.values())
    last = pieces.LAST
    require(total > last, f"'mdlm' holds out {last:,} documents; use 'md4'", documents=total)
  splits: dict[str, Any] = {}
  cuts: list[Cut] = []
  for split in pieces.SPLITS:
    size, length = stream.size(split), options.length
    dropped = size % length if split == "train" else 0
    examples = -(-(size - dropped) // length)
    splits[split] = {
      "documents": stream.documents[split],
      "tokens": size,
      "tokens_dropped": dropped,
      "examples": examples,
    }
    count = -(-examples // _SHARD)
    for i in range(count):
      file = options.out / f"{split}-{i:05d}-of-{count:05d}.arrayrecord"
      start = i * _SHARD * length
      cuts.append(Cut(file, split, start, min(start + _SHARD * length, size - dropped)))
  require(
    splits["train"]["examples"] > 0,
    f"all documents together have {stream.size('train')} tokens; choose a shorter length",
    length=options.length,
  )
  jobs = ((stream, cut, options.length, work) for cut in cuts if not _record(work, cut).exists())
  made = sum(_record(work, cut).exists() for cut in cuts)
  with _Progress(total=len(cuts), initial=made, unit="shard") as progress:
    for _ in workers.run(_write_shard, jobs):
      progress.update()
  for split in pieces.SPLITS:
    records = [_record(work, cut) for cut in cuts if cut.split == split]
    splits[split]["shards"] = [shards.read_json(record) for record in records]
  return splits


def _record(work: Path, cut: Cut) -> Path:
  """What the manifest will say of a shard; it is written after the shard."""
  return work / f"{cut.file.name}.json"


def _write_shard(job: tuple[pieces.Stream, Cut, int, Path]) -> None:
  stream, cut, length, work = job
  examples = stream.examples(cut.split, cut.start, cut.stop, length)
  shard = shards.write_shard(cut.file, examples, work)
  shards.write_json(_record(work, cut), shard._asdict())


class _Progress(tqdm):
  """A bar on a terminal, and a line every half minute where there is none."""

  def __init__(self, **settings: Any):
    self._is_bar = sys.stderr.isatty()
    if not self._is_bar:
      every = {"mininterval": _LINE_EVERY, "maxinterval": _LINE_EVERY, "delay": _LINE_EVERY}
      settings |= every | {"miniters": 1}
    super().__init__(**settings)

  def display(self, msg: str | None = None, pos: int | None = None) -> None:
    """Shows the state."""
    if self._is_bar:
      super().display(msg, pos)
    else:
      print(self, file=sys.stderr, flush=True)


def _say(text: str) -> None:
  tqdm.write(text)
  sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m md4vmd.data.prepare_text",
    description="Documents to shards of tokens; the same command again continues a stopped one.",
  )
  add = parser.add_argument
  defaults = {field.name: field.default for field in dataclasses.fields(Options)}
  add("--source", required=True, help="files: globs with commas between, or hub:OWNER/NAME")
  add("--out", required=True, type=Path, help="folder of the result")
  add("--tokenizer", required=True, help="bytes, characters[:FILE], gpt2:FOLDER or FILE.json")
  add("--length", type=int, help="tokens of an example (1024)")
  add(
    "--split",
    choices=list(pieces.CONVENTIONS),
    help="documents held out: 2 %%, the last 100k, or files",
  )
  add("--valid", help="files held out, for --split=files")
  add("--unit", choices=documents.UNITS, help="what a document of plain text is (file)")
  add("--field", help="where the text is in JSON objects and tables (text)")
  add("--detokenizer", choices=list(corpora.DETOKENIZERS), help="undo the spacing of a corpus")
  add("--hub_config", help="configuration of the hub's dataset")
  add("--hub_split", help="its split (train)")
  add("--workers", type=int, help="processes at the same time (1)")
  parser.set_defaults(**{k: v for k, v in defaults.items() if v is not dataclasses.MISSING})
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many cores
  try:
    options = Options(**vars(parser.parse_args(arguments)))
    manifest = prepare(options)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  _say(f"{options.out}: {shards.summary(manifest)}")


if __name__ == "__main__":
  main()
