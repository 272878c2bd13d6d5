"""The same training on one device and on meshes of eight, which a process of its own has."""

import contextlib
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile

import jax
import numpy as np
import optax
import pytest

from md4vmd import build, evaluators, partitioning, steps, train, train_state
from tests import shrunken

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = {
  "data": (8, 1, 1),
  "all": (2, 2, 2),
  "fsdp": (1, 8, 1),
  "fsdp-tensor": (2, 4, 1),
}
STEPS = 10


def make_config(mesh=(-1, 1, 1), microbatches=1, batch_size=16):
  config = shrunken.config("sudoku", "4x4")
  config.network.update({"width": 32, "heads": 4})
  config.optimizer.update({"learning_rate": 1e-3, "weight_decay": 0.1})
  config.run.update(
    {"steps": STEPS, "batch_size": batch_size, "microbatches": microbatches, "log_every": 1}
  )
  config.run.checkpoint_every = STEPS
  config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
  config.evaluators.likelihood.update({"draws": 2, "limit": None})
  return config


class Watched:
  """The trainer's step; keeps what the states were after the first call and the last."""

  def __init__(self, step):
    self.step = step
    self.record = {"losses": [], "norms": []}

  def __call__(self, state, batch):
    if not self.record["losses"]:
      self.shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, batch)
      )
    state, sums = self.step(state, batch)
    self.record["losses"].append(float(sums["loss_nats"] / sums["tokens"]))
    self.record["norms"].append(float(sums["gradient_norm"]))
    if len(self.record["losses"]) == 1:
      # AdamW's first moment is linear in the gradient, unlike the parameters after a step.
      moment = optax.tree_utils.tree_get(state.optimizer_state, "mu")
      self.record["first"] = {"moment": by_name(moment), "params": by_name(state.params)}
    self.record["last"] = {"params": by_name(state.params), "ema": by_name(state.ema)}
    self.state = state
    return state, sums


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


@contextlib.contextmanager
def watching():
  """A list of the steps that trainers compile meanwhile, wrapped."""
  made, original = [], train._Loop._compiled_step

  def compiled_step(loop):
    made.append(Watched(original(loop)))
    return made[-1]

  train._Loop._compiled_step = compiled_step
  try:
    yield made
  finally:
    train._Loop._compiled_step = original


def train_and_watch(config):
  with tempfile.TemporaryDirectory() as workdir, watching() as made:
    train.train(config, pathlib.Path(workdir))
  (watched,) = made
  return watched


def likelihood(config):
  """The bound of fixed random parameters on the mesh of the config."""
  model = build.model(config)
  with partitioning.use(model.mesh):
    params = train_state.initial(model).params
    return build.evaluators(model, evaluators.TABLE)["likelihood"].run(0, params)


def refusal(config):
  with tempfile.TemporaryDirectory() as workdir:
    try:
      train.train(config, pathlib.Path(workdir))
    except ValueError as error:
      return str(error)
  return ""


