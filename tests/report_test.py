"""The report: what it reads, what it says of it, and files that are not what a run wrote."""

import html.parser
import json
import math
import sys

import numpy as np
import pytest

from md4vmd import report, writers
from md4vmd.report import pages, plots, runs, tables

BITS = "train/nelbo_bits_per_token"


def write_run(folder, config, bits=(), evaluations=()):
  """A run as the trainer leaves it, with a line of metrics every 10 steps."""
  run = writers.Writers(folder)
  run.write_config(config)
  for i, value in enumerate(bits, start=1):
    run.write(10 * i, {BITS: value, "train/tokens_per_second": 1000.0 + i})
  for step, name, figures in evaluations:
    run.write_evaluation(step, name, figures)
  run.close()


def bound(bits, error=0.01):
  name = "valid/nelbo_bits_per_token"
  return {name: bits, f"{name}_standard_error": error, "parameters": 1234, "convention": "a bound"}


def config(schedule="linear", seed=0, **data):
  return {"seed": seed, "schedule": {"name": schedule}, "data": {"name": "text", **data}}


@pytest.fixture
def folder(tmp_path):
  """Three runs: one evaluated twice, one evaluated once with other evaluators, one not yet."""
  exact = {f"exact/T{t}_kl_nats": 1.0 / t for t in (1, 2, 4)} | {"convention": "exact"}
  evaluations = [(50, "likelihood", bound(2.5)), (100, "likelihood", bound(2.25, 0.0123))]
  write_run(tmp_path / "b-8", config(), np.linspace(3, 2, 24), evaluations)
  evaluations = [(100, "likelihood", bound(2.5)), (100, "exact", exact)]
  write_run(tmp_path / "b-64", config("cosine"), np.linspace(3, 2, 24), evaluations)
  write_run(tmp_path / "a/deep", config("poly"))
  return tmp_path


def reported(folder):
  report.report(folder)
  return json.loads((folder / "report.json").read_text())


def rows(table):
  return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def test_the_table_has_a_row_per_run_and_the_settings_that_differ_as_columns(folder):
  found, complaints = runs.find_runs(folder)
  assert complaints == []
  deep, first, second = rows(tables.main_table(found))
  assert list(first)[:2] == ["run", "schedule"] and "data" not in first
  assert [row["run"] for row in (deep, first, second)] == ["a/deep", "b-8", "b-64"]
  assert [row["schedule"] for row in (deep, first, second)] == ["poly", "linear", "cosine"]
  assert first["bound, bits/token"] == "2.250 ± 0.012" and first["at step"] == "100"
  assert first["steps"] == "240" and first["parameters"] == "1,234"
  assert first["tokens/s"] == "1,012"  # the median of 1001 to 1024, halves to even
  assert {deep[name] for name in list(deep)[2:]} == {tables.NOTHING}
  (exact,) = [table for table in tables.evaluator_tables(found) if table.title == "exact"]
  assert [row["exact/T2_kl_nats"] for row in rows(exact)] == ["–", "–", "0.5"]
  assert exact.note == "exact"


def test_a_short_label_tells_runs_apart_or_is_their_name(folder):
  found, _ = runs.find_runs(folder)
  assert tables.labels(found) == ["poly", "linear", "cosine"]
  write_run(folder / "again", config("poly", steps=4))
  write_run(folder / "c", config("poly"))  # whose settings are those of a/deep
  assert tables.labels(runs.find_runs(folder / "again")[0]) == ["again"]
  found, _ = runs.find_runs(folder)
  assert tables.labels(found) == [run.name for run in found]
  assert tables.labels([run for run in found if run.name in ("again", "c")]) == ["again", "c"]
  assert tables.labels([run for run in found if run.name in ("again", "b-8")])[0] == "poly, steps=4"


def test_the_files_hold_every_run_and_what_was_measured(folder, capsys):
  record = reported(folder)
  assert record["differing"] == ["schedule.name"] and record["skipped"] == []
  run = record["runs"][1]
  assert run["name"] == "b-8" and run["settings"]["data.name"] == "text"
  assert [point["bits_per_token"] for point in run["bounds"]] == [2.5, 2.25]
  assert run["evaluations"]["likelihood"]["convention"] == "a bound"
  text = (folder / "report.md").read_text()
  for shown in (capsys.readouterr().out, text, (folder / "report.html").read_text()):
    assert "2.250 ± 0.012" in shown and "b-64" in shown
  assert "standard deviation of the training bound" in text


def test_one_run_is_its_own_report(folder):
  assert [run["name"] for run in reported(folder / "b-8")["runs"]] == ["b-8"]


