import gzip
import json
import sys
import types

import pytest

from md4vmd.data import documents


@pytest.fixture
def write(tmp_path):
  def write_file(name, content):
    raw = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path

  return write_file


def read(path, **settings):
  return list(documents.read(path, **settings))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "news.en-00001-of-00100", "wiki.tokens.gz"])
def test_plain_text_is_a_document_a_line_or_a_paragraph(write, name):
  path = write(name, "one\ntwo\r\n\n\nthree")
  assert read(path) == ["one\ntwo\r\n\n\nthree"]
  assert read(path, unit="line") == ["one", "two", "", "", "three"]
  assert read(path, unit="paragraph") == ["one\ntwo", "three"]


def test_the_last_paragraph_ends_like_the_others(write):
  path = write("a.txt", "one\ntwo\n\nthree\n")
  assert read(path, unit="paragraph") == ["one\ntwo", "three"]
  assert read(path) == ["one\ntwo\n\nthree\n"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_byte_order_mark_is_no_text(write, name):
  path = write(name, b"\xef\xbb\xbf" + (b'{"text": "a"}\n' if "jsonl" in name else b"a"))
  assert read(path) == ["a"]
  assert read(path, unit="line") == ["a"]


def test_a_text_may_be_a_list_or_have_one_of_several_names(write):
  path = write("a.jsonl", '{"body": ["a", "b"]}\n{"text": "c", "body": []}\n{"body": []}\n')
  assert read(path, field=("text", "body")) == ["a\nb", "c", ""]
  with pytest.raises(ValueError, match="line 1: no text in the field 'text'; it has: body"):
    read(write("b.jsonl", '{"body": ["a", 3]}\n'), field=("text", "body"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_objects_hold_their_text_in_a_field(write, name):
  path = write(name, '{"text": "a\\nb", "n": 1}\n\n{"text": ""}\n')
  assert read(path) == ["a\nb", ""]
  with pytest.raises(ValueError, match=r"line 1: no text in the field 'body'; it has: text, n"):
    read(path, field="body")


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_is_a_character(write):
  path = write("a.jsonl", '{"text": "x\\ud83d"}\n{"text": "\\ud83d\\ude42"}\n')
  assert read(path) == ["x�", "🙂"]


def test_tables_are_read_row_by_row(tmp_path, monkeypatch):
  pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is in the extra [prepare]")
  parquet = pytest.importorskip("pyarrow.parquet")
  monkeypatch.setattr(documents, "_ROWS", 2)
  table = pyarrow.table({"text": ["a", "b", "c"], "n": [1, 2, 3]})
  parquet.write_table(table, tmp_path / "a.parquet")
  assert read(tmp_path / "a.parquet") == ["a", "b", "c"]
  with pytest.raises(ValueError, match="no column 'body'; it has: text, n"):
    read(tmp_path / "a.parquet", field="body")
  (tmp_path / "b.parquet").write_bytes(b"PAR1 is no table")
  with pytest.raises(ValueError, match=r"b\.parquet"):
    read(tmp_path / "b.parquet")
  (tmp_path / "c.parquet.gz").write_bytes(gzip.compress(b"a"))
  with pytest.raises(ValueError, match="parquet files are compressed inside"):
    read(tmp_path / "c.parquet.gz")


def test_zst_files_are_read(tmp_path):
  zstandard = pytest.importorskip("zstandard", reason="zstandard is in the extra [prepare]")
  raw = zstandard.ZstdCompressor().compress(b"one\ntwo\n" * 1000)
  (tmp_path / "a.txt.zst").write_bytes(raw)
  assert read(tmp_path / "a.txt.zst", unit="line") == ["one", "two"] * 1000
  (tmp_path / "a.txt.zst").write_bytes(raw + raw)  # files of several frames are joined by cat
  assert read(tmp_path / "a.txt.zst", unit="line") == ["one", "two"] * 2000
  for broken in (b"no zst", raw[:-5], raw + raw[:9]):
    (tmp_path / "b.txt.zst").write_bytes(broken)
    with pytest.raises(ValueError, match=r"b\.txt\.zst: the zst file is cut short or damaged"):
      read(tmp_path / "b.txt.zst")


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("a.txt", b"ok\n\xff\n", "a.txt: not utf-8 before line 2"),
    ("a.jsonl", '{"text": "a"}\n{"text"\n', "a.jsonl, line 2: not a JSON value"),
    ("a.jsonl", '["a"]\n', "a.jsonl, line 1: no text in the field 'text'"),
    ("a.jsonl", '{"text": 3}\n', "a.jsonl, line 1: no text in the field"),
  ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(write, name, content, words):
  with pytest.raises(ValueError) as caught:
    read(write(name, content), unit="line")
  assert words in str(caught.value)


def test_a_gzip_file_that_is_cut_short_is_named(write, tmp_path):
  path = write("a.txt.gz", "word " * 5000)
  path.write_bytes(path.read_bytes()[:-12])
  with pytest.raises(ValueError, match=r"a\.txt\.gz: the gzip file is cut short"):
    read(path)


def test_documents_and_lines_are_bounded(write, monkeypatch):
  monkeypatch.setattr(documents, "_LARGEST", 8)
  with pytest.raises(ValueError, match=r"a document is larger than 8 bytes; .*unit"):
    read(write("a.txt", "12345\n6789\n"))
  with pytest.raises(ValueError, match="a line is longer than 8 bytes; break it"):
    read(write("a.txt", "123456789"), unit="line")
  monkeypatch.setattr(documents, "_LARGEST", 30)
  with pytest.raises(ValueError, match="line 1: 31 characters are too many for a document"):
    documents._text({"text": "x" * 31}, ("text",), "a.parquet, line 1")


def test_files_of_patterns_come_in_the_order_of_their_paths_and_once(write, tmp_path):
  for name in ("b.txt", "a.txt", "c.md"):
    write(name, "x")
  patterns = f"{tmp_path}/*.txt,{tmp_path}/b*,{tmp_path}/c.md"
  assert [path.name for path in documents.files(patterns)] == ["a.txt", "b.txt", "c.md"]
  with pytest.raises(FileNotFoundError, match=r"no file matches .*none\*'; .*hub:OWNER/NAME"):
    documents.files(f"{tmp_path}/none*")


def test_the_hub_is_read_row_by_row_if_its_library_is_there(monkeypatch):
  asked = []

  def load_dataset(*names, **settings):
    asked.append((names, settings))
    return iter([{"text": "a"}, {"text": "b"}])

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  rows = documents.hub("owner/name", config="small", split="train", field="text")
  assert list(rows) == ["a", "b"]
  assert asked == [(("owner/name", "small"), {"split": "train", "streaming": True})]
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(
    ValueError, match=r"datasets is needed to read from the hub .*'\.\[prepare\]'"
  ):
    list(documents.hub("owner/name", config=None, split="train", field="text"))


def test_progress_is_the_position_in_the_file(write):
  path, seen = write("a.jsonl", '{"text": "a"}\n' * 3), []
  assert len(read(path, progress=seen.append)) == 3
  assert seen == sorted(seen) and seen[-1] == path.stat().st_size
  assert json.loads(path.read_text().splitlines()[0]) == {"text": "a"}
