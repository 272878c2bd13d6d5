import hashlib
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from md4vmd.data import pieces, prepare_text, shards
from md4vmd.data.prepare_text import Options
from md4vmd.data.tokens import Tokens
from md4vmd.data.workers import Workers

ROOT = pathlib.Path(__file__).parent.parent.parent
E = 256  # ends a document of bytes


@pytest.fixture
def corpus(tmp_path):
  """A function (texts, name) -> the path of a file of JSON lines."""

  def write(texts, name="corpus.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)

  return write


@pytest.fixture
def small_parts(monkeypatch):
  monkeypatch.setattr(pieces, "SIZE", 400)
  monkeypatch.setattr(prepare_text, "_SHARD", 50)


def words(count, seed=0):
  rng = np.random.default_rng(seed)
  return ["".join(rng.choice(list("abcdef "), rng.integers(1, 30))) + "." for _ in range(count)]


def tokens_of(out, split, length):
  source = Tokens(path=str(out), length=length).split(split)
  items = [source[i] for i in range(len(source))]
  return np.concatenate([x["x"][x.get("scored", np.ones(length, bool))] for x in items]).tolist()


def files_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def joined(texts):
  return [token for text in texts for token in (*text.encode(), E)]


def test_documents_are_joined_by_their_end_and_cut_across_their_borders(corpus, tmp_path):
  held = corpus(["xy"], "valid.jsonl")
  source = corpus(["ab", "", "cde", "  \n", "f"])
  options = Options(source, tmp_path / "out", "bytes", 4, split="files", valid=held)
  manifest = prepare_text.prepare(options)
  dataset = Tokens(path=str(tmp_path / "out"), length=4)
  a, b, c, d, e, x, y = (ord(mark) for mark in "abcdexy")
  train, valid = dataset.split("train"), dataset.split("valid")
  assert [train[i]["x"].tolist() for i in range(len(train))] == [[a, b, E, c], [d, e, E, ord("f")]]
  assert [valid[i]["x"].tolist() for i in range(len(valid))] == [[x, y, E, 0]]
  assert valid[0]["scored"].tolist() == [True, True, True, False]
  assert manifest["splits"]["train"]["documents"] == 3
  assert manifest["splits"]["train"]["tokens"] == 9
  assert manifest["splits"]["train"]["tokens_dropped"] == 1
  assert manifest["splits"]["valid"]["tokens_dropped"] == 0
  assert manifest["empty_documents"] == 2
  assert not (tmp_path / "out/work").exists()


@pytest.mark.usefixtures("small_parts")
def test_the_md4_split_is_a_function_of_the_text_of_each_document(corpus, tmp_path):
  texts = words(400)
  is_held = lambda text: int(hashlib.sha256(text.encode()).hexdigest(), 16) % 50 == 0
  valid = [text for text in texts if is_held(text)]
  assert 2 <= len(valid) <= 20
  prepare_text.prepare(Options(corpus(texts), tmp_path / "out", "bytes", 8))
  assert tokens_of(tmp_path / "out", "valid", 8) == joined(valid)
  train = joined(text for text in texts if not is_held(text))
  assert tokens_of(tmp_path / "out", "train", 8) == train[: len(train) // 8 * 8]


@pytest.mark.usefixtures("small_parts")
def test_the_mdlm_split_is_the_last_documents(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, "LAST", 7)
  texts = words(20)
  prepare_text.prepare(Options(corpus(texts), tmp_path / "out", "bytes", 8, split="mdlm"))
  assert tokens_of(tmp_path / "out", "valid", 8) == joined(texts[-7:])
  monkeypatch.setattr(pieces, "LAST", 20)
  with pytest.raises(ValueError, match="documents=20: 'mdlm' holds out 20 documents; use 'md4'"):
    prepare_text.prepare(Options(corpus(texts), tmp_path / "b", "bytes", 8, split="mdlm"))


def test_neither_workers_nor_the_size_of_pieces_change_a_byte(corpus, tmp_path, monkeypatch):
  source = corpus(words(300))
  monkeypatch.setattr(pieces, "SIZE", 500)
  for workers in (1, 2):
    prepare_text.prepare(Options(source, tmp_path / f"{workers}", "bytes", 8, workers=workers))
  monkeypatch.setattr(pieces, "SIZE", 77)
  prepare_text.prepare(Options(source, tmp_path / "77", "bytes", 8))
  files = files_of(tmp_path / "1")
  assert len(files) == 4
  assert files == files_of(tmp_path / "2") == files_of(tmp_path / "77")


# Forks children that prepare the same folder one after another. Each is killed when a random number
# of pieces and shards is there; what was made before is there already.
_KILLED = """
import os, pathlib, random, signal, sys, time
from md4vmd.data import pieces, prepare_text
pieces.SIZE, prepare_text._SHARD = 300, 80
source, whole, out = sys.argv[1], *map(pathlib.Path, sys.argv[2:4])
workers, kills = map(int, sys.argv[4:])
run = lambda out, workers: prepare_text.prepare(
  prepare_text.Options(source, out, "bytes", 8, workers=workers)
)
made = lambda: len([*out.glob("work/piece-*.npz"), *out.glob("*.arrayrecord")])
run(whole, 1)
for target in sorted(random.Random(0).sample(range(60), kills)):
  child = os.fork()
  if not child:
    run(out, workers)
    os._exit(0)
  while made() < target and not (out / "manifest.json").exists():
    time.sleep(0.001)
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  print("killed" if os.WIFSIGNALED(status) else "was over", made(), flush=True)
run(out, workers)
"""


@pytest.mark.parametrize(("workers", "kills"), [(1, 5), (2, 1)])
def test_a_run_killed_at_random_places_ends_in_the_same_bytes(corpus, tmp_path, workers, kills):
  source, folders = corpus(words(900)), [str(tmp_path / name) for name in ("whole", "out")]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", _KILLED, source, *folders, str(workers), str(kills)],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.count("killed") >= (kills + 1) // 2, done.stdout  # a slow machine may miss one
  whole, out = (files_of(pathlib.Path(folder)) for folder in folders)
  assert len(whole) > 20
  assert out == whole


@pytest.mark.usefixtures("small_parts")
def test_what_is_finished_is_not_made_again(corpus, tmp_path, monkeypatch):
  options = Options(corpus(words(30)), tmp_path / "out", "bytes", 8)
  manifest = prepare_text.prepare(options)
  monkeypatch.setattr(prepare_text, "_tokenize", None)
  assert prepare_text.prepare(options) == json.loads(json.dumps(manifest))


def test_a_folder_keeps_to_what_it_was_begun_with(corpus, tmp_path):
  source, out = corpus(words(30)), tmp_path / "out"
  prepare_text.prepare(Options(source, out, "bytes", 8))
  with pytest.raises(ValueError, match=r"out holds a preparation of another length \(8, now 16\)"):
    prepare_text.prepare(Options(source, out, "bytes", 16))
  with pytest.raises(ValueError, match="another tokenizer_sha256"):
    prepare_text.prepare(Options(source, out, "characters", 8))
  corpus(words(31))
  with pytest.raises(ValueError, match="another files"):
    prepare_text.prepare(Options(source, out, "bytes", 8))


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_file_that_was_edited_is_refused_though_its_size_is_the_same(
  corpus, tmp_path, monkeypatch, is_finished
):
  options = Options(corpus(words(30)), tmp_path / "out", "bytes", 8)
  with monkeypatch.context() as patched:
    if not is_finished:
      patched.setattr(prepare_text, "_cut", lambda *_: 1 / 0)
      with pytest.raises(ZeroDivisionError):
        prepare_text.prepare(options)
    else:
      prepare_text.prepare(options)
  path = pathlib.Path(options.source)
  path.write_text(path.read_text().replace('."', '!"'))
  with pytest.raises(ValueError, match=r"out holds a preparation of another files \(\[\['corpus"):
    prepare_text.prepare(options)


def test_a_finished_folder_that_lost_a_shard_is_not_called_done(corpus, tmp_path):
  options = Options(corpus(words(30)), tmp_path / "out", "bytes", 8)
  prepare_text.prepare(options)
  (tmp_path / "out/train-00000-of-00001.arrayrecord").unlink()
  with pytest.raises(ValueError, match=r"train-00000-of-00001\.arrayrecord is missing"):
    prepare_text.prepare(options)


def test_a_character_without_a_token_is_named_with_its_file(corpus, tmp_path):
  corpus(["abc"], "1.jsonl")
  corpus(["def", "Hello"], "2.jsonl")
  source = f"{tmp_path}/*.jsonl"
  options = Options(source, tmp_path / "out", "characters", 2)
  with pytest.raises(ValueError, match=r"2\.jsonl: 'H' has no token: the text may hold ' abc"):
    prepare_text.prepare(options)


class Full:
  """A writer on a full disk."""

  def __init__(self, *_):
    pass

  def write(self, _):
    raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")


def test_a_full_disk_is_told_in_one_line(corpus, tmp_path, monkeypatch):
  arguments = f"--source {corpus(words(30))} --out {tmp_path}/out --tokenizer bytes --length 8"
  monkeypatch.setattr(shards.array_record_module, "ArrayRecordWriter", Full)
  with pytest.raises(SystemExit, match=r"^error: .* cannot be written \(RES.*the disk full\?$"):
    prepare_text.main(arguments.split())


def test_a_worker_that_comes_to_an_end_is_an_error_of_the_system():
  with Workers(2) as workers, pytest.raises(OSError, match="a worker came to an end before its"):
    list(workers.run(os._exit, [1]))


def test_without_a_terminal_progress_is_lines(corpus, tmp_path, monkeypatch, capfd):
  prepare_text.prepare(Options(corpus(words(30)), tmp_path / "short", "bytes", 8))
  assert "%" not in capfd.readouterr().err
  monkeypatch.setattr(prepare_text, "_LINE_EVERY", 1e-9)
  monkeypatch.setattr(pieces, "SIZE", 77)
  prepare_text.prepare(Options(corpus(words(30)), tmp_path / "out", "bytes", 8))
  shown = capfd.readouterr().err
  assert shown.count("\n") > 3 and "\r" not in shown and "tokens/s" in shown and "100%" in shown


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"length": 1}, "length=1: must be at least 2"),
    ({"workers": 0}, "workers=0: must be positive"),
    ({"split": "random"}, "split='random': use one of md4, mdlm, files"),
    ({"unit": "word"}, "unit='word': use one of line, paragraph, file"),
    ({"detokenizer": "x"}, "detokenizer='x': use one of none, wikitext"),
    ({"split": "files"}, "the split 'files' and --valid belong together"),
    ({"valid": "x"}, "the split 'files' and --valid belong together"),
  ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, settings, words):
  with pytest.raises(ValueError) as caught:
    Options(**({"source": "x", "out": tmp_path, "tokenizer": "bytes"} | settings))
  assert words in str(caught.value)