def test_a_folder_without_runs_is_refused(tmp_path):
  with pytest.raises(ValueError, match="there is no run in"):
    runs.find_runs(tmp_path)


def test_runs_that_differ_in_their_seed_alone_are_averaged(tmp_path):
  for seed, bits in enumerate([2.0, 2.2, 2.4]):
    write_run(tmp_path / str(seed), config(seed=seed), (), [(9, "likelihood", bound(bits))])
  write_run(tmp_path / "lone", config("cosine"), (), [(9, "likelihood", bound(3.0))])
  (row,) = rows(tables.over_seeds(runs.find_runs(tmp_path)[0]))
  assert row["settings"] == "schedule.name=linear" and row["seeds"] == "3"
  assert row["mean bound, bits/token"] == "2.20 ± 0.12"  # .2 / sqrt 3
  assert row["deviation between seeds"] == "0.2" and row["at step"] == "9"


def test_bounds_of_other_steps_are_not_averaged_and_a_seed_counts_once(tmp_path):
  made = {"a": (0, 9, 2.0), "b": (1, 9, 2.2), "c": (1, 9, 9.0), "d": (2, 5, 5.0), "e": (3, 9, 2.4)}
  made["f"] = (0, 5, 5.2)
  for name, (seed, step, bits) in made.items():
    write_run(tmp_path / name, config(seed=seed), (), [(step, "likelihood", bound(bits))])
  late, early = rows(tables.over_seeds(runs.find_runs(tmp_path)[0]))
  assert (late["seeds"], late["at step"]) == ("3", "9")
  assert late["mean bound, bits/token"] == "2.20 ± 0.12"  # of a, b and e; c has the seed of b
  assert (early["seeds"], early["at step"]) == ("2", "5")
  assert early["mean bound, bits/token"] == "5.10 ± 0.10"


def test_one_seed_has_no_spread(tmp_path):
  for name in "ab":
    write_run(tmp_path / name, config(), (), [(9, "likelihood", bound(2.0))])
  assert tables.over_seeds(runs.find_runs(tmp_path)[0]) is None


# The noise of the training bound.


def noise(bits, spacing=1):
  lines = [{"step": spacing * (i + 1), BITS: value} for i, value in enumerate(bits)]
  return runs.Run("run", {}, lines, {}).noise_bits


def test_a_straight_curve_has_no_noise_and_a_short_one_no_figure():
  assert noise(np.linspace(3, 2, 40)) == pytest.approx(0, abs=1e-12)
  assert noise(np.linspace(3, 2, 15)) is None


def test_a_zigzag_by_hand():
  # Every point is 2d from the mean of its neighbours: v = (2d)^2 / (3/2) per point, 5 steps each.
  zigzag = 2.0 + 0.3 * (-1.0) ** np.arange(40)
  assert noise(zigzag, spacing=5) == pytest.approx(0.6 * math.sqrt(5 / 1.5), rel=1e-12)


@pytest.mark.parametrize("spacing", [1, 25])
def test_the_noise_is_that_of_one_step_however_often_the_run_logs(spacing):
  rng = np.random.default_rng(0)
  curve = 2 + np.exp(-np.arange(8000) / 2000)
  points = curve + 0.4 / math.sqrt(spacing) * rng.normal(size=8000)
  assert noise(points, spacing) == pytest.approx(0.4, rel=0.04)


# Files that are not what a run wrote.

DAMAGE = {
  "config.json": ["", "[1]", '{"a": ', '{"a": "\\ud800"}', "[" * 10**5],
  "metrics.jsonl": ["nonsense\n", "[]\n", '{"step": null}\n', '{"step": 1e999}\n', "1\n"]
  + ['{"step": 1, "a": "text"}\n', '{"step": true}\n', '{"step": [1]}\n'],
  "eval/5-likelihood.json": ["", "3", '"step"', "{]", '{"x": "\\ud800"}'],
}


