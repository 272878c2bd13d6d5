"""The same training on one device and on meshes of eight, which a process of its own has."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from md4vmd import build, data, evaluators, partitioning, steps, train, train_state
from md4vmd.fingerprints import by_name
from tests import shrunken
from tests.multi_process_test import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = {
  "all": (2, 2, 2, 1),
  "fsdp": (1, 8, 1, 1),
  "sequence": (1, 2, 2, 2),
}
STEPS = 10
EVALUATED = (("sequence", 16), ("fsdp", 8))  # and batch sizes


def make_config(mesh=(-1, 1, 1, 1), microbatches=1, batch_size=16):
  config = shrunken.config("sudoku", "4x4")
  config.optimizer.update({"learning_rate": 1e-3, "weight_decay": 0.1})
  config.run.update({"batch_size": batch_size, "microbatches": microbatches})
  config.mesh.update(dict(zip(partitioning.AXES, mesh, strict=True)))
  config.evaluators.likelihood.update({"draws": 2, "limit": None})
  return config


class Steps:
  """STEPS steps of the trainer's program on the mesh of a config.

  Attributes:
    record: losses, norms, and what the states were after the first step and the last.
    state: the last state.
    step: the program.
    shapes: of its arguments.
  """

  def __init__(self, config, first):
    model = build.model(config)
    with partitioning.use(model.mesh):
      self.step = train.compiled_step(model)
      self.state = jax.device_put(first, train_state.shardings(model))
      batches = data.train_batches(model.dataset, batch_size=model.run.batch_size, seed=model.seed)
      self.record = {"losses": [], "norms": []}
      for arrays in (next(batches) for _ in range(STEPS)):
        self._take(partitioning.put_batch(model.mesh, arrays))

  def _take(self, batch):
    self.shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (self.state, batch)
    )
    self.state, sums = self.step(self.state, batch)
    self.record["losses"].append(float(sums["loss_nats"] / sums["tokens"]))
    self.record["norms"].append(float(sums["gradient_norm"]))
    if len(self.record["losses"]) == 1:
      # AdamW's first moment is linear in the gradient, unlike the parameters after a step.
      self.record["first"] = {"moment": self.moment, "params": to_numpy(self.state.params)}
    params, ema = to_numpy(self.state.params), to_numpy(self.state.ema)
    self.record["last"] = {"params": params, "ema": ema}

  @property
  def moment(self):
    return to_numpy(optax.tree_utils.tree_get(self.state.optimizer_state, "mu"))


def to_numpy(tree):
  return {name: np.asarray(leaf) for name, leaf in by_name(tree).items()}


def first_state():
  """The state at step 0, made on one device."""
  model = build.model(make_config(), devices=jax.devices()[:1])
  with partitioning.use(model.mesh):
    return jax.tree.map(np.asarray, train_state.initial(model))


def likelihood(config, params):
  """The bound of fixed random parameters on the mesh of the config."""
  model = build.model(config)
  with partitioning.use(model.mesh):
    params = jax.device_put(params, train_state.shardings(model).params)
    return build.evaluators(model, evaluators.TABLE)["likelihood"].run(0, params)


def text_figures(folder, mesh=(-1, 1, 1, 1), batch_size=20):
  """Numbers of the likelihood and of zero-shot sets of random parameters, on the mesh."""
  folder = pathlib.Path(folder)
  config = shrunken.config("owt", "small", folder, path=str(folder / "prepared"))
  config.run.batch_size = batch_size
  config.mesh.update(dict(zip(partitioning.AXES, mesh, strict=True)))
  config.evaluators.likelihood.update({"draws": 2, "limit": None})
  config.evaluators.zero_shot.update({"draws": 2, "limit": 10})
  config.run.evaluators = ("likelihood", "zero_shot")
  model = build.model(config)
  with partitioning.use(model.mesh):
    params, figures = random_params(model), {}
    for evaluator in build.evaluators(model, evaluators.TABLE).values():
      figures |= evaluator.run(0, params)
  return {key: each for key, each in figures.items() if isinstance(each, int | float)}


def refusal(config):
  try:
    build.model(config)
  except ValueError as error:
    return str(error)
  return ""


def shards(tree):
  """name -> (shape, shape of the part that one device holds)."""
  return {name: (x.shape, x.addressable_shards[0].data.shape) for name, x in by_name(tree).items()}


def flat(record, prefix=""):
  """name/name -> array of nested dicts of arrays."""
  found = {}
  for name, value in record.items():
    if isinstance(value, dict):
      found |= flat(value, f"{prefix}{name}|")
    else:
      found[f"{prefix}{name}"] = np.asarray(value)
  return found


def nested(arrays):
  """The inverse of `flat`."""
  found = {}
  for path, value in arrays.items():
    *folders, name = path.split("|")
    place = found
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = value
  return found


def on_eight_devices(folder):
  """Everything that is measured on the meshes, as arrays.npz and refusals.json."""
  assert jax.device_count() == 8
  results, first = {}, first_state()
  for name, mesh in MESHES.items():
    done = Steps(make_config(mesh, microbatches=2 if name == "fsdp" else 1), first)
    moment = optax.tree_utils.tree_get(done.state.optimizer_state, "mu")
    parts = {"params": done.state.params, "ema": done.state.ema, "moment": moment}
    results[name] = done.record | {
      "compiled": done.step._cache_size(),
      "shards": {part: shards(tree) for part, tree in parts.items()},
    }
    if name == "fsdp":
      with partitioning.use(build.model(make_config(mesh, 2)).mesh):
        memory = done.step.lower(*done.shapes).compile().memory_analysis()
      local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(done.state))
      results[name] |= {"aliased": memory.alias_size_in_bytes, "state": local}
  results["likelihood"] = {
    f"{name} {size}": {
      key: value
      for key, value in likelihood(make_config(MESHES[name], batch_size=size), first.params).items()
      if isinstance(value, int | float)
    }
    for name, size in EVALUATED
  }
  results["text"] = {
    f"{name} {size}": text_figures(folder, MESHES[name], size) for name, size in EVALUATED
  }
  longer = make_config((-1, 1, 1, 8))
  longer.data.update({"name": "synthetic", "distribution": "d1"})
  refusals = {
    "mesh": refusal(make_config((3, 1, 1, 1))),
    "two open axes": refusal(make_config((-1, -1, 1, 1))),
    "batch": refusal(make_config((8, 1, 1, 1), batch_size=12)),
    "microbatch": refusal(make_config((8, 1, 1, 1), batch_size=16, microbatches=4)),
    "length": refusal(longer),
  }
  np.savez(f"{folder}/arrays.npz", **flat(results))
  pathlib.Path(f"{folder}/refusals.json").write_text(json.dumps(refusals))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """(record on one device, results on eight)."""
  folder = tmp_path_factory.mktemp("mesh")
  shrunken.prepare_bytes(folder)
  code = (
    "import jax; jax.config.update('jax_num_cpu_devices', 8);"
    "jax.config.update('jax_numpy_rank_promotion', 'raise');"
    f"from tests import mesh_test; mesh_test.on_eight_devices({str(folder)!r})"
  )
  environment = os.environ | {"PYTHONPATH": str(shrunken.ROOT), "JAX_PLATFORMS": "cpu"}
  environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  with subprocess.Popen(
    [sys.executable, "-c", code],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      first = first_state()
      one = Steps(make_config(), first).record
      one["likelihood"] = likelihood(make_config(batch_size=20), first.params)
      one["text"] = text_figures(folder)
    finally:
      _, err = process.communicate(timeout=500)
  assert process.returncode == 0, err[-4000:]
  eight = nested(np.load(folder / "arrays.npz"))
  eight["refusals"] = json.loads((folder / "refusals.json").read_text())
  return one, eight


def distance(tree, expected):
  """Relative distance of all arrays as one vector."""
  assert tree.keys() == expected.keys() and len(expected) > 5
  joined = lambda of: np.concatenate([of[name].ravel() for name in expected]).astype(np.float64)
  return np.linalg.norm(joined(tree) - joined(expected)) / np.linalg.norm(joined(expected))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_first_step_on_a_mesh_is_that_on_one_device(results, mesh):
  one, eight = results[0], results[1][mesh]
  assert eight["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
  assert eight["norms"][0] == pytest.approx(one["norms"][0], rel=1e-6)
  assert distance(eight["first"]["moment"], one["first"]["moment"]) < 1e-6
  assert distance(eight["first"]["params"], one["first"]["params"]) < 1e-6


@pytest.mark.parametrize("mesh", MESHES)
def test_ten_steps_on_a_mesh_are_those_on_one_device(results, mesh):
  one, eight = results[0], results[1][mesh]
  assert len(one["losses"]) == STEPS
  np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-4)
  np.testing.assert_allclose(eight["norms"], one["norms"], rtol=1e-4)
  assert distance(eight["last"]["params"], one["last"]["params"]) < 1e-4
  assert distance(eight["last"]["ema"], one["last"]["ema"]) < 1e-4
  assert distance(one["first"]["params"], one["last"]["params"]) > 1e-3


@pytest.mark.parametrize("mesh", MESHES)
def test_the_step_is_compiled_once(results, mesh):
  assert results[1][mesh]["compiled"] == 1


@pytest.mark.parametrize(
  "mesh, name, parts",
  [
    ("fsdp", "blocks/attention/query/kernel", (1, 8, 1)),
    ("fsdp", "blocks/mlp/down/kernel", (1, 1, 8)),
    ("fsdp", "head", (8, 1)),
    ("fsdp", "embedding", (8, 1)),
    ("all", "blocks/attention/query/kernel", (1, 2, 2)),
    ("all", "blocks/attention/out/kernel", (1, 2, 2)),
    ("all", "head", (2, 2)),
    ("all", "embedding", (4, 1)),
    ("sequence", "blocks/attention/query/kernel", (1, 2, 2)),
  ],
)
@pytest.mark.parametrize("tree", ["params", "ema", "moment"])
def test_each_device_holds_its_part_of_a_matrix(results, mesh, name, parts, tree):
  whole, part = results[1][mesh]["shards"][tree][name]
  assert tuple(np.floor_divide(whole, part)) == parts
  assert tuple(np.multiply(part, parts)) == tuple(whole)


def test_the_state_is_updated_in_place(results):
  record = results[1]["fsdp"]
  # Every array of the state, but for some scalars, gives its memory to its successor.
  assert record["aliased"] > 0.99 * record["state"]


@pytest.mark.parametrize("mesh, size", EVALUATED)
def test_the_bound_is_the_same_on_any_mesh_and_batch_size(results, mesh, size):
  one, eight = results[0]["likelihood"], results[1]["likelihood"][f"{mesh} {size}"]
  assert eight["valid/tokens"] == one["valid/tokens"] > 0
  for name in ("valid/nelbo_nats_per_token", "valid/nelbo_nats_per_token_standard_error"):
    assert eight[name] == pytest.approx(one[name], rel=0, abs=1e-5)
    assert one[name] > 1e-3


@pytest.mark.parametrize("mesh, size", EVALUATED)
def test_figures_of_text_are_the_same_on_any_mesh_and_batch_size(results, mesh, size):
  one, eight = results[0]["text"], results[1]["text"][f"{mesh} {size}"]
  assert {"valid/tokens", "ag_news/radd-v1/tokens", "ag_news/mdlm-v1/tokens"} < one.keys()
  assert eight.keys() == one.keys()
  for name, value in one.items():
    rel = 0 if "nats_per_token" in name else 1e-5
    assert eight[name] == pytest.approx(value, rel=rel, abs=1e-5), name


def test_a_mesh_that_does_not_fit_is_refused_with_what_would(results):
  message = results[1]["refusals"]["mesh"]
  assert "mesh data=3, fsdp=1, tensor=1, sequence=1 does not fit 8 devices" in message
  assert "the nearest that do: data=8, fsdp=1, tensor=1, sequence=1; " in message
  assert "set one axis to -1" in message
  assert "at most one -1" in results[1]["refusals"]["two open axes"]
  with pytest.raises(
    ValueError, match=r"data=2, .* does not fit 1 devices; the nearest that do: data=1, "
  ):
    partitioning.make_mesh(data=2)


@pytest.mark.parametrize("batch, count", [("batch", 12), ("microbatch", 4)])
def test_a_batch_that_the_devices_cannot_share_is_refused(results, batch, count):
  message = results[1]["refusals"][batch]
  assert f"{count} examples" in message
  assert "multiple of 8" in message


@pytest.fixture(scope="module")
def gradients():
  """microbatches -> (mean gradient by name, metrics) of one step from the same state."""
  found = {}
  for count in (1, 4):
    model = build.model(make_config())
    with partitioning.use(model.mesh):
      state = train_state.initial(model)
      batch = padded_batch(model)
      step = jax.jit(
        lambda state, batch, model=model, count=count: steps.train_step(
          state,
          batch,
          network=model.network,
          objective=model.objective,
          optimizer=model.optimizer,
          microbatches=count,
          seed=model.seed,
        )
      )
      state, sums = step(state, batch)
    moment = optax.tree_utils.tree_get(state.optimizer_state, "mu")
    found[count] = to_numpy(moment), {name: float(value) for name, value in sums.items()}
  return found


def padded_batch(model):
  """One batch of the training data, with the last two examples only filling it."""
  source = model.dataset.split("train")
  items = [source[i] for i in range(16)]
  return partitioning.put_batch(
    model.mesh,
    {
      "x_BxL": np.stack([item["x"] for item in items]),
      "given_BxL": np.stack([item["given"] for item in items]),
      "weight_B": np.repeat([1, 0], [14, 2]).astype(np.float32),
      "index_B": np.arange(16, dtype=np.int32),
    },
  )


def test_microbatches_leave_gradients_and_metrics_as_they_are(gradients):
  moment, sums = gradients[4]
  whole, expected = gradients[1]
  assert distance(moment, whole) < 1e-6
  assert sums == pytest.approx(expected, rel=1e-6)
