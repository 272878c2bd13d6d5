"""The pages say what is there: files, links, commands, tests, variants and working examples."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re
import shlex
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from launch import sweep
from md4vmd import build, data, main, networks, objectives, rngs, samplers, schedules, steps
from md4vmd.evaluators import TABLE as EVALUATORS
from md4vmd.interfaces import Batch, Schedule
from tests.layers_test import FLOOR

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("README.md")])
CONFIGS = {
  path.stem: importlib.import_module(f"configs.{path.stem}")
  for path in sorted(ROOT.glob("configs/*.py"))
  if path.stem not in ("__init__", "common")
}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
every_config = pytest.mark.parametrize("name", CONFIGS)


def _text(page):
  return page.read_text(encoding="utf-8")


def _tree(text):
  """Files of the listing that begins with `md4vmd/`, as paths."""
  lines = re.search(r"```text\nmd4vmd/\n(.*?)```", text, re.DOTALL).group(1).splitlines()
  files, folders = [], ["md4vmd"]
  for line in lines:
    depth = (len(line) - len(line.lstrip())) // 2
    word = line.split()[0]
    folders = folders[:depth]
    if word.endswith("/"):
      folders.append(word.rstrip("/"))
    else:
      files.append("/".join([*folders, word]))
  return files


def test_the_tree_of_the_architecture_is_the_tree_of_the_package():
  listed = _tree(_text(ROOT / "docs/architecture.md"))
  found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("md4vmd/**/*.py")]
  assert len(listed) == len(set(listed))
  assert sorted(listed) == sorted(found)


def test_the_floors_of_the_architecture_are_those_of_the_import_lint():
  entries = re.findall(r"^  (\w+)(?:\.py|/) +L(\d) ", _text(ROOT / "docs/architecture.md"), re.M)
  assert {room: int(floor) for room, floor in entries}.items() <= FLOOR.items()
  found = [path for path in ROOT.glob("md4vmd/*") if path.stem[:2] != "__"]
  assert len(entries) == len(found)


def _anchors(page):
  titles = re.findall(r"^#+ (.+)$", _text(page), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@every_page
def test_every_internal_link_leads_somewhere(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
    if "://" in target:
      continue
    name, _, anchor = target.partition("#")
    goal = (page.parent / name).resolve() if name else page
    assert goal.exists(), f"{page.name}: {target} does not exist"
    assert not anchor or anchor in _anchors(goal), f"{page.name}: {target} has no such title"


@every_page
def test_every_file_and_test_that_a_page_names_exists(page):
  text = _text(page)
  if page.stem != "how_to_add":  # which names the files that are to be written
    for name in re.findall(r"`((?:md4vmd|configs|benchmarks|tests)/[\w./]*)", text):
      assert (ROOT / name).exists(), f"{page.name} names {name}"
  for name in re.findall(r"tests/[\w/]+\.py", text):
    assert (ROOT / name).is_file(), f"{page.name} names {name}"


def _commands():
  """(where, arguments after `python -m`) of all pages and docstrings of configs."""
  texts = {page.relative_to(ROOT).as_posix(): _text(page) for page in PAGES}
  texts |= {f"configs/{name}.py": module.__doc__ for name, module in CONFIGS.items()}
  examples = {"configs/parity.py"}  # written by the reader of how_to_add
  for where, text in texts.items():
    joined = text.replace("\\\n", " ")
    for command in re.findall(r"python3? -m ([^`\n|]+)", joined):
      words = shlex.split(command, comments=True)
      if not any(example in command for example in examples):
        yield where, words


@pytest.mark.parametrize(("where", "words"), list(_commands()))
def test_every_command_names_a_module_a_config_a_variant_and_keys_that_exist(where, words):
  assert importlib.util.find_spec(words[0]), f"{where}: no module {words[0]}"
  flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
  if words[0] != "md4vmd.main":
    return
  mode = flags.get("mode", "train")
  assert mode in main.MODES
  if mode == "report":
    assert flags.keys() <= {"mode", "workdir"}
    return
  path, _, variant = flags["config"].partition(":")
  assert (ROOT / path).is_file(), f"{where}: no config {path}"
  config = CONFIGS[pathlib.Path(path).stem].get_config(*filter(None, [variant]))
  for key in flags:
    if key.startswith("config."):
      _find(config, key.removeprefix("config."), where)


def _sweeps():
  """(page, arguments) of every command that starts a sweep."""
  for page in PAGES:
    joined = _text(page).replace("\\\n", " ")
    for command in re.findall(r"python3? launch/sweep\.py ([^`\n|]+)", joined):
      yield page.stem, shlex.split(command, comments=True)


@pytest.mark.parametrize(("page", "words"), list(_sweeps()))
def test_every_sweep_names_keys_and_values_that_exist(page, words, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert sweep.main([*words, "--dry-run"]) == 0, f"{page}: {capsys.readouterr().err}"


@every_page
def test_every_override_names_a_key_of_the_common_config(page):
  for key in re.findall(r"--config\.([\w.]+)=", _text(page)):
    if key.split(".")[0] != "data":
      _find(common.base(), key, page.name)


def _find(config, key, where):
  for part in key.split("."):
    assert part in config, f"{where}: no key config.{key}"
    config = config[part]


def _claimed(docstring):
  """(variants in order, default) that the docstring of a config lists."""
  found = re.search(r"^Variants: *(.*?)$\n?((?:^ {2}.*\n)*)", docstring + "\n", re.MULTILINE)
  if not found:
    return [], None
  inline, block = found.groups()
  entries = re.findall(r"^ {2}(\S.*?):(?: |$)", block, re.MULTILINE)
  entries += [entry.strip() for entry in inline.rstrip(".").split(",") if entry.strip()]
  names = [entry.removesuffix(" (default)") for entry in entries]
  defaults = [name for name, entry in zip(names, entries, strict=True) if name != entry]
  return names, defaults[0] if defaults else None


@every_config
def test_the_variants_of_a_docstring_are_those_of_the_config(name):
  module = CONFIGS[name]
  names, default = _claimed(module.__doc__)
  assert sorted(names) == sorted(getattr(module, "VARIANTS", []))
  parameters = inspect.signature(module.get_config).parameters
  assert default == (parameters["variant"].default if parameters else None)
  for variant in names:
    module.get_config(variant)
  if names:
    with pytest.raises(ValueError, match="there is no variant 'no-such'"):
      module.get_config("no-such")


def _examples():
  """{path: source} of the files that how_to_add shows in full."""
  blocks = r"`([\w/]+\.py)`[^\n]*:\n\n```python\n(.*?)```"
  return dict(re.findall(blocks, _text(ROOT / "docs/how_to_add.md"), re.DOTALL))


def _example(path):
  module = types.ModuleType(path)
  sys.modules[path] = module  # dataclasses look their module up
  exec(compile(_examples()[path], path, "exec"), module.__dict__)
  return module


@pytest.fixture
def parity(monkeypatch):
  """A model whose data, and with settings other parts, are the examples."""
  tables = {
    "md4vmd/schedules/visible_power.py": (schedules.TABLE, "VisiblePower"),
    "md4vmd/objectives/masked_lm.py": (objectives.TABLE, "MaskedLM"),
    "md4vmd/samplers/left_to_right.py": (samplers.TABLE, "LeftToRight"),
    "md4vmd/data/parity.py": (data.TABLE, "Parity"),
    "md4vmd/evaluators/on_support.py": (EVALUATORS, "OnSupport"),
    "md4vmd/networks/mixer.py": (networks.TABLE, "Mixer"),
  }
  for path, (table, name) in tables.items():
    monkeypatch.setitem(table, pathlib.Path(path).stem, getattr(_example(path), name))
  config = _example("configs/parity.py").get_config()
  config.run.batch_size = 8

  def make(**sections):
    for section, settings in sections.items():
      config[section] = ConfigDict(settings)
    return build.model(config)

  return make


def _state(model):
  init = lambda: nn.unbox(
    steps.init_state(model.network, model.optimizer, model.seed, model.dataset.length)
  )
  return jax.jit(init)()


def _batch(model):
  arrays = next(data.train_batches(model.dataset, batch_size=8, seed=0))
  return Batch(**{name: jnp.asarray(array) for name, array in arrays.items()})


def test_every_example_is_complete_and_documented():
  examples = _examples()
  assert len(examples) == 7
  for path, source in examples.items():
    assert ast.get_docstring(ast.parse(source)), path
    assert not (ROOT / path).exists(), f"{path} exists: choose another example"


def test_the_example_schedule_keeps_its_contract(x64):
  schedule = _example("md4vmd/schedules/visible_power.py").VisiblePower()
  t = jnp.linspace(0.01, 0.99, 9)
  np.testing.assert_allclose(schedule.dalpha(t), jax.vmap(jax.grad(schedule.alpha))(t), rtol=1e-9)
  np.testing.assert_allclose(schedule.alpha_inverse(schedule.alpha(t)), t, rtol=1e-9)
  weight = -schedule.dalpha(t) / (1 - schedule.alpha(t))
  np.testing.assert_allclose(schedule.weight(t), weight, rtol=1e-9)
  np.testing.assert_allclose(schedule.masked(t), 1 - schedule.alpha(t), rtol=1e-12)
  small = jnp.array([1e-20, 1e-12])  # where alpha has no digit of it, or few
  np.testing.assert_allclose(schedule.masked(small), 2 * small, rtol=1e-11)
  ends = jnp.array([0.0, 1.0])
  assert schedule.alpha(ends).tolist() == [1.0, 0.0] and schedule.masked(ends).tolist() == [0, 1]
  public = {name for name in vars(Schedule) if name[0] != "_"}
  assert public <= set(dir(schedule))
  with pytest.raises(ValueError, match=r"power is 0\.5; it must be at least 1"):
    type(schedule)(0.5)


def test_the_example_schedule_draws_the_steps_of_a_sampler(x64):
  schedule = _example("md4vmd/schedules/visible_power.py").VisiblePower()
  x_BxL = jnp.zeros((8, 3), int)
  batch = Batch(x_BxL, jnp.ones(8), jnp.arange(8))
  objective = objectives.MD4(schedule, 2, "steps", 4)
  draws = objective.draw(rngs.batch_noise(jax.random.key(0), 8), batch)
  alpha_BxG, earlier_BxG = map(schedule.alpha, (draws.t_BxG, draws.t_BxG - 0.25))
  weight_BxG = 4 * (earlier_BxG - alpha_BxG) / (1 - alpha_BxG)
  assert sorted(set(draws.t_BxG[:, 0].tolist())) == [0.25, 0.5, 0.75, 1.0]
  np.testing.assert_allclose(draws.weight_BxG, weight_BxG, rtol=1e-12)


def test_the_example_network_and_objective_learn(parity):
  model = parity(objective={"name": "masked_lm"}, network={"name": "mixer", "width": 8})
  state, batch = _state(model), _batch(model)
  step = jax.jit(
    lambda state: steps.train_step(
      state, batch, network=model.network, objective=model.objective,
      optimizer=model.optimizer, microbatches=2, seed=0,
    )
  )  # fmt: skip
  after, sums = step(state)
  assert np.isfinite(sums["loss_nats"]) and sums["loss_nats"] > 0
  assert "nelbo_nats" not in sums and "part_surrogate_nats" in sums
  assert (after.params["head"] != state.params["head"]).any()


def test_the_example_dataset_knows_its_support_and_its_words(parity):
  dataset = parity().dataset
  assert dataset.support_MxL.shape == (32, 6) and (dataset.support_MxL.sum(1) % 2 == 0).all()
  np.testing.assert_allclose(dataset.entropy_nats("valid"), np.log(32))
  assert dataset.decode(dataset.encode("01_10_")) == "01_10_"
  assert dataset.describe().startswith("even bit strings")


def test_the_example_sampler_fills_from_left_to_right(parity):
  model = parity(network={"name": "mixer", "width": 8})
  fns = networks.bind(model.network, _state(model).params)
  samples = samplers.sample(
    rngs.stream(0, 0, "test"), fns, model.schedule, build.sampler("left_to_right"),
    samplers.times("uniform", 3), tokens_BxL=jnp.zeros((4, 6), int),
    free_BxL=jnp.ones((4, 6), bool).at[:, 0].set(False), vocab_size=2,
  )  # fmt: skip
  assert (samples.x_BxL < 2).all() and (samples.calls_B == 3).all()
  np.testing.assert_array_equal(samples.call_BxL[0], [-1, 0, 0, 1, 1, 2])


def test_the_example_evaluator_and_config_work_together(parity):
  network = {"name": "mixer", "width": 8}
  model = parity(network=network, evaluators={"on_support": {"count": 16}})
  (evaluator,) = build.evaluators(model, EVALUATORS).values()
  figures = evaluator.run(0, _state(model).params)
  assert 0 <= figures["samples/on_support"] <= 1
