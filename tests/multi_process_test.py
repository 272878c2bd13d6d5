"""Runs of several processes that meet over loopback, beside the same run of a single one."""

import json
import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from md4vmd import build, evaluators, partitioning, processes, sample, train, train_state
from md4vmd.checkpoints import Checkpoints
from md4vmd.fingerprints import by_name
from md4vmd.writers import read_metrics
from tests import commands, shrunken

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, FOR_EVER = 20, 5000
SETTINGS = {
  "data.length": 16,
  "network.width": 16,
  "network.depth": 1,
  "network.heads": 2,
  "optimizer.warmup_steps": 2,
  "optimizer.shape": "constant",
  "run.batch_size": 16,
  "run.log_every": 1,
  "run.checkpoint_every": 1,
  "run.keep": 1000,
  "evaluators.likelihood.draws": 1,
  "sampler.steps": 3,
  "sampler.count": 3,
}
DEVICES = 2  # of each process
# Every evaluator has its turn, with the settings that differ from the shrunken ones.
EVALUATED = {
  ("synthetic", "pairs"): {
    "exact": {"steps": (2,)},
    "any_order": {},
    "blocks": {"cells": ((1, 1),)},
  },
  ("synthetic", "vmd-pairs"): {"latent": {}},
  ("text8", "genmd4"): {"token_power": {}},
  ("sudoku", "4x4"): {"likelihood": {}, "sudoku": {"orders": ("margin",), "splits": ("valid",)}},
  ("owt", "small"): {"likelihood": {}, "zero_shot": {}, "answers": {}},
}
DATA = {"text8": "words.txt", "owt": "prepared"}  # of a folder of `measured`
SAMPLED = ("sudoku", "4x4")


def make_config(path):
  config = shrunken.config("text8", path=path)
  config.update_from_flattened_dict(SETTINGS)
  return config


class Pod:
  """Commands that are the processes of one run."""

  def __init__(self, server, workdir, count, *, steps, fsdp=2, tensor=1):
    arguments = [
      "--config=configs/text8.py",
      f"--config.data.path={server.folder}/words.txt",
      f"--workdir={workdir}",
      f"--config.run.steps={steps}",
      "--config.run.then=()",
      f"--config.mesh.fsdp={fsdp}",
      f"--config.mesh.tensor={tensor}",
      *(f"--config.{key}={value}" for key, value in SETTINGS.items()),
    ]
    port = free_port()
    self.members = []
    for process in range(count):
      place = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={process}"]
      self.members.append(server.start([*arguments, *(place if count > 1 else [])], DEVICES))

  def succeed(self):
    """What they printed."""
    return [member.succeed() for member in self.members]


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  made = commands.Commands(tmp_path_factory.mktemp("commands"))
  shrunken.write_text(made.folder)
  yield made
  made.close()


@pytest.fixture(scope="module")
def one(server, tmp_path_factory):
  """Workdir of the run of one process."""
  workdir = tmp_path_factory.mktemp("one")
  Pod(server, workdir, 1, steps=STEPS, fsdp=1).succeed()
  return workdir


def is_saved(workdir, step):
  return lambda: (workdir / f"checkpoints/{step}").is_dir()


@pytest.fixture(scope="module")
def killed(server, tmp_path_factory):
  """(workdir, status, stderr, seconds until the other had left) of two, one of them killed."""
  workdir = tmp_path_factory.mktemp("killed")
  left, lost = Pod(server, workdir, 2, steps=FOR_EVER).members
  left.wait_until(is_saved(workdir, 4))
  lost.kill()
  start = time.monotonic()
  status, _, err = left.finish(timeout=90)
  assert lost.finish()[0] == -signal.SIGKILL
  return workdir, status, err, time.monotonic() - start


def saved_steps(workdir):
  return sorted(
    int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
  )