@pytest.mark.parametrize(
  ("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts]
)
def test_a_damaged_file_is_named_in_one_line_and_skipped(name, text, tmp_path):
  write_run(tmp_path / "good", config(), (), [(5, "likelihood", bound(2.0))])
  write_run(tmp_path / "bad", config(), [2.0], [(5, "likelihood", bound(2.0))])
  (tmp_path / "bad" / name).write_text(text)
  record = reported(tmp_path)
  (line,) = record["skipped"]
  assert line.startswith(f"skipped bad/{name}: ") and line.isprintable() and len(line) < 260
  assert [run["name"] for run in record["runs"]] == ["bad", "good"]
  assert record["runs"][1]["bounds"][0]["bits_per_token"] == 2.0


def test_a_folder_in_place_of_a_file_and_bytes_that_are_no_text_are_skipped(tmp_path):
  write_run(tmp_path / "run", config(), [2.0])
  (tmp_path / "run/config.json").write_bytes(b"\xff\xfe")
  (tmp_path / "run/eval/7-exact.json").mkdir(parents=True)
  (tmp_path / "run/eval/notes.json").write_text("not of a run")
  first, second = reported(tmp_path)["skipped"]
  assert "run/config.json" in first and "run/eval/7-exact.json: no plain file" in second


def test_figures_that_are_no_numbers_are_left_out(tmp_path):
  odd = {"a/nan": math.nan, "a/text": "x", "a/flag": True, "a/large": 10**400, "a/list": [1]}
  write_run(tmp_path / "run", config(), (), [(5, "exact", odd | {"a/good": 3})])
  found, _ = runs.find_runs(tmp_path)
  (table,) = tables.evaluator_tables(found)
  assert table.header == ["run", "at step", "a/good"]


class Tags(html.parser.HTMLParser):
  """The names of all tags and attributes of a page."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.attributes = set(), set()
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes |= {name for name, _ in attrs}


def test_text_of_a_run_is_shown_and_never_obeyed(tmp_path, capsys):
  evil = "<script>alert(1)</script>|`x`\x1b[31m\n# title"
  for name, value in (("one", evil), ("two", '"><img src=x onerror=y>')):
    figures = {f"<b>{value}": 1.0, "convention": value}
    write_run(tmp_path / name, config(path=value), (), [(5, "exact", figures)])
  reported(tmp_path)
  assert "\x1b" not in capsys.readouterr().out
  page = (tmp_path / "report.html").read_text()
  tags = Tags(page)
  assert tags.tags <= set("html head meta title style body h1 h2 p div table thead tbody tr th td "
                          "img".split())  # fmt: skip
  assert "onerror" not in tags.attributes
  assert "&lt;script&gt;" in page
  text = (tmp_path / "report.md").read_text()
  table = [line for line in text.splitlines() if line.startswith("|")]
  columns = {len(line.replace("\\|", "").split("|")) for line in table[:4]}
  assert len(columns) == 1 and "\n# title" not in text and "<script" not in text.replace("\\<", "")


# Plots.


def test_without_matplotlib_the_tables_appear_and_one_line_says_what_to_install(
  folder, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  report.report(folder)
  out = capsys.readouterr().out
  assert out.count("pip install 'md4vmd[report]'") == 1 and "b-64" in out
  assert "<img" not in (folder / "report.html").read_text()


def test_curves_by_calls_are_found_by_the_names_of_the_evaluators():
  figures = {
    "sudoku": {"valid/solved_margin_nfe1": 0.5, "valid/solved_margin_nfe20": 0.9, "valid/n": 9},
    "exact": {"exact/T1_kl_nats": 2.0, "exact/T8_kl_nats": 1.0, "exact/T1_nats": 5.0,
              "exact/T8_nats": 4.0, "exact/entropy_nats": 3.0},
    "blocks": {"blocks/b1_nfe1_kl_nats": 2.0, "blocks/b1_nfe1_kl_nats_standard_error": 0.1,
               "blocks/b1_nfe4_kl_nats": 1.0, "blocks/b2_nfe4_kl_nats": 1.0},
  }  # fmt: skip
  run = runs.Run("run", {}, [], {name: {7: record} for name, record in figures.items()})
  assert plots.curves_by_calls(run) == {
    "valid/solved_margin": [(1, 0.5, 0.0), (20, 0.9, 0.0)],
    "exact kl_nats": [(1, 2.0, 0.0), (8, 1.0, 0.0)],
    "blocks/b1 kl_nats": [(1, 2.0, 0.1), (4, 1.0, 0.0)],
  }


def test_smoothing_keeps_the_length_and_a_straight_line():
  line = np.linspace(3.0, 1.0, 100).tolist()
  np.testing.assert_allclose(plots.smoothed(line), line)
  assert np.std(plots.smoothed([0.0, 1.0] * 100)) < 0.1


def test_a_negative_standard_error_in_a_file_is_drawn_by_its_size():
  evaluated = lambda error: runs.Run("run", {}, [], {"likelihood": {5: bound(2.0, error)}})
  positive, negative, none = (plots.draw_all([evaluated(e)])["bits"] for e in (0.25, -0.25, None))
  assert positive == negative != none


def test_every_plot_is_drawn_and_embedded(folder):
  write_run(folder / "$odd_", config("$\\frac"), [2.0])
  report.report(folder)
  page = (folder / "report.html").read_text()
  for name in pages.PLOTS:
    assert (folder / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")
  assert page.count('src="data:image/png;base64,') == 3
  assert "![Bits per token" in (folder / "report.md").read_text()
