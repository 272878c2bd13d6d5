"""A run that was killed, stopped or continued is, bit for bit, the run that was not."""

import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from md4vmd import build, partitioning, train, train_state, writers
from md4vmd.checkpoints import Checkpoints
from tests import commands, shrunken

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, EVERY = 36, 6
# Randomness of every kind: augmentation, draws, dropout, microbatches; and the optimizer's state.
SETTINGS = [
  "--config.data.symmetries=True",
  "--config.data.clues_max=4",
  "--config.network.width=16",
  "--config.network.depth=1",
  "--config.network.heads=2",
  "--config.network.dropout=0.1",
  "--config.optimizer.warmup_steps=5",
  "--config.optimizer.shape=constant",  # one program for any number of steps
  "--config.run.batch_size=8",
  "--config.run.microbatches=2",
  "--config.run.log_every=1",
  "--config.run.keep=3",
  "--config.run.then=()",
]


def start(server, workdir, steps=STEPS, every=EVERY, settings=()):
  """A training command in a process of its own."""
  arguments = [
    "--config=configs/sudoku.py:4x4",
    f"--workdir={workdir}",
    f"--config.run.steps={steps}",
    f"--config.run.checkpoint_every={every}",
    *SETTINGS,
    *settings,
  ]
  return server.start(arguments)


def steps_saved(workdir):
  folder = workdir / "checkpoints"
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def is_saving_a_later_step(workdir):
  """A checkpoint is being written, and there are earlier ones to go back to."""
  folder = workdir / "checkpoints"
  unfinished = list(folder.glob("*tmp*")) if folder.exists() else []
  return bool(unfinished) and len(steps_saved(workdir)) >= 2


def has_gone_on_from_a_save(workdir):
  """Metrics of steps that no checkpoint has."""
  path, saved = workdir / "metrics.jsonl", steps_saved(workdir)
  if not path.exists() or not saved or is_saving_a_later_step(workdir):
    return False
  return path.read_text().count('"step"') > saved[-1]


def has_written_metrics(workdir):
  path = workdir / "metrics.jsonl"
  return path.exists() and path.stat().st_size > 0


MOMENTS = [is_saving_a_later_step, has_gone_on_from_a_save]


def saved_bits(workdir, step):
  """Every array of the saved state, as bytes by name, and the position of the data."""
  command = json.loads((workdir / "config.json").read_text())
  assert command["network"]["width"] == 16
  record = json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  model = build.model(shrunken_config())
  with partitioning.use(model.mesh):
    template = train_state.abstract(model)
    names = ("step", "params", "ema", "optimizer_state")
    restored = checkpoints.restore_part({name: getattr(template, name) for name in names}, step)
  checkpoints.close()
  leaves = jax.tree_util.tree_leaves_with_path(restored.state)
  bits = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
  assert len(bits) > 40
  return bits | {"position": record["meta"]["position"]}


def shrunken_config():
  config = shrunken.config("sudoku", "4x4")
  config.data.symmetries = True
  config.network.dropout = 0.1
  return config


def steps_written(workdir):
  return [line["step"] for line in writers.read_metrics(workdir)]


def check_same_end(workdir, straight):
  bits, expected = saved_bits(workdir, STEPS), saved_bits(straight, STEPS)
  assert bits.keys() == expected.keys()
  different = [name for name in expected if bits[name] != expected[name]]
  assert not different
  assert steps_written(workdir) == list(range(1, STEPS + 1))
  for ours, theirs in zip(*map(writers.read_metrics, (workdir, straight)), strict=True):
    for name in ("train/loss_nats_per_token", "train/gradient_norm", "train/learning_rate"):
      assert ours[name] == theirs[name], (ours["step"], name)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  made = commands.Commands(tmp_path_factory.mktemp("commands"))
  yield made
  made.close()