@pytest.fixture(scope="module")
def stopped(server, killed, tmp_path_factory):
  """(workdir, [(status, stdout)]) of two that go on from step 2, one of them asked to stop."""
  workdir = tmp_path_factory.mktemp("stopped") / "run"
  shutil.copytree(killed[0], workdir)
  for step in saved_steps(workdir):
    if step > 2:
      shutil.rmtree(workdir / f"checkpoints/{step}")
  pod = Pod(server, workdir, 2, steps=FOR_EVER)
  pod.members[0].wait_until(is_saved(workdir, 6))
  pod.members[1].send_signal(signal.SIGTERM)
  return workdir, [member.finish()[:2] for member in pod.members]


@pytest.fixture(scope="module")
def four(server, stopped, tmp_path_factory):
  """(workdir, what they printed) of four that end, on another mesh, what two began."""
  workdir = tmp_path_factory.mktemp("four") / "run"
  shutil.copytree(stopped[0], workdir)
  for step in saved_steps(workdir):
    if step > 7:
      shutil.rmtree(workdir / f"checkpoints/{step}")
  return workdir, Pod(server, workdir, 4, steps=STEPS, fsdp=4, tensor=2).succeed()


def saved_state(workdir, step):
  """The saved state as arrays by name."""
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  data = json.loads((workdir / "config.json").read_text())["data"]
  model = build.model(make_config(data["path"]))
  with partitioning.use(model.mesh):
    template = train_state.abstract(model)
    names = ("step", "params", "ema", "optimizer_state")
    restored = checkpoints.restore_part({name: getattr(template, name) for name in names}, step)
  checkpoints.close()
  leaves = {name: np.asarray(leaf) for name, leaf in by_name(restored.state).items()}
  return leaves | {"position": np.asarray(restored.meta["position"])}


def distance(tree, expected, part):
  """Relative distance of the arrays whose names contain the part."""
  names = [name for name in expected if part in name]
  assert names
  flat = lambda of: np.concatenate([of[name].ravel() for name in names]).astype(np.float64)
  return np.linalg.norm(flat(tree) - flat(expected)) / np.linalg.norm(flat(expected))


def figures_of(workdir, name):
  return np.array([line[name] for line in read_metrics(workdir) if name in line])


def test_the_first_step_of_two_processes_is_that_of_one(killed, one):
  for name in ("train/loss_nats_per_token", "train/gradient_norm"):
    assert figures_of(killed[0], name)[0] == pytest.approx(figures_of(one, name)[0], rel=1e-6)
  # AdamW's first moment is linear in the gradient.
  two, expected = saved_state(killed[0], 1), saved_state(one, 1)
  assert distance(two, expected, "/mu/") < 1e-6
  assert distance(two, expected, "params/") < 1e-6


def test_twenty_steps_of_two_processes_and_then_of_four_are_those_of_one(four, one):
  for name in ("train/loss_nats_per_token", "train/gradient_norm", "train/nelbo_bits_per_token"):
    ours, expected = figures_of(four[0], name), figures_of(one, name)
    assert len(expected) == STEPS
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
  ours, expected = saved_state(four[0], STEPS), saved_state(one, STEPS)
  assert ours["position"] == expected["position"] == STEPS * SETTINGS["run.batch_size"]
  assert distance(ours, expected, "params/") < 1e-4
  assert distance(ours, expected, "ema/") < 1e-4


def test_a_process_leaves_with_a_line_within_a_minute_when_another_is_killed(killed):
  _, status, err, seconds = killed
  assert status not in (0, train.PREEMPTED)
  assert seconds < 60
  lines = ("error: process 0 of 2: ", "another task died")  # ours, or that of jax's service
  assert any(line in err for line in lines), err


def test_the_run_goes_on_bit_for_bit_from_what_a_killed_one_had_saved(killed, stopped):
  for step in (3, 4):
    again, before = saved_state(stopped[0], step), saved_state(killed[0], step)
    assert again.keys() == before.keys() and len(before) > 40
    assert not [name for name in before if again[name].tobytes() != before[name].tobytes()]


