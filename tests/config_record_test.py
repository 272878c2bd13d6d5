import hashlib

import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from md4vmd import config_record
from tests import shrunken
from tests.shrunken import set_in


@pytest.fixture
def config():
  return shrunken.config("synthetic", "pairs")


def test_the_hash_of_a_config_is_that_of_its_settings_in_alphabetical_order():
  config = ConfigDict({"b": {"y": (1, 2), "x": "z"}, "a": placeholder(int)})
  text = b'{"a": null, "b": {"x": "z", "y": [1, 2]}}'
  assert config_record.config_hash(config) == hashlib.sha256(text).hexdigest()[:12]


def test_the_hash_of_a_config_changes_with_every_setting(config):
  hashes = {config_record.config_hash(config)}
  flat = traverse_util.flatten_dict(config_record.plain(config), sep=".")
  for count, (key, value) in enumerate(flat.items(), 2):
    changed = shrunken.config("synthetic", "pairs").unlock()
    section, _, leaf = key.rpartition(".")
    target = changed
    for part in section.split(".") if section else []:
      target = target[part]
    with target.ignore_type():
      target[leaf] = "something else" if value != "something else" else 0
    hashes.add(config_record.config_hash(changed))
    assert len(hashes) == count, key


@pytest.mark.parametrize(
  "key, value",
  [
    ("seed", 1),
    ("data.distribution", "d1"),
    ("schedule.name", "cosine"),
    ("network.width", 32),
    ("objective.estimator", "time"),
  ],
)
def test_another_model_or_data_is_another_run(config, key, value):
  recorded = config_record.plain(config)
  section, _, leaf = key.rpartition(".")
  before = recorded[section][leaf] if section else recorded[leaf]
  set_in(config, key, value)
  with pytest.raises(ValueError) as caught:
    config_record.changes(config, recorded)
  message = str(caught.value)
  assert f"config.{key}={before} and this one has {value}" in message
  assert "--workdir" in message


def test_parameters_of_another_network_of_equal_shapes_are_refused(config):
  recorded = config_record.plain(config)
  config.network.update({"dtype": "bfloat16", "dropout": 0.1})
  config_record.check_network(
    config_record.plain(config), recorded, "it"
  )  # how it computes may change
  config.network.heads = 1
  before = recorded["network"]["heads"]
  with pytest.raises(ValueError, match=rf"it was trained with config.network.heads={before} and"):
    config_record.check_network(config_record.plain(config), recorded, "it")


@pytest.mark.parametrize(
  "key, value",
  [
    ("run.log_every", 1),
    ("run.steps", 1000),
    ("sampler.name", "margin"),
    ("evaluators.likelihood.draws", 3),
    ("mesh.fsdp", -1),
    ("optimizer.learning_rate", 1.0),
  ],
)
def test_the_settings_around_a_model_may_change_and_are_told(config, key, value):
  recorded = config_record.plain(config)
  assert config_record.changes(config, recorded) == {}
  before = traverse_util.flatten_dict(recorded, sep=".")[key]
  set_in(config, key, value)
  assert config_record.changes(config, recorded) == {f"config.{key}": (before, value)}


def test_a_key_that_the_recorded_run_lacks_makes_another_run(config):
  recorded = config_record.plain(config)
  del recorded["network"]["mlp"]
  with pytest.raises(ValueError, match=r"config\.network\.mlp=None and this one has swiglu"):
    config_record.changes(config, recorded)


def test_how_data_are_made_and_checked_may_change(config):
  config.data = {"name": "tokens", "prepare": "--tokenizer bytes", "verify": True}
  recorded = config_record.plain(config)
  del recorded["data"]["prepare"]
  config.data.verify = False
  changed = config_record.changes(config, recorded)
  assert changed.keys() == {"config.data.prepare", "config.data.verify"}
