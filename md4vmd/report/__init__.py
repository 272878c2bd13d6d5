"""The report: every run below a folder in one table, with plots."""

from __future__ import annotations

import pathlib

from md4vmd.report import pages, plots, runs, tables
from md4vmd.writers import dump, replace_file, say


def report(workdir: pathlib.Path) -> None:
  """Writes report.html, report.md and report.json into the workdir and prints the tables.

  Without matplotlib the plots are left out; with it they also become report-<name>.png.

  Raises:
    ValueError: there is no run in the workdir.
  """
  found, complaints = runs.find_runs(workdir)
  shown = [tables.main_table(found), tables.over_seeds(found), *tables.evaluator_tables(found)]
  shown = [table for table in shown if table is not None]
  pictures = plots.draw_all(found)
  remarks = complaints + ["no plots: pip install 'md4vmd[report]'"] * (not pictures)
  for table in shown:
    say(f"{pages.terminal(table)}\n")
  title = f"Runs in {runs.printable(workdir)}"
  files = {name: f"report-{name}.png" for name in pictures}
  for name, png in pictures.items():
    (workdir / files[name]).write_bytes(png)
  replace_file(workdir / "report.md", pages.markdown(title, shown, files, remarks))
  replace_file(workdir / "report.html", pages.page(title, shown, pictures, remarks))
  replace_file(workdir / "report.json", dump(_record(found, complaints), indent=2) + "\n")
  for remark in remarks:
    say(remark)
  say(f"Wrote {workdir / 'report.html'}, report.md and report.json for {len(found)} runs.")


def _record(found: list[runs.Run], complaints: list[str]) -> dict:
  """The report for programs: each run's settings, figures and newest evaluations."""
  return {
    "differing": tables.differing(found),
    "runs": [
      {
        "name": run.name,
        "settings": run.settings,
        "steps": run.steps,
        "parameters": run.parameters,
        "tokens_per_second": run.tokens_per_second,
        "training_noise_bits_per_token": run.noise_bits,
        "bounds": [
          {"step": step, "bits_per_token": bits, "standard_error": error}
          for step, bits, error in run.bounds()
        ],
        "evaluations": {name: record for name, (_, record) in run.newest().items()},
      }
      for run in found
    ],
    "skipped": complaints,
  }