def test_a_file_that_is_trained_on_cannot_be_held_out(corpus, tmp_path):
  held = corpus(["xy"], "train_valid.jsonl")
  corpus(["ab" * 20], "train_0.jsonl")
  source = str(tmp_path / "train_*.jsonl")
  options = Options(source, tmp_path / "out", "bytes", 4, split="files", valid=held)
  with pytest.raises(ValueError, match=r"train_valid\.jsonl.*both name it"):
    prepare_text.prepare(options)


def test_text_too_short_for_one_example_is_refused(corpus, tmp_path):
  with pytest.raises(ValueError, match="all documents together have 3 tokens; choose a shorter"):
    prepare_text.prepare(Options(corpus(["ab"]), tmp_path / "out", "bytes", 8))
  with pytest.raises(ValueError, match="the source holds no documents"):
    prepare_text.prepare(Options(corpus([" "], "b.jsonl"), tmp_path / "b", "bytes", 8))


def test_the_command_reads_all_options_and_answers_in_one_line(corpus, tmp_path, capsys):
  source, out = corpus(["a , b", "c"] * 20, "lines.jsonl"), tmp_path / "out"
  arguments = f"--source {source} --out {out} --tokenizer bytes --length 8 --detokenizer wikitext"
  prepare_text.main(arguments.split())
  assert "split 'md4-v1': train" in capsys.readouterr().out
  assert "a, b<|endoftext|>" in Tokens(path=str(out), length=8).decode(
    np.array(tokens_of(out, "train", 8))
  )
  with pytest.raises(SystemExit, match=r"^error: no file matches '.*nowhere'"):
    prepare_text.main(f"--source {tmp_path}/nowhere --out {out} --tokenizer bytes".split())


