import dataclasses
import json
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from benchmarks import decode, naive, sampler, timing, train_step
from md4vmd import networks, rngs, steps

TINY = train_step.Case("tiny", 11, 16, 1, 32, 4)


@pytest.fixture(scope="module")
def params():
  return train_step.make_state(TINY, train_step.Optimizer(steps=1000)).params


def is_flat(path) -> bool:
  figures = json.loads(path.read_text())
  return all(isinstance(v, int | float) and math.isfinite(v) for v in figures.values())


def test_disagreement_is_noticed():
  plain = (2.0, {"a": np.array([1.0, -4.0]), "b": np.array([1e-3])})
  assert train_step.compare("c", plain, plain) == (0.0, 0.0)
  with pytest.raises(ArithmeticError, match=r"^c: losses differ by 1\.0e-03$"):
    train_step.compare("c", (2.002, plain[1]), plain)
  wrong = {"a": np.array([1.0, -4.0]), "b": np.array([1.01e-3])}
  with pytest.raises(ArithmeticError, match=r"^c: gradients differ by 1\.0e-02 at \['b'\]$"):
    train_step.compare("c", (2.0, wrong), plain)
  with pytest.raises(ArithmeticError, match="gradients differ by nan"):
    train_step.compare("c", (2.0, {"a": np.full(2, np.nan), "b": plain[1]["b"]}), plain)
  zeros = (2.0, {"a": plain[1]["a"], "b": np.zeros(1)})
  with pytest.raises(ArithmeticError, match=r"gradients differ by inf at \['b'\]"):
    train_step.compare("c", zeros, zeros)


def test_train_step_command_compares_prints_a_table_and_writes_flat_json(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(
    train_step, "CASES", (dataclasses.replace(TINY, microbatches=2, remat="dots"),)
  )
  out = tmp_path / "new" / "figures.json"
  train_step.main(["--json", str(out), "--rounds", "2"])
  printed = capsys.readouterr().out
  assert f"jax {jax.__version__}" in printed
  agreement = r"^tiny microbatches=2 remat=dots: loss agrees to (\S+), gradients to (\S+)$"
  loss_error, gradient_error = map(float, re.search(agreement, printed, re.MULTILINE).groups())
  assert 0 <= loss_error <= 1e-6 and 0 < gradient_error <= 1e-5
  assert re.search(r"^tiny naive .* 1$", printed, re.MULTILINE)
  assert is_flat(out)
  named = {"tiny/tokens_per_second_ratio", "tiny/temp_bytes_ratio"}
  assert named <= json.loads(out.read_text()).keys()
  assert list(tmp_path.glob("new/*")) == [out]


def test_public_form_of_the_loss_is_the_same_loss(params):
  objective = dataclasses.replace(TINY.objective, estimator="time")  # its draws compile sooner

  @jax.jit
  def losses(params):
    batch, noise = train_step.make_batch(TINY), rngs.batch_noise(jax.random.key(0), TINY.batch)
    settings = {"network": TINY.network, "objective": objective}
    draws = objective.draw(noise, batch)
    return [naive.loss(params, batch, draws, **settings, public=public) for public in (False, True)]

  np.testing.assert_allclose(*losses(params), rtol=1e-6)


def test_plain_form_of_genmd4_is_the_same_loss():
  case = dataclasses.replace(TINY, is_genmd4=True)
  objective, network = case.objective, case.network

  @jax.jit
  def losses():
    batch, noise = train_step.make_batch(case), rngs.batch_noise(jax.random.key(0), case.batch)
    init = lambda: steps.init_state(network, train_step.Optimizer(steps=1000), 0, case.length)
    params = nn.unbox(init().params)
    draws = objective.draw(noise, batch)
    ours = objective.loss(networks.bind(network, params), batch, draws, step=0).loss
    return ours, naive.genmd4_loss(params, batch, draws, network=network, objective=objective)

  np.testing.assert_allclose(*losses(), rtol=1e-6)


def test_sampler_command_writes_flat_json(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sampler, "CASES", (dataclasses.replace(TINY, batch=1),))
  out = tmp_path / "figures.json"
  sampler.main(["--json", str(out), "--rounds", "2", "--naive-steps", "16"])
  assert "tiny ours" in capsys.readouterr().out
  assert is_flat(out)
  figures = json.loads(out.read_text())
  assert figures["tiny/seconds_ratio"] > 0
  assert figures["tiny/naive_calls"] == 16
  assert 1 <= figures["tiny/ours_calls"] <= 16


def test_the_plain_sampler_fills_every_position(params):
  times = sampler.samplers.times("cosine", 5)
  x_BxL = sampler.compile_naive(TINY, params, times, 5)(jax.random.key(0), params)
  assert x_BxL.shape == (TINY.batch, TINY.length)
  assert int(x_BxL.max()) < TINY.vocab_size


def test_goals_are_stated_for_the_cases_that_the_command_runs():
  assert [case.name for case in train_step.CASES] == [
    "v50257",
    "v50257_tilted",
    "v27",
    "genmd4_v50257",
  ]
  assert [case.name for case in sampler.CASES] == ["v50257", "v27"]
  every = train_step.variants(train_step.CASES[2], all_variants=True)
  assert len(every) == 8
  assert next(iter(every.values())) == train_step.CASES[2]


def test_interleave_rotates_the_order_and_warms_up():
  calls = []
  functions = {name: lambda name=name: calls.append(name) for name in "abc"}
  seconds = timing.interleave(functions, rounds=3, warmups=1)
  assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
  assert all(len(values) == 3 for values in seconds.values())


def test_ratio_is_taken_within_rounds():
  assert timing.ratio(np.array([2.0, 20.0, 9.0]), np.array([1.0, 10.0, 3.0])) == 2.0


def test_table_is_aligned():
  lines = timing.table(("name", "ms"), [["a", 1.5], ["longer", 12345.0]]).splitlines()
  assert lines == ["name        ms", "------  ------", "a          1.5", "longer  12,345"]


@pytest.mark.parametrize("value", [math.nan, "fast", None, {"a": 1}])
def test_figures_are_finite_numbers(tmp_path, value):
  with pytest.raises(ValueError, match=r"figure x is .*; it must be a finite number"):
    timing.finish({"x": value}, tmp_path / "out.json")
  assert not list(tmp_path.iterdir())


def test_figures_are_printed_as_a_line_and_written(tmp_path, capsys):
  timing.finish({"a/b": 1.5}, tmp_path / "new/out.json")
  first, second = capsys.readouterr().out.splitlines()
  assert json.loads(first) == {"a/b": 1.5} and second.startswith("wrote ")
  assert json.loads((tmp_path / "new/out.json").read_text()) == {"a/b": 1.5}
  assert len(list((tmp_path / "new").iterdir())) == 1


def test_decoding_command_compares_prints_a_table_and_writes_flat_json(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(decode, "CASES", (decode.Decoding("tiny", 11, 8, 1, 32, 2),))
  out = tmp_path / "figures.json"
  decode.main(["--json", str(out), "--rounds", "1", "--naive-positions", "4"])
  printed = capsys.readouterr().out
  assert re.search(r"^tiny with cache .* 8 ", printed, re.MULTILINE)
  assert is_flat(out)
  figures = json.loads(out.read_text())
  assert figures["tiny/seconds_ratio"] > 0 and figures["tiny/cached_calls"] == 8
  assert 0 <= figures["tiny/logits_error"] <= 1e-5
