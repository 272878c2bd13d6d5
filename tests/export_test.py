"""Weights out of a run and into another; the best step of a run."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from md4vmd import (
  build,
  config_record,
  evaluate,
  export,
  networks,
  partitioning,
  provenance,
  train,
  train_state,
  weights,
)
from md4vmd.checkpoints import read_best
from md4vmd.fingerprints import by_name
from md4vmd.writers import read_metrics
from tests import shrunken

pytestmark = pytest.mark.usefixtures("quick_compilation")

BEST = "likelihood/valid/nelbo_bits_per_token"


def make_config(**run):
  config = shrunken.config("synthetic", "pairs")
  # A rate so high that the last steps are not the best ones.
  config.optimizer.update({"learning_rate": 0.5, "ema": 0.0})
  del config.evaluators.exact
  config.run.update({"steps": 6, "checkpoint_every": 6, "evaluate_every": 1, "keep": 1})
  config.run.update({"best": BEST, **run})
  return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train.train(make_config(), workdir)
  return workdir


@pytest.fixture(scope="module")
def exported(workdir):
  """The file of the best step."""
  return export.export(make_config(), workdir, "best")


def by_step(workdir):
  return {line["step"]: line[BEST] for line in read_metrics(workdir) if BEST in line}


def test_the_step_with_the_best_figure_is_kept_beside_the_newest(workdir):
  figures = by_step(workdir)
  step = min(figures, key=figures.get)
  assert len(figures) == 6 and step != 6  # else this test would show nothing
  best = read_best(workdir / "checkpoints")
  assert (best.step, best.name, best.value) == (step, BEST, figures[step])
  kept = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
  assert kept == {step, 6}


def test_the_best_step_is_evaluated_where_it_is_asked_for(workdir):
  evaluate.evaluate(make_config(), workdir, "best")
  step = read_best(workdir / "checkpoints").step
  record = json.loads((workdir / f"eval/{step}-likelihood.json").read_text())
  assert record["step"] == step
  assert record["valid/nelbo_bits_per_token"] == pytest.approx(by_step(workdir)[step], rel=1e-6)


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"evaluate_every": 0}, "set run.evaluate_every"),
    ({"best_is": "highest"}, "run.best_is is 'highest'; it must be 'smallest' or 'largest'"),
  ],
)
def test_a_best_that_cannot_be_found_is_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    build.model(make_config(**settings))


def test_a_figure_that_no_evaluator_reports_is_refused_with_the_nearest(tmp_path):
  config = make_config(best="likelihood/valid/nelbo_bits_per_tokn")
  with pytest.raises(ValueError, match=f"did you mean '{BEST}'"):
    train.train(config, tmp_path)


def test_a_checkpoint_says_what_made_it(workdir):
  text = (workdir / "checkpoints/6/meta/metadata").read_text()
  meta = json.loads(text)["meta"]
  assert meta["config"] == config_record.plain(make_config())
  assert meta["made_with"] == provenance.record()
  assert {"md4vmd", "jax", "python"} <= meta["made_with"].keys()


def test_the_file_holds_the_averaged_parameters_without_padding(workdir, exported):
  model = build.model(make_config())
  with partitioning.use(model.mesh):
    ema = by_name(train_state.load_average(model, workdir, "best").state["ema"])
  arrays = safetensors.numpy.load_file(exported)
  size = model.dataset.vocab_size
  assert arrays.keys() == ema.keys()
  assert arrays["embedding"].shape[0] == size + 1 < ema["embedding"].shape[0]
  assert arrays["head"].shape[1] == size < ema["head"].shape[1]
  for name, array in arrays.items():
    corner = tuple(map(slice, array.shape))
    np.testing.assert_array_equal(array, np.asarray(ema[name])[corner])
  header = weights.read_header(exported)
  assert header["format"] == "md4vmd-1" and header["config"] == config_record.plain(make_config())
  assert header["step"] == read_best(workdir / "checkpoints").step


def test_a_run_that_starts_from_a_file_computes_what_the_file_does(workdir, exported, tmp_path):
  config = make_config(initial=str(exported), best="", evaluate_every=0)
  model = build.model(config)
  with partitioning.use(model.mesh):
    state = train_state.initial(model)
  for tree in (state.params, state.ema):
    for name, array in safetensors.numpy.load_file(exported).items():
      corner = tuple(map(slice, array.shape))
      np.testing.assert_array_equal(np.asarray(by_name(tree)[name])[corner], array)
  assert int(state.step) == 0
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.optimizer_state))


def test_a_file_in_bfloat16_is_read(tmp_path):
  path, half = tmp_path / "half.safetensors", np.array([1.5, -2.0], jnp.bfloat16)
  safetensors.numpy.save_file({"a": half}, path)
  read = weights.read(path, {"a": np.zeros(3, np.float32)}, {"a": (2,)})
  assert read["a"].dtype == np.float32 and read["a"].tolist() == [1.5, -2.0, 0.0]


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda arrays: arrays | {"more": np.zeros(2, np.float32)}, "more has no place"),
    (lambda arrays: {k: v for k, v in arrays.items() if k != "head"}, "head is missing"),
    (lambda arrays: arrays | {"head": arrays["head"][:, 1:]}, "head has shape"),
  ],
)
def test_a_file_of_another_network_is_refused_with_the_parameter(exported, tmp_path, change, words):
  path = tmp_path / "other.safetensors"
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v) for k, v in change(safetensors.numpy.load_file(exported)).items()},
    path,
  )
  model = build.model(make_config(initial=str(path)))
  with partitioning.use(model.mesh), pytest.raises(ValueError, match=words):
    weights.read(path, train_state.abstract(model).params, train_state.true_shapes(model))


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 64])
def test_what_is_no_safetensors_is_refused(tmp_path, content):
  path = tmp_path / "x.safetensors"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match="cannot be read as safetensors"):
    weights.read(path, {"a": np.zeros(2)}, {"a": (2,)})


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
  with pytest.raises(ValueError, match="a folder; --mode=export writes the file"):
    weights.read_header(tmp_path)


def test_an_exported_file_is_evaluated_where_there_is_no_checkpoint(workdir, exported, tmp_path):
  evaluate.evaluate(make_config(initial=str(exported)), tmp_path / "new")
  step = read_best(workdir / "checkpoints").step
  record = json.loads((tmp_path / f"new/eval/{step}-likelihood.json").read_text())
  assert record["checkpoint"] == str(exported)
  assert record["valid/nelbo_bits_per_token"] == pytest.approx(by_step(workdir)[step], rel=1e-6)


def test_a_checkpoint_of_the_workdir_comes_before_the_file(workdir, exported):
  model = build.model(make_config(initial=str(exported)))
  with partitioning.use(model.mesh):
    assert train_state.load_average(model, workdir).step == 6


@pytest.fixture
def md4(tmp_path):
  """(config of a golden network on text of its 11 characters, MD4's parameters, its logits)."""
  golden = dict(np.load(pathlib.Path(__file__).parent / "golden/md4_transformer_0.npz"))
  text = "".join(np.random.default_rng(0).choice(list("0123456789 "), 4000))
  (tmp_path / "digits.txt").write_text(text)
  config = shrunken.config("text8", folder=tmp_path)
  config.data.update({"path": str(tmp_path / "digits.txt"), "length": 8})
  config.network.update({"width": 32, "depth": 2, "heads": 4, "condition_width": 8})
  config.network.update({"mlp": "glu", "time_conditioning": True})
  config.run.initial = str(tmp_path / "md4.safetensors")
  return config, {key: golden[key] for key in golden if key.startswith("params/")}, golden


def test_parameters_of_md4_become_a_file_that_is_evaluated(md4, tmp_path):
  config, tree, golden = md4
  started = config.copy_and_resolve_references()
  started.run.initial = ""
  export.from_md4(started, tree, tmp_path / "md4.safetensors")
  model = build.model(config)
  with partitioning.use(model.mesh):
    params = train_state.load_average(model, tmp_path / "new").state["ema"]
    prediction = networks.bind(model.network, params).denoise(golden["z"], golden["t"][:, None])
  np.testing.assert_allclose(prediction.logits(), golden["logits"], atol=1e-5)
  evaluate.evaluate(config, tmp_path / "new")
  record = json.loads((tmp_path / "new/eval/0-likelihood.json").read_text())
  assert record["checkpoint"] == config.run.initial


def test_parameters_of_md4_for_another_vocabulary_or_network_are_refused(md4, tmp_path):
  config, tree, _ = md4
  config.run.initial = ""
  config.network.time_conditioning = False
  with pytest.raises(ValueError, match=r"the parameter .* has shape .* in the MD4 parameters"):
    export.from_md4(config, tree, tmp_path / "wrong.safetensors")
  (tmp_path / "digits.txt").write_text("0123 " * 900)
  with pytest.raises(ValueError, match="vocab_size"):
    export.from_md4(config, tree, tmp_path / "wrong.safetensors")
  assert not (tmp_path / "wrong.safetensors").exists()
