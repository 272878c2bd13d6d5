import dataclasses
import importlib
import re

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from md4vmd import build, evaluators, networks
from tests import shrunken
from tests.shrunken import set_in


@pytest.fixture
def config():
  return shrunken.config("synthetic", "pairs")


@pytest.mark.parametrize(
  "key, value, words",
  [
    ("network.widht", 8, ["network 'transformer'", "'widht'", "did you mean 'width'"]),
    ("run.log_evrey", 8, ["run takes no 'log_evrey'", "did you mean 'log_every'"]),
    ("optimizer.learnig_rate", 1.0, ["optimizer", "did you mean 'learning_rate'"]),
    ("mesh.fsdq", 1, ["mesh takes no 'fsdq'", "did you mean 'fsdp'"]),
    ("sampler.temprature", 1.0, ["sampler 'ancestral'", "did you mean 'temperature'"]),
    ("objective.estimater", "time", ["objective 'md4'", "did you mean 'estimator'"]),
    ("data.distributoin", "d1", ["data 'synthetic'", "did you mean 'distribution'"]),
    ("schedule.power", 2.0, ["schedule 'linear' takes no 'power'", "it has no settings"]),
    ("optimiser", {"ema": 0.5}, ["no section 'optimiser'", "did you mean 'optimizer'"]),
  ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(config, key, value, words):
  set_in(config, key, value)
  with pytest.raises(ValueError) as caught:
    build.model(config)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
  "section, name, close",
  [
    ("data", "syntetic", "synthetic"),
    ("schedule", "cosin", "cosine"),
    ("network", "transfomer", "transformer"),
    ("objective", "mdd4", "md4"),
    ("sampler", "margins", "margin"),
  ],
)
def test_an_unknown_name_is_answered_with_the_nearest_entry_of_the_table(
  config, section, name, close
):
  set_in(config, f"{section}.name", name)
  with pytest.raises(ValueError, match=f"{section}: there is no '{name}'; did you mean '{close}'"):
    build.model(config)


def test_an_unknown_evaluator_and_settings_against_its_rules_are_errors(config):
  set_in(config, "evaluators.exakt", {"steps": (1,)})
  with pytest.raises(ValueError, match="evaluators: there is no 'exakt'; did you mean 'exact'"):
    build.evaluators(build.model(config), evaluators.TABLE)
  with config.unlocked():
    del config.evaluators.exakt
  set_in(config, "evaluators.likelihood.drawz", 4)
  with pytest.raises(ValueError, match=r"evaluators\.likelihood takes no 'drawz'.*'draws'"):
    build.evaluators(build.model(config), evaluators.TABLE)
  with config.unlocked():
    del config.evaluators.likelihood.drawz
  set_in(config, "evaluators.likelihood.limit", 0)
  with pytest.raises(ValueError, match=r"evaluators\.likelihood\.limit is 0; .* at least 1"):
    build.evaluators(build.model(config), evaluators.TABLE)


@pytest.mark.parametrize(
  "name, settings, rule",
  [
    ("sudoku", {"orders": ("margn",)}, ".orders: there is no 'margn'; did you mean 'margin'?"),
    ("sudoku", {"orders": ("token_ancestral",)}, ".orders: there is no 'token_ancestral'"),
    ("sudoku", {"calls": (2, 0)}, ".calls is (2, 0); each must be at least 1"),
    ("sudoku", {"grid": "log"}, ".grid: there is no 'log'; known: uniform, cosine"),
    ("sudoku", {"temperature": -1.0}, ".temperature is -1.0; it must be at least 0"),
    ("sudoku", {"splits": ("held",)}, ".splits: split 'held' does not exist: use one of train,"),
    ("exact", {"steps": (0,)}, ".steps is (0,); each must be at least 1"),
    ("exact", {"grid": "log"}, ".grid: there is no 'log'; known: uniform, cosine"),
    ("blocks", {"cells": ((1, 0),)}, ".cells is ((1, 0),); each must be at least 1"),
    ("blocks", {"cells": ((3, 3),)}, ".cells: 2 tokens cannot be decoded in 3 equal blocks"),
    ("likelihood", {"draws": 0}, ".draws is 0; it must be at least 1"),
    ("likelihood", {"split": "test"}, ".split: split 'test' does not exist: use one of train,"),
  ],
)
def test_a_setting_of_an_evaluator_against_the_rules_is_refused_by_its_own_name(
  config, name, settings, rule
):
  if name == "sudoku":
    config = shrunken.config("sudoku", "4x4")
  config.evaluators = {name: settings}
  with pytest.raises(ValueError, match=re.escape(f"evaluators.{name}{rule}")):
    build.evaluators(build.model(config), evaluators.TABLE)


@pytest.mark.parametrize("name", ["latent", "importance_weighted", "sudoku", "likelihood", "fid"])
def test_a_split_that_the_data_lack_is_refused_before_training_by_every_evaluator(config, name):
  key, value = ("splits", ("vaild",)) if name == "sudoku" else ("split", "vaild")
  config.evaluators = {name: {key: value}}
  with pytest.raises(ValueError, match=rf"evaluators\.{name}\.{key}: split 'vaild' does not exist"):
    build.evaluators(build.model(config), evaluators.TABLE)


def test_some_of_the_evaluators_can_be_chosen(config):
  config.objective.name = "ar"
  config.network.time_conditioning = False
  with pytest.raises(ValueError, match=r"any_order fills positions .*; set run\.evaluators to"):
    build.evaluators(build.model(config), evaluators.TABLE)
  config.run.evaluators = ("likelihood",)
  assert set(build.evaluators(build.model(config), evaluators.TABLE)) == {"likelihood"}
  config.run.evaluators = ("likelyhood",)
  with pytest.raises(ValueError, match=r"run\.evaluators names 'likelyhood'; .* 'likelihood'"):
    build.model(config)


def test_a_missing_value_is_asked_for_by_name(config):
  set_in(config, "data.distribution", None)
  with pytest.raises(ValueError, match="data 'synthetic' needs a value for 'distribution'"):
    build.model(config)


def test_a_setting_of_none_leaves_the_default_of_the_constructor(config):
  config.network.condition_width = None
  config.sampler.temperature = None
  built = build.model(config)
  assert built.network.condition_width == type(built.network).condition_width
  assert built.sampling.step.temperature == type(built.sampling.step)().temperature
  config.network.condition_width = 12
  config.sampler.temperature = 0.25
  built = build.model(config)
  assert built.network.condition_width == 12
  assert built.sampling.step.temperature == 0.25


def test_every_section_reaches_the_object_that_it_names(config):
  config.seed = 7
  config.schedule.update({"name": "poly", "power": 3.0})
  config.objective.update({"estimator": "steps", "steps": 5})
  config.sampler.update({"name": "margin", "steps": 4, "count": 3})
  built = build.model(config)
  assert built.seed == 7
  assert built.schedule.power == 3.0
  assert built.objective.schedule == built.schedule
  assert (built.objective.steps, built.objective.vocab_size) == (5, 10)
  assert (built.network.width, built.network.vocab_size) == (16, 10)
  assert (built.sampling.step.score, built.sampling.count) == ("margin", 3)
  assert built.sampling.times.shape == (5,)
  assert built.optimizer.steps == built.run.steps == shrunken.STEPS
  assert set(build.evaluators(built, evaluators.TABLE)) == {"likelihood", "exact", "any_order"}


@pytest.mark.parametrize(
  "change, rule",
  [
    ({"run.steps": 0}, "run.steps is 0; it must be at least 1"),
    ({"run.batch_size": -2}, "run.batch_size is -2; it must be at least 1"),
    ({"run.microbatches": 3}, "run.batch_size 8 is not a multiple of run.microbatches 3"),
    ({"run.then": ("evalute",)}, "run.then names 'evalute'"),
    ({"sampler.count": 0}, "sampler.count is 0; it must be at least 1"),
    ({"sampler.steps": 0}, "sampler steps is 0; it must be at least 1"),
    ({"sampler.grid": "log"}, "sampler grid is 'log'; it must be one of uniform, cosine"),
    ({"sampler.top_p": 1.5}, "sampler top_p is 1.5"),
    ({"optimizer.warmup_steps": 6}, "warmup_steps 6 must be below run.steps 6"),
    ({"optimizer.shape": "linear"}, "shape 'linear' must be one of constant, cosine"),
    ({"network.heads": 3}, "network width 16 must be a multiple of twice the heads (3)"),
    ({"network.heads": 0}, "a multiple of twice the heads (0), both at least 1"),
    ({"network.width": 0}, "network width 0 must be a multiple of twice the heads"),
    ({"objective.estimator": "steps"}, "needs a number of steps"),
    ({"data.distribution": "d3"}, "distribution='d3' does not exist"),
    ({"objective.name": "genmd4"}, "set network.time_conditioning=True"),
    (
      {"objective.name": "genmd4", "network.time_conditioning": True},
      "'genmd4' is sampled by 'token_ancestral', and nothing else is",
    ),
    (
      {"sampler.name": "token_ancestral"},
      "objective 'md4' and sampler 'token_ancestral' do not fit",
    ),
    (
      {"objective.name": "genmd4", "latent.name": "gaussian"},
      "objective 'genmd4' trains no latent and latent.name is 'gaussian'; set latent.name=none",
    ),
    (
      {"objective.name": "vmd", "latent.name": "gaussian", "sampler.latent_refresh": "block"},
      "sampler.latent_refresh is 'block'",
    ),
  ],
)
def test_a_value_against_the_rules_is_refused_with_the_rule(config, change, rule):
  for key, value in change.items():
    set_in(config, key, value)
  with pytest.raises(ValueError, match=re.escape(rule)):
    build.model(config)


@pytest.mark.parametrize(
  "objective, attends",
  [({"name": "ar"}, ("left", None)), ({"block_size": 2}, ("blocks", 2)), ({}, ("all", None))],
)
def test_the_objective_says_what_the_network_sees(config, objective, attends):
  config.objective.update(objective)
  built = build.model(config)
  assert (built.network.attends, built.network.block_size) == attends
  assert built.sampling.length == built.dataset.length
  evaluates = {"exact": {}, "blocks": {"cells": ((1, 1),)}}
  built = dataclasses.replace(built, evaluators=evaluates)
  if attends[0] == "all":
    assert len(build.evaluators(built, evaluators.TABLE)) == 2
    return
  for name in evaluates:
    alone = dataclasses.replace(built, evaluators={name: evaluates[name]})
    with pytest.raises(ValueError, match=f"evaluators.{name} fills positions in any order"):
      build.evaluators(alone, evaluators.TABLE)


@pytest.mark.parametrize(
  "change, rule",
  [
    ({"objective.name": "ar", "network.time_conditioning": True}, "time_conditioning=False"),
    ({"objective.name": "ar", "latent.name": "gaussian"}, "'ar' trains no latent"),
    ({"objective.name": "ar", "sampler.length": 0}, "sampler.length is 0"),
    ({"objective.block_size": 3}, "objective.block_size 3 does not divide data.length 2"),
    ({"objective.block_size": 0}, "objective block_size is 0; it must be at least 1"),
    ({"objective.block_size": 2, "sampler.length": 7}, "does not divide sampler.length 7"),
    ({"sampler.length": 7}, "sampler.length is 7 and this network knows sequences of 2 tokens"),
    (
      {"objective.name": "ar", "network.absolute_positions": True, "sampler.length": 7},
      "sampler.length is 7 and this network knows sequences of 2 tokens",
    ),
  ],
)
def test_what_does_not_fit_decoding_from_left_to_right_is_refused(config, change, rule):
  config.network.time_conditioning = False
  test_a_value_against_the_rules_is_refused_with_the_rule(config, change, rule)


def test_a_network_that_cannot_hide_tokens_is_refused(config, monkeypatch):
  class Mixer(nn.Module):
    vocab_size: int

  monkeypatch.setitem(networks.TABLE, "mixer", Mixer)
  config.network = ConfigDict({"name": "mixer"})
  assert build.model(config).network.vocab_size == 10
  config.objective.block_size = 2
  with pytest.raises(ValueError, match="needs tokens that see 'blocks' and network 'mixer' cannot"):
    build.model(config)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_without_meaning_is_refused(config, seed):
  config.seed = seed
  with pytest.raises(ValueError, match=rf"config.seed is {seed}; it must be in"):
    build.model(config)


def test_a_latent_that_the_objective_does_not_train_is_refused(config):
  config.latent.name = "gaussian"
  with pytest.raises(ValueError, match="objective 'md4' trains no latent"):
    build.model(config)


@pytest.mark.parametrize(("name", "variant"), sorted(shrunken.LIKE_ANOTHER), ids=lambda part: part)
def test_the_variants_that_are_not_run_from_end_to_end_are_built(name, variant, tmp_path):
  built = build.model(shrunken.config(name, variant, folder=tmp_path))
  assert build.evaluators(built, evaluators.TABLE).keys() == built.evaluators.keys()


def test_the_command_line_can_set_every_key():
  """It finds a key as an attribute, where methods such as `values` come first, and needs a type."""

  def check(section):
    for key in section:
      assert not hasattr(ConfigDict, key)
      assert section.get_type(key) is not type(None), f"{key}: write placeholder(type)"
      if isinstance(section[key], ConfigDict):
        check(section[key])

  for name, variant in {*shrunken.shipped(), *shrunken.LIKE_ANOTHER}:
    module = importlib.import_module(f"configs.{name}")
    check(module.get_config(variant) if variant else module.get_config())


@pytest.mark.parametrize("name", ["any_order", "blocks"])
def test_evaluators_of_one_schedule_refuse_genmd4_before_training(config, name):
  config.objective.name = "genmd4"
  config.network.time_conditioning = True
  config.sampler.name = "token_ancestral"
  config.evaluators = {name: {}}
  with pytest.raises(ValueError, match=f"evaluators.{name} reveals tokens by one schedule"):
    build.evaluators(build.model(config), evaluators.TABLE)