@pytest.fixture(scope="module")
def straight(tmp_path_factory, server):
  """The workdir of a run without interruption."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  start(server, workdir).succeed()
  assert steps_written(workdir) == list(range(1, STEPS + 1))
  return workdir


@pytest.fixture(scope="module")
def killed(straight, tmp_path_factory, server):
  """moment -> (workdir, steps saved and metrics written at the kill, stdout of the second run)."""

  def kill_and_continue(moment):
    workdir = tmp_path_factory.mktemp("killed") / "run"
    command = start(server, workdir)
    command.stop_when(lambda: moment(workdir))
    command.kill()
    assert command.finish()[0] == -signal.SIGKILL
    left = steps_saved(workdir), steps_written(workdir)
    return workdir, left, start(server, workdir).succeed()

  return {moment: kill_and_continue(moment) for moment in MOMENTS}


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_run_killed_at_any_moment_ends_as_the_straight_run(killed, straight, moment):
  workdir, (saved, written), said = killed[moment]
  assert saved[-1] < STEPS
  assert f"Continuing from step {saved[-1]}." in said
  if moment is has_gone_on_from_a_save:
    assert written[-1] > saved[-1]
  check_same_end(workdir, straight)


def test_a_run_stopped_by_sigterm_saves_its_step_and_ends_as_the_straight_run(
  straight, tmp_path, server
):
  command = start(server, tmp_path, every=1000)
  command.stop_when(lambda: has_written_metrics(tmp_path))
  command.send_signal(signal.SIGTERM)
  command.send_signal(signal.SIGCONT)
  status, out, _ = command.finish()
  assert status == train.PREEMPTED == 42
  stopped = int(re.search(r"Stopping at step (\d+) on SIGTERM", out)[1])
  assert stopped < STEPS
  assert steps_saved(tmp_path) == [stopped]
  assert steps_written(tmp_path) == list(range(1, stopped + 1))
  assert f"Continuing from step {stopped}." in start(server, tmp_path, every=1000).succeed()
  check_same_end(tmp_path, straight)


def test_sigterm_before_the_first_step_asks_for_the_same_command_too(tmp_path, server):
  command = start(server, tmp_path)
  command.stop_when(lambda: (tmp_path / "config.json").exists())
  assert not has_written_metrics(tmp_path)
  command.send_signal(signal.SIGTERM)
  command.send_signal(signal.SIGCONT)
  status, out, err = command.finish()
  assert status == train.PREEMPTED, err
  assert "on SIGTERM" in out and "Traceback" not in err


def test_a_finished_run_that_is_started_again_stays_as_it_is(straight, server):
  before, written = saved_bits(straight, STEPS), steps_written(straight)
  assert f"Continuing from step {STEPS}." in start(server, straight).succeed()
  assert saved_bits(straight, STEPS) == before
  assert steps_written(straight) == written


def test_a_run_that_diverges_stops_with_one_line_and_finite_checkpoints(straight, tmp_path, server):
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  before = steps_saved(workdir)
  assert before == [STEPS - 2 * EVERY, STEPS - EVERY, STEPS]
  settings = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=0"]
  command = start(server, workdir, steps=STEPS + 9, every=1, settings=settings)
  status, _, err = command.finish()
  assert status == 1
  lines = [line for line in err.splitlines() if "step/s" not in line and line]
  assert len(lines) == 1, err
  folder = re.escape(str(workdir / "checkpoints" / str(STEPS)))
  assert re.match(
    rf"error: \w+ is (nan|inf) at step \d+; .*learning_rate .* from step {STEPS}, the newest "
    rf"checkpoint.* delete {folder}: the run then continues from step {STEPS - EVERY}$",
    lines[0],
  )
  assert steps_saved(workdir) == before
  for step in before:
    for name, array in saved_bits(workdir, step).items():
      if name != "position" and "step" not in name and "count" not in name:
        assert np.isfinite(np.frombuffer(array, np.float32)).all(), (step, name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The workdir of a run of 4 steps in this process."""
  workdir = tmp_path_factory.mktemp("finished")
  train.train(tiny_config(), workdir)
  return workdir


def tiny_config():
  config = shrunken.config("synthetic", "pairs")
  config.run.update({"steps": 4, "checkpoint_every": 4})
  return config


@pytest.fixture
def trained(finished, tmp_path):
  """(config, workdir) of that run, to be changed."""
  shutil.copytree(finished, tmp_path / "run")
  return tiny_config(), tmp_path / "run"


def test_another_model_in_the_same_workdir_is_refused_with_both_values(trained):
  config, workdir = trained
  before = (workdir / "metrics.jsonl").read_bytes(), (workdir / "config.json").read_bytes()
  config.network.width = 32
  with pytest.raises(ValueError, match=r"config.network.width=16 and this one has 32"):
    train.train(config, workdir)
  assert before == (
    (workdir / "metrics.jsonl").read_bytes(),
    (workdir / "config.json").read_bytes(),
  )