def shards(tree):
  """name -> (shape, shape of the part that one device holds)."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(p, simple=True, separator="/"): (
      x.shape,
      x.addressable_shards[0].data.shape,
    )
    for p, x in leaves
  }


def on_eight_devices(path):
  """Everything that is measured on the meshes, pickled."""
  assert jax.device_count() == 8
  results = {}
  for name, mesh in MESHES.items():
    watched = train_and_watch(make_config(mesh, microbatches=2 if name == "fsdp-tensor" else 1))
    parts = {"params": watched.state.params, "ema": watched.state.ema}
    parts["moment"] = optax.tree_utils.tree_get(watched.state.optimizer_state, "mu")
    results[name] = watched.record | {
      "compiled": watched.step._cache_size(),
      "shards": {part: shards(tree) for part, tree in parts.items()},
    }
    if name == "fsdp":
      with partitioning.use(build.model(make_config(mesh)).mesh):
        memory = watched.step.lower(*watched.shapes).compile().memory_analysis()
      local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(watched.state))
      results[name] |= {"aliased": memory.alias_size_in_bytes, "state": local}
  results["likelihood"] = {
    (name, size): likelihood(make_config(MESHES[name], batch_size=size))
    for name, size in (("all", 16), ("data", 8))
  }
  results["refusals"] = {
    "mesh": refusal(make_config((3, 1, 1))),
    "two open axes": refusal(make_config((-1, -1, 1))),
    "batch": refusal(make_config((8, 1, 1), batch_size=12)),
    "microbatch": refusal(make_config((8, 1, 1), batch_size=16, microbatches=4)),
  }
  pathlib.Path(path).write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """(record on one device, results on eight)."""
  path = tmp_path_factory.mktemp("mesh") / "results"
  code = (
    "import jax; jax.config.update('jax_num_cpu_devices', 8);"
    "jax.config.update('jax_numpy_rank_promotion', 'raise');"
    f"from tests import mesh_test; mesh_test.on_eight_devices({str(path)!r})"
  )
  environment = os.environ | {"PYTHONPATH": str(shrunken.ROOT), "JAX_PLATFORMS": "cpu"}
  environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  environment["JAX_COMPILATION_CACHE_DIR"] = str(path.parent)
  environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  with subprocess.Popen(
    [sys.executable, "-c", code],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      one = train_and_watch(make_config()).record
      one["likelihood"] = likelihood(make_config(batch_size=20))
    finally:
      _, err = process.communicate(timeout=500)
  assert process.returncode == 0, err[-4000:]
  return one, pickle.loads(path.read_bytes())


def distance(tree, expected):
  """Norm of the difference relative to the norm."""
  assert tree.keys() == expected.keys()
  flat = lambda arrays: np.concatenate([arrays[name].ravel() for name in expected]).astype(float)
  return np.linalg.norm(flat(tree) - flat(expected)) / np.linalg.norm(flat(expected))


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
    ("all", "blocks/attention/query/kernel", (1, 2, 2)),
    ("all", "blocks/attention/out/kernel", (1, 2, 2)),
    ("all", "head", (2, 2)),
    ("all", "embedding", (2, 1)),
    ("data", "blocks/attention/query/kernel", (1, 1, 1)),
  ],
)
@pytest.mark.parametrize("tree", ["params", "ema", "moment"])
def test_each_device_holds_its_part_of_a_matrix(results, mesh, name, parts, tree):
  whole, part = results[1][mesh]["shards"][tree][name]
  assert tuple(np.floor_divide(whole, part)) == parts
  assert tuple(np.multiply(part, parts)) == whole


def test_the_state_is_updated_in_place(results):
  record = results[1]["fsdp"]
  # Every array of the state, but for some scalars, gives its memory to its successor.
  assert record["aliased"] > 0.99 * record["state"]


@pytest.mark.parametrize("mesh, size", [("all", 16), ("data", 8)])
def test_the_bound_is_the_same_on_any_mesh_and_batch_size(results, mesh, size):
  one, eight = results[0]["likelihood"], results[1]["likelihood"][mesh, size]
  assert eight["valid/tokens"] == one["valid/tokens"] > 0
  for name in ("valid/nelbo_nats_per_token", "valid/nelbo_nats_per_token_standard_error"):
    assert eight[name] == pytest.approx(one[name], abs=1e-5)
    assert one[name] > 1e-3


def test_a_mesh_that_does_not_fit_is_refused_with_what_would(results):
  message = results[1]["refusals"]["mesh"]
  assert "mesh data=3, fsdp=1, tensor=1 does not fit 8 devices" in message
  assert "set one axis to -1" in message
  assert "at most one -1" in results[1]["refusals"]["two open axes"]
  with pytest.raises(ValueError, match="data=2, fsdp=1, tensor=1 does not fit 1 devices"):
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
  for count in (1, 2, 4):
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
    found[count] = by_name(moment), {name: float(value) for name, value in sums.items()}
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


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_leave_gradients_and_metrics_as_they_are(gradients, count):
  moment, sums = gradients[count]
  whole, expected = gradients[1]
  assert distance(moment, whole) < 1e-6
  assert sums == pytest.approx(expected, rel=1e-6)