def test_sigterm_to_one_lets_all_save_the_same_step(stopped):
  workdir, ends = stopped
  assert [status for status, _ in ends] == [train.PREEMPTED] * 2
  (line,) = [line for line in ends[0][1].splitlines() if line.startswith("Stopping at step")]
  last = int(line.split()[3])
  assert last == saved_steps(workdir)[-1] < FOR_EVER
  assert len(figures_of(workdir, "train/gradient_norm")) == last
  saved_state(workdir, last)


def test_only_the_first_process_speaks_and_writes(four):
  workdir, printed = four
  assert "Continuing from step 7." in printed[0] and "step 20/20" in printed[0]
  for text in printed[1:]:  # gloo says there who is connected, from several threads at once
    assert not any(ours in text for ours in ("step", "Continuing", "Data:", "Network:"))
  lines = [line["step"] for line in read_metrics(workdir)]
  assert lines == list(range(1, STEPS + 1))


def random_params(model):
  """Parameters on the model's mesh, the same on every process, without compiling an initializer."""
  rng, template = np.random.default_rng(0), train_state.abstract(model).params
  draw = lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
  return partitioning.put_like(jax.tree.map(draw, template), template)


def measure(folder, mesh, devices=None):
  """{config and evaluator: figures} of random parameters, and samples."""
  found, folder = {}, pathlib.Path(folder)
  for (name, variant), settings in EVALUATED.items():
    config = shrunken.config(name, variant, folder, str(folder / DATA.get(name, "")))
    config.mesh.update(mesh)
    old = config.evaluators.to_dict()
    config.evaluators = ConfigDict(
      {kind: old.get(kind, {}) | new for kind, new in settings.items()}
    )
    model = build.model(config, devices=devices)
    with partitioning.use(model.mesh):
      params = random_params(model)
      for kind, evaluator in build.evaluators(model, evaluators.TABLE).items():
        figures = evaluator.run(0, params)
        numbers = {key: each for key, each in figures.items() if isinstance(each, int | float)}
        found[f"{name}:{variant} {kind}"] = numbers
      if (name, variant) == SAMPLED:
        _, tokens_BxL, free_BxL = sample.prepare(model)
        samples = sample._run(model, params, tokens_BxL, free_BxL, None)
        found["samples"] = {"x": samples.x_BxL.tolist(), "calls": samples.calls_B.tolist()}
  return found


def measure_in_a_pod(folder, coordinator, process):
  """The job of each of two processes, whose devices take turns in the mesh."""
  processes.start(coordinator, 2, process)
  assert jax.device_count() == 2 * DEVICES
  devices, mesh = [jax.devices()[i] for i in (0, 2, 3, 1)], {"data": 2, "fsdp": 2}
  own = partitioning.share(partitioning.make_mesh(**mesh, devices=devices))["own"]
  assert own == [(0, 3), (1, 2)][process]
  found = measure(folder, mesh, devices)
  if jax.process_index() == 0:
    (pathlib.Path(folder) / "out.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(server, tmp_path_factory):
  """(figures of two processes, those of this one)."""
  folder = tmp_path_factory.mktemp("measured")
  shrunken.prepare_bytes(folder)
  coordinator = f"127.0.0.1:{free_port()}"
  function = "tests.multi_process_test.measure_in_a_pod"
  pod = [
    server.start([str(folder), coordinator, process], DEVICES, function=function)
    for process in range(2)
  ]
  alone = measure(folder, {})
  for member in pod:
    member.succeed()
  return json.loads((folder / "out.json").read_text()), alone


@pytest.mark.parametrize(
  "name", [f"{':'.join(config)} {kind}" for config in EVALUATED for kind in EVALUATED[config]]
)
def test_figures_of_a_state_are_the_same_from_two_processes(measured, name):
  ours, alone = (found[name] for found in measured)
  assert ours.keys() == alone.keys() and alone
  for figure, value in alone.items():
    rel = 0 if "nats_per_token" in figure else 1e-5
    assert ours[figure] == pytest.approx(value, rel=rel, abs=1e-5), figure


def test_samples_of_a_state_are_the_same_from_two_processes(measured):
  ours, alone = (found["samples"] for found in measured)
  assert ours == alone