@pytest.mark.parametrize(
  "key, value",
  [
    ("evaluators.likelihood.draws", 0),
    ("evaluators.likelihood.split", "test"),
    ("run.batch_size", 24),  # 32 examples are used
  ],
)
def test_a_config_that_is_refused_leaves_no_trace_in_a_run(trained, capsys, key, value):
  config, workdir = trained
  contents = lambda: {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  before = contents()
  shrunken.set_in(config, key, value)
  with pytest.raises(ValueError):
    train.train(config, workdir)
  assert contents() == before
  train.train(tiny_config(), workdir)
  assert "Changed" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"seed": ', "[1]"])
def test_a_damaged_config_is_named(trained, text):
  config, workdir = trained
  (workdir / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"run/config\.json is damaged .*; delete it"):
    train.train(config, workdir)


def evaluations(workdir):
  """Step and bound of every evaluation in training, in order."""
  name = "likelihood/valid/nelbo_bits_per_token"
  return [(line["step"], line[name]) for line in writers.read_metrics(workdir) if name in line]


def evaluated_config():
  config = tiny_config()
  config.run.update({"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "keep": 2})
  return config


@pytest.fixture(scope="module")
def finished_with_evaluations(tmp_path_factory):
  """The workdir of a run that was evaluated at steps 2 and 4."""
  workdir = tmp_path_factory.mktemp("evaluated")
  train.train(evaluated_config(), workdir)
  return workdir


@pytest.fixture
def evaluated(finished_with_evaluations, tmp_path):
  """(config, workdir) of that run, to be changed."""
  shutil.copytree(finished_with_evaluations, tmp_path / "run")
  return evaluated_config(), tmp_path / "run"


def test_an_evaluation_that_a_kill_prevented_follows_when_the_run_goes_on(evaluated):
  config, workdir = evaluated
  expected = evaluations(workdir)
  assert [step for step, _ in expected] == [2, 4]
  for path in [*workdir.glob("checkpoints/4"), workdir / "eval"]:
    shutil.rmtree(path)
  file = workdir / "metrics.jsonl"
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  kept = [line for line in lines if line["step"] <= 2 and "train/gradient_norm" in line]
  file.write_text("".join(json.dumps(line) + "\n" for line in kept))
  train.train(config, workdir)
  assert evaluations(workdir) == expected
  assert (workdir / "eval/2-likelihood.json").is_file()


def test_an_evaluation_that_was_done_is_not_done_again(evaluated):
  config, workdir = evaluated
  shutil.rmtree(workdir / "checkpoints/4")
  expected = evaluations(workdir)
  (workdir / "eval/2-likelihood.json").unlink()
  train.train(config, workdir)
  assert evaluations(workdir) == expected
  assert not (workdir / "eval/2-likelihood.json").exists()


def test_sigterm_ends_an_evaluation_in_training_at_once(tmp_path, monkeypatch):
  config, begun = evaluated_config(), []

  def interrupted(*arguments, **about):
    begun.append(arguments[3])
    signal.raise_signal(signal.SIGTERM)
    raise AssertionError("the evaluation went on")

  monkeypatch.setattr(train.evaluate, "run_all", interrupted)
  with pytest.raises(train.Preempted):
    train.train(config, tmp_path / "run")
  assert begun == [2] and steps_saved(tmp_path / "run") == [2]


def test_a_save_that_a_kill_cut_short_is_no_checkpoint(trained):
  config, workdir = trained
  folder = workdir / "checkpoints"
  for path in folder.iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  (folder / "3.orbax-checkpoint-tmp-0").mkdir()
  config.seed += 1
  train.train(config, workdir)
  assert writers.read_config(workdir)["seed"] == config.seed


def test_a_run_goes_on_without_the_file_that_it_started_from(trained, tmp_path):
  config, workdir = trained
  config.run.update({"initial": str(tmp_path / "deleted.safetensors"), "steps": 5})
  train.train(config, workdir)
  assert steps_saved(workdir)[-1] == 5


def test_a_workdir_in_which_nothing_was_trained_takes_another_model(trained):
  config, workdir = trained
  for path in (workdir / "checkpoints").iterdir():
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  config.seed += 1
  train.train(config, workdir)
  assert writers.read_config(workdir)["seed"] == config.seed
  assert steps_saved(workdir)[-1] == config.run.steps


def test_other_times_of_logging_and_saving_are_accepted_and_recorded(trained):
  config, workdir = trained
  config.run.update({"steps": 7, "log_every": 1, "checkpoint_every": 5})
  train.train(config, workdir)
  assert steps_written(workdir) == [2, 4, 5, 6, 7]
  assert steps_saved(workdir) == [4, 5, 7]
  assert writers.read_config(workdir)["run"]["log_every"] == 1


def test_another_batch_size_goes_on_from_where_the_data_was(trained):
  config, workdir = trained
  position = lambda step: json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())[
    "meta"
  ]["position"]
  assert position(4) == 4 * 8
  config.run.update({"steps": 6, "batch_size": 16})
  train.train(config, workdir)
  assert position(6) == 4 * 8 + 2 * 16
