import contextlib
import json
import pathlib
import random
import shutil
import socket
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from md4vmd import checkpoints


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  ema: dict
  opt_state: tuple
  extra: dict | None = None


def make_state(step: int, width: int = 48) -> State:
  keys = jax.random.split(jax.random.key(step), 3)
  params = {
    "layers": {
      "kernel": jax.random.normal(keys[0], (width, 16)),
      "bias": jax.random.normal(keys[1], (16,)),
    },
    "half": jax.random.normal(keys[2], (8,), jnp.bfloat16),
    "empty": {},
  }
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
  )
  ema = jax.tree.map(lambda x: -x, params)
  return State(jnp.int32(step), params, ema, tx.init(params))


def bits(tree) -> list:
  return [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def open_checkpoints(folder, **kwargs):
  return contextlib.closing(checkpoints.Checkpoints(folder, **kwargs))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A run with steps 1 and 2; copied by the tests that change it."""
  folder = tmp_path_factory.mktemp("run") / "checkpoints"
  with open_checkpoints(folder) as store:
    for step in (1, 2):
      store.save(step, make_state(step), {"position": step * 10, "rate": 0.1})
  return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
  shutil.copytree(saved, tmp_path / "checkpoints")
  return tmp_path / "checkpoints"


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
  """Our warnings; orbax logs through the same module."""
  lines: list[str] = []

  def keep(text, *args):
    if text.startswith("Skipping"):
      lines.append(text % args)

  monkeypatch.setattr(checkpoints.logging, "warning", keep)
  return lines


def data_file(folder: pathlib.Path, step: int) -> pathlib.Path:
  files = (folder / str(step) / "state").rglob("d/*")
  return max(files, key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path, position: int) -> None:
  data = bytearray(path.read_bytes())
  data[position] ^= 1 << position % 8
  path.write_bytes(bytes(data))


def test_round_trip_is_bit_exact_and_keeps_the_tree(saved):
  template = jax.eval_shape(lambda: make_state(0))
  with open_checkpoints(saved, read_only=True) as store:
    restored = store.restore_latest(template)
  assert restored is not None
  assert (restored.step, restored.meta) == (2, {"position": 20, "rate": 0.1})
  assert jax.tree.structure(restored.state) == jax.tree.structure(make_state(2))
  assert bits(restored.state) == bits(make_state(2))


def test_result_takes_the_sharding_of_the_template(saved):
  devices = jax.devices()[:2]
  mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
  template = jax.device_put(make_state(0), NamedSharding(mesh, PartitionSpec()))
  with open_checkpoints(saved, read_only=True) as store:
    restored = store.restore_latest(template)
  assert restored is not None and bits(restored.state) == bits(make_state(2))
  shardings = {x.sharding for x in jax.tree.leaves(restored.state)}
  assert shardings == {NamedSharding(mesh, PartitionSpec())}


def test_nothing_saved_is_none(tmp_path):
  with open_checkpoints(tmp_path / "new") as store:
    assert store.latest_step() is None
    assert store.restore_latest(make_state(0)) is None


def test_donating_the_state_after_save_does_not_change_the_file(tmp_path):
  state = {"x": jnp.arange(300_000.0)}
  before = bits(state)
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  with open_checkpoints(tmp_path) as store:
    store.save(1, state, {})
    overwrite(state)["x"].block_until_ready()
    restored = store.restore_latest(jax.eval_shape(lambda: {"x": jnp.zeros(300_000)}))
  assert restored is not None and bits(restored.state) == before


def test_flipped_bytes_are_never_silently_wrong(folder):
  """Every file of the step, several bytes each: refused, or bit-identical all the same."""
  refused = set()
  template = jax.eval_shape(lambda: make_state(0))
  expected = bits(vars(make_state(2)))
  step = folder / "2"
  with open_checkpoints(folder, read_only=True) as store:
    for path in sorted(p for p in step.rglob("*") if p.is_file()):
      data = path.read_bytes()
      for position in random.Random(1).sample(range(len(data)), min(5, len(data))):
        flip(path, position)
        try:
          restored = store.restore_part(vars(template), step=2)
          assert bits(restored.state) == expected, path
          assert restored.meta == {"position": 20, "rate": 0.1}, path
        except checkpoints.DamagedError:
          refused.add(path)
        path.write_bytes(data)
    assert store.restore_latest(template).step == 2
  assert data_file(folder, 2) in refused
  assert step / "meta" / "metadata" in refused


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty", "record"])
def test_damaged_newest_step_falls_back_and_can_be_saved_again(folder, warnings, damage):
  path = data_file(folder, 2)
  if damage == "flip":
    flip(path, path.stat().st_size // 2)
  elif damage == "cut":
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif damage == "gone":
    path.unlink()
  elif damage == "empty":
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
  elif damage == "record":
    record = folder / "2" / "meta" / "metadata"
    record.write_text(record.read_text().replace('"position": 20', '"position": 21'))
  with open_checkpoints(folder) as store:
    restored = store.restore_latest(make_state(0))
    assert restored is not None and restored.step == 1
    assert bits(restored.state) == bits(make_state(1))
    assert len(warnings) == 1 and warnings[0].startswith("Skipping the checkpoint of step 2: ")
    assert store.latest_step() == 1
    assert (folder / "2.damaged-0").is_dir()
    store.save(2, make_state(7), {"position": 70})
    again = store.restore_latest(make_state(0))
  assert again is not None and (again.step, again.meta) == (2, {"position": 70})
  assert bits(again.state) == bits(make_state(7))


def test_all_damaged_is_an_error_that_moves_nothing(folder, warnings):
  for step in (1, 2):
    data_file(folder, step).unlink()
  with open_checkpoints(folder) as store:
    with pytest.raises(checkpoints.DamagedError, match=r"every checkpoint in .* rename it"):
      store.restore_latest(make_state(0))
  assert len(warnings) == 2 and not list(folder.glob("*.damaged-*"))


def test_read_only_moves_and_saves_nothing(folder, warnings):
  flip(data_file(folder, 2), 1000)
  with open_checkpoints(folder, read_only=True) as store:
    restored = store.restore_latest(make_state(0))
    assert restored is not None and restored.step == 1 and len(warnings) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    with pytest.raises(RuntimeError, match="read_only"):
      store.save(3, make_state(3), {})


def test_memory_running_out_is_no_damage(folder, monkeypatch):
  def fail(*_, **__):
    raise RuntimeError("while reading") from jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

  monkeypatch.setattr(checkpoints.ocp.PyTreeCheckpointHandler, "restore", fail)
  with open_checkpoints(folder) as store, pytest.raises(RuntimeError, match="while reading"):
    store.restore_latest(make_state(0))
  assert not list(folder.glob("*.damaged-*"))


def test_another_width_names_the_leaf_the_shapes_and_the_fix(folder):
  with open_checkpoints(folder) as store:
    with pytest.raises(ValueError) as error:
      store.restore_latest(make_state(0, width=64))
  assert not isinstance(error.value, checkpoints.DamagedError)
  assert "params/layers/kernel was saved as float32[48, 16], expected float32[64, 16]" in str(
    error.value
  )
  assert f"made with, {folder.parent / 'config.json'}" in str(error.value)
  assert not list(folder.glob("*.damaged-*"))


@pytest.mark.parametrize("change", ["dtype", "missing", "extra"])
def test_other_leaves_are_a_mismatch(saved, change):
  params = dict(make_state(0).ema)
  if change == "dtype":
    params["half"] = params["half"].astype(jnp.float32)
    message = r"ema/half was saved as bfloat16\[8\], expected float32\[8\]"
  elif change == "missing":
    params.pop("half")
    message = r"ema/half was saved as bfloat16\[8\], expected absent"
  else:
    params["new"] = jnp.zeros(3)
    message = r"ema/new was saved as absent, expected float32\[3\]"
  with open_checkpoints(saved, read_only=True) as store:
    with pytest.raises(ValueError, match=message):
      store.restore_part({"ema": params})


def test_part_of_a_chosen_step(saved):
  with open_checkpoints(saved, read_only=True) as store:
    part = store.restore_part({"ema": make_state(0).ema}, step=1)
    assert part.step == 1 and bits(part.state["ema"]) == bits(make_state(1).ema)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* it has \[2, 1\]"):
      store.restore_part({"ema": make_state(0).ema}, step=5)


def test_missing_folder_says_what_to_do(tmp_path):
  with pytest.raises(FileNotFoundError, match="train first, or point --workdir at the run"):
    checkpoints.Checkpoints(tmp_path / "none", read_only=True)
  with open_checkpoints(tmp_path) as store:
    with pytest.raises(FileNotFoundError, match="train first"):
      store.restore_part({"ema": {}})


def test_keeps_the_last_and_every_nth_step(tmp_path):
  with open_checkpoints(tmp_path, keep=2, keep_every=4) as store:
    for step in range(3, 10):
      store.save(step, {"x": jnp.ones(2)}, {})
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 9]


def test_a_step_is_never_skipped_in_silence(folder):
  with open_checkpoints(folder) as store:
    for step in (1, 2):
      with pytest.raises(ValueError, match=f"cannot save step {step}: .* already holds step 2"):
        store.save(step, make_state(step), {})


def test_leaves_that_are_no_arrays_are_refused(tmp_path):
  with open_checkpoints(tmp_path) as store:
    with pytest.raises(ValueError, match="name is a str"):
      store.save(1, {"name": "md4", "x": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match="key is a"):
      store.save(1, {"key": jax.random.key(0)}, {})


def test_record_is_json_that_a_person_can_read(saved):
  record = json.loads((saved / "2" / "meta" / "metadata").read_text())
  assert record["meta"] == {"position": 20, "rate": 0.1}
  assert record["leaves"]["params/layers/kernel"][:2] == [[48, 16], "float32"]


TWO_PROCESSES = """
import pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
index = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, index)
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from md4vmd.checkpoints import Checkpoints
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
make = jax.jit(lambda v: {"x": jnp.arange(8000.0).reshape(8, 1000) * v}, out_shardings=split)
folder = pathlib.Path(sys.argv[3])
store = Checkpoints(folder)
for step in (1, 2):
  store.save(step, make(step), {"position": step})
store.wait()
if index == 0:
  for path in (folder / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:100])
multihost_utils.sync_global_devices("damaged")
first = store.restore_latest(make(0))
store.save(2, make(7), {"position": 70})
again = store.restore_latest(make(0))
store.close()
print("RESULT", first.step, again.step, again.meta, bool((again.state["x"] == make(7)["x"]).all()))
"""


def test_two_processes_fall_back_together_when_one_cannot_read(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
  commands = [
    [sys.executable, "-c", TWO_PROCESSES, str(i), port, str(tmp_path / "checkpoints")]
    for i in range(2)
  ]
  root = pathlib.Path(__file__).parents[1]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  processes = [subprocess.Popen(command, cwd=root, **pipes) for command in commands]
  try:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for output in outputs:
    assert "RESULT 1 2 {'position': 70} True" in output, output[-3000:]
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
    "1", "2", "2.damaged-0",
  ]  # fmt: skip
