"""What all tests share: no rank promotion, float64 on request, small random networks."""

import functools
import inspect
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from md4vmd import networks
from tests import shrunken, toys

jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.__version_info__ < (0, 11):  # later ones do not know the flag
  # Most of the tests' time is compilation, and XLA's older emitters take a third of it. The flag is
  # read when the backend starts, here and in the processes that tests start.
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
_ROOT = pathlib.Path(__file__).parent.parent
_RUN = """
import runpy, jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
runpy.run_path({path!r}, run_name="on_eight_devices")[{name!r}]()
"""


# The files that take longest start first, so that the processes of the tests end together.
_LONGEST = (
  "end_to_end",
  "multi_process",
  "resume",
  "mesh",
  "vmd_loss",
  "samplers",
  "vmd_bounds",
  "identities",
  "block_diffusion",
  "autoregression",
)


def pytest_collection_modifyitems(items):
  rank = {f"{name}_test": i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture
def x64():
  """Arrays made in the test are float64; the flag is back at its old value afterwards."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
  """Little optimization, for modules whose programs run once or twice."""
  yield from shrunken.quick_compilation(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def make_network():
  """A function (name, length, **settings) -> (network, params), a tiny network of TABLE.

  Every parameter is moved off its initial value, so that adaLN is open and the output depends on
  the tokens, on their positions and, where the network is conditioned on it, on the time.
  """

  def make(name="transformer", *, length, seed=0, **settings):
    small = {"vocab_size": 3, "width": 16, "depth": 1, "heads": 2, "condition_width": 8}
    network = networks.TABLE[name](**(small | settings))
    zt_BxL, t_BxG = jnp.zeros((1, length), jnp.int32), jnp.ones((1, 1))
    return network, toys.random_params(network, zt_BxL, t_BxG, seed=seed)

  return make


@pytest.fixture(scope="session")
def make_fns(make_network):
  """A function attends -> fns of a network of two layers; parameters do not depend on `attends`.

  It reads four tokens of three values, in blocks of two, unless told otherwise.
  """

  @functools.cache
  def base(**settings):
    return make_network(vocab_size=3, depth=2, **settings)

  @functools.cache
  def make(attends, block_size=2, length=4, **settings):
    network, params = base(length=length, **settings)
    block = block_size if attends == "blocks" else None
    fns = networks.bind(network.clone(attends=attends, block_size=block), params)
    return fns._replace(denoise=jax.jit(fns.denoise))

  return make


@pytest.fixture
def on_eight_devices():
  """A function that runs a function of a test file in a process with eight CPU devices."""

  def run(function):
    code = _RUN.format(path=inspect.getfile(function), name=function.__name__)
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
      [sys.executable, "-c", code], env=environment, cwd=_ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]

  return run
