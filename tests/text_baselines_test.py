import json
import pathlib

import pytest

from benchmarks import text_baselines, timing, trainings
from md4vmd import build, evaluators
from tests import shrunken


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def data(folder):
  return str(shrunken.prepare_bytes(folder))


@pytest.mark.parametrize("model", sorted(text_baselines.MODELS))
def test_every_model_is_the_small_config_with_its_evaluators(model, data, folder):
  sets = (f"ag_news={folder / 'lines.txt'}",)
  job = text_baselines.Job(model, 1.0, data, 16, sets, 8, 2, folder)
  built = build.model(text_baselines.config(job))
  assert type(built.objective).__name__.lower() == model
  assert built.evaluators["zero_shot"]["sets"] == sets
  made = build.evaluators(built, evaluators.TABLE)
  assert made["zero_shot"].scorer.draws == made["likelihood"].scorer.draws
  assert made["likelihood"].scorer.draws == {"ar": 1, "vmd": 32}.get(model, 2)


def test_the_command_prints_two_tables_and_writes_flat_json(monkeypatch, tmp_path, capsys):
  figures = {"parameters": 10, "steps": 3, "train_cpu_seconds": 4.0}
  for prefix, more in {"valid": {}, "ptb/radd-v1": {"tokens_dropped": 5}}.items():
    named = {"nelbo_nats_per_token": 2.0, "nelbo_nats_per_token_standard_error": 0.5}
    named |= {"nelbo_bits_per_token": 2.885, "tokens": 64.0} | more
    figures |= {f"{prefix}/{name}": value for name, value in named.items()}
  monkeypatch.setattr(timing, "machine", lambda: "a machine")
  run = lambda function, jobs, processes: ((job, figures) for job in jobs)
  monkeypatch.setattr(trainings, "on_cores", run)
  monkeypatch.setattr(
    trainings, "steps_in", lambda minutes, configs, folder: dict.fromkeys(configs, 3)
  )
  out = tmp_path / "out.json"
  text_baselines.main(["--data", "x", "--models", "ar,md4", "--json", str(out)])
  printed = capsys.readouterr().out
  assert "md4    ptb/radd-v1         7.4  3.7       2.885         -      64        5" in printed
  found = json.loads(pathlib.Path(out).read_text())
  assert found["ar/valid/nelbo_nats_per_token"] == 2.0 and len(found) == 5
