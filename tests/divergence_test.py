"""What a run says that stops at a number that is not finite, and that it can go on as it says."""

import re
import shutil

import pytest

from md4vmd import train
from md4vmd.checkpoints import Checkpoints
from tests import shrunken

pytestmark = pytest.mark.usefixtures("quick_compilation")


def start(workdir, **changes):
  """Trains 4 steps unless the changes say otherwise."""
  config = shrunken.config("synthetic", "pairs")
  config.run.update({"steps": 4, "checkpoint_every": 4} | changes)
  train.train(config, workdir)


def diverge(workdir, **changes):
  """The message of a run whose first step has finite figures and leads to a state that has none."""
  config = shrunken.config("synthetic", "pairs")
  config.optimizer.update({"learning_rate": 1e15, "warmup_steps": 0})
  config.run.update({"steps": 9, "checkpoint_every": 1} | changes)
  with pytest.raises(train.DivergedError) as caught:
    train.train(config, workdir)
  return str(caught.value)


def steps_saved(workdir):
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  steps = checkpoints.steps()
  checkpoints.close()
  return steps


def test_a_first_run_that_diverges_says_that_nothing_was_saved(tmp_path):
  message = diverge(tmp_path, checkpoint_every=9)
  assert message.endswith("run again. No checkpoint was saved: the run starts anew")
  assert steps_saved(tmp_path) == []


def test_a_run_whose_only_checkpoint_is_ruined_starts_anew_without_it(tmp_path):
  message = diverge(tmp_path)
  assert message.endswith(f"delete {tmp_path / 'checkpoints/1'}: the run then starts anew")


def test_a_run_that_is_ruined_goes_on_from_the_step_before_as_the_message_says(tmp_path):
  start(tmp_path)
  message = diverge(tmp_path)
  assert steps_saved(tmp_path) == [5, 4]
  words = r" from step 5, the newest .* delete (\S+): the run then continues from step 4$"
  said = re.search(words, message)
  assert said is not None
  with pytest.raises(train.DivergedError):
    start(tmp_path, steps=9)
  shutil.rmtree(said[1])
  start(tmp_path, steps=9)
  assert steps_saved(tmp_path)[0] == 9
