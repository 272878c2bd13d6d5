import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from md4vmd import writers


def read_events(workdir) -> list:
  """Events of all files in order: records of length, crc, bytes, crc."""
  events = []
  for path in sorted(workdir.glob("events.out.tfevents.*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      length = int.from_bytes(data[at : at + 8], "little")
      events.append(Event.FromString(data[at + 12 : at + 12 + length]))
      at += 16 + length
  return events


def scalars(workdir) -> list:
  return [
    (event.step, value.tag, value.simple_value)
    for event in read_events(workdir)
    for value in event.summary.value
    if not value.metadata.plugin_data.plugin_name
  ]


def test_metrics_reach_the_file_and_tensorboard(tmp_path):
  writer = writers.Writers(tmp_path)
  writer.write(10, {"train/loss": jnp.float32(2.5), "train/tokens": np.int64(7)})
  assert writers.read_metrics(tmp_path) == [{"step": 10, "train/loss": 2.5, "train/tokens": 7}]
  writer.close()
  assert scalars(tmp_path) == [(10, "train/loss", 2.5), (10, "train/tokens", 7.0)]


def test_values_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
  writer = writers.Writers(tmp_path)
  writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
  writer.close()
  refuse = lambda constant: pytest.fail(f"{constant} is no JSON")
  json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
  [line] = writers.read_metrics(tmp_path)
  assert math.isnan(line["a"]) and (line["b"], line["c"]) == (math.inf, -math.inf)
  assert scalars(tmp_path) == [(1, "d", 1.0)]


def test_a_metric_is_one_number(tmp_path):
  for value in ("high", [1.0, 2.0], np.zeros(2), None):
    with pytest.raises(ValueError, match=r"metric train/x is .* one number"):
      writers.Writers(tmp_path, active=False).write(1, {"train/x": value})


def test_truncation_drops_later_lines_and_the_torn_one(tmp_path):
  first = writers.Writers(tmp_path)
  for step in (1, 2, 3):
    first.write(step, {"x": step})
  first.close()
  with (tmp_path / "metrics.jsonl").open("a") as stream:
    stream.write('{"step": 4, "x"')
  resumed = writers.Writers(tmp_path)
  resumed.truncate_after(2)
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
  resumed.write(3, {"x": 30})
  resumed.close()
  assert [line["x"] for line in writers.read_metrics(tmp_path)] == [1, 2, 30]
  starts = [event.step for event in read_events(tmp_path) if event.session_log.status]
  assert starts == [3]  # from here on TensorBoard hides the killed run
  assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_reopened_writer_hides_nothing_that_it_wrote(tmp_path):
  writer = writers.Writers(tmp_path)
  writer.truncate_after(5)
  writer.write(6, {"x": 1})
  writer.close()
  writer.write(7, {"x": 2})
  writer.close()
  assert [e.step for e in read_events(tmp_path) if e.session_log.status] == [6]
  assert [line["step"] for line in writers.read_metrics(tmp_path)] == [6, 7]


@pytest.mark.parametrize("torn", ['{"step": 2', "\0\0\0", '{"step": 2, "x": 3}'])
def test_a_torn_last_line_is_tolerated_and_then_replaced(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "x": 1}\n' + torn)
  assert [line["step"] for line in writers.read_metrics(tmp_path)] == [1]
  writer = writers.Writers(tmp_path)
  writer.write(5, {"x": 2})
  writer.close()
  assert path.read_text() == '{"step": 1, "x": 1}\n{"step": 5, "x": 2}\n'


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"x": 1}'])
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
  (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl:2 is no JSON object with a step"):
    writers.read_metrics(tmp_path)


def test_no_metrics_yet(tmp_path):
  assert writers.read_metrics(tmp_path / "none") == []


def test_config_is_written_and_shown_in_the_same_event_file(tmp_path):
  config = {"schedule": {"name": "cosine"}, "steps": 10, "ema": 0.5, "label": None, "mesh": (2, 1)}
  writer = writers.Writers(tmp_path)
  writer.write_config(config)
  writer.write(1, {"x": 1.0})
  writer.close()
  assert json.loads((tmp_path / "config.json").read_text()) == {**config, "mesh": [2, 1]}
  assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
  plugins = [v.metadata.plugin_data for e in read_events(tmp_path) for v in e.summary.value]
  hparams = b"".join(plugin.content for plugin in plugins if plugin.plugin_name == "hparams")
  assert b"schedule.name" in hparams and b"cosine" in hparams
  assert scalars(tmp_path) == [(1, "x", 1.0)]


def test_evaluation_is_flat_valid_json(tmp_path):
  writer = writers.Writers(tmp_path)
  values = {"valid/bits": np.float32(1.5), "valid/worst": math.inf, "samples": ["a", "b"]}
  path = writer.write_evaluation(300, "zero_shot", values)
  assert path == tmp_path / "eval" / "300-zero_shot.json"
  expected = {"step": 300, "valid/bits": 1.5, "valid/worst": "inf", "samples": ["a", "b"]}
  assert json.loads(path.read_text()) == expected
  assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["300-zero_shot.json"]
  with pytest.raises(ValueError, match="a is a mapping; use flat names"):
    writer.write_evaluation(300, "zero_shot", {"a": {"b": 1}})


@pytest.mark.parametrize("name", ["", "../x", "a/b", "/etc/x", "A", "a b", "a.json", "a\n", ".."])
def test_evaluation_names_cannot_leave_the_workdir(tmp_path, name):
  with pytest.raises(ValueError, match="must consist of a-z"):
    writers.Writers(tmp_path).write_evaluation(1, name, {})
  assert list(tmp_path.iterdir()) == []


def test_inactive_writers_touch_nothing(tmp_path):
  writer = writers.Writers(tmp_path / "run", active=False)
  writer.write(1, {"x": 1})
  writer.truncate_after(0)
  writer.write_config({"a": 1})
  writer.write_evaluation(1, "likelihood", {"x": 1})
  writer.close()
  assert not (tmp_path / "run").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
  writer = writers.Writers(tmp_path)
  writer.write_config({"a": 1})
  with pytest.raises(TypeError):
    writer.write_config({"a": object()})
  writer.close()
  assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