def test_wide_vocabularies_are_stored_in_four_bytes():
  assert shards.token_dtype(2**16) == np.dtype("<u2")
  assert shards.token_dtype(2**16 + 1) == np.dtype("<u4")


def test_tokens_above_two_bytes_come_back(corpus, tmp_path):
  marks = "".join(chr(0x10000 + i) for i in range(70_000))
  (tmp_path / "marks.txt").write_text(marks, encoding="utf-8")
  texts, out = [marks[0] + marks[65_535] * 2 + marks[65_536], marks[69_999]], tmp_path / "out"
  prepare_text.prepare(Options(corpus(texts), out, f"characters:{tmp_path}/marks.txt", 7))
  expected = [0, 65_535, 65_535, 65_536, 70_000, 69_999, 70_000]
  assert tokens_of(out, "train", 7) == expected
  dataset = Tokens(path=str(out), length=7)
  assert dataset.decode(dataset.split("train")[0]["x"]) == "<|endoftext|>".join([*texts, ""])
  (shard,) = out.glob("train-*")
  assert np.array(expected, "<u4").tobytes() in shard.read_bytes()


def test_a_dataset_of_the_hub_is_prepared_like_files(corpus, tmp_path, monkeypatch):
  texts = words(40)
  rows = lambda *names, **settings: iter([{"text": text} for text in texts])
  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=rows))
  prepare_text.prepare(Options("hub:owner/name", tmp_path / "hub", "bytes", 8))
  prepare_text.prepare(Options(corpus(texts), tmp_path / "files", "bytes", 8))
  named = lambda out: {k: v for k, v in files_of(tmp_path / out).items() if k != "manifest.json"}
  assert named("hub") == named("files")
