"""The training step of a config, compiled for a TPU slice that is not there.

  python -m benchmarks.tpu_compile --config=configs/text8.py:md4 --topology=v5e:4x4

compiles `steps.train_step` with the config's own network, objective, optimizer, microbatches and
mesh ahead of time, and prints what the compiler says: memory per chip, whether it fits, and the
FLOPs and the bytes of main memory and of collectives per step and chip. Nothing is estimated by
hand, and nothing runs. FLOPs are those of the compiled program, without those in kernels of
attention; the JSON has `model_flops`, without remat, beside them (`benchmarks.products`).

It needs the compiler of the extra [tpu], no TPU, and none of the config's data: --vocab_size and
--length, or --image_shape, describe it where the config does not.

Several topologies with commas and --batch_per_device=8 make a table of weak scaling. Settings of
the config are overridden as in training, for example --config.mesh.fsdp=-1 --config.mesh.data=1.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from typing import Any

import jax

from benchmarks import hlo, timing

# What the examples are, by config.data.name, where the config itself does not say.
_DATA = {
  "text": {"vocab_size": 27},
  "tokens": {"vocab_size": 50257},
  "images": {"vocab_size": 256},
  "sudoku_csv": {"vocab_size": 9, "length": 81},
}


def topology_devices(name: str) -> list[Any]:
  """The chips of a slice such as v5e:4x4, for programs to be compiled for.

  Raises:
    ValueError: no compiler for TPUs is installed, or it knows no such slice.
  """
  kind, _, shape = name.partition(":")
  sides = [int(size) for size in re.findall(r"\d+", shape)]
  chips = math.prod(sides) if sides else 0
  # A host has 2 x 2 chips, but for slices that are smaller.
  small = {"chips_per_host_bounds": (*sides, 1)[:3]} if 0 < chips < 4 else {}
  # The compiler asks the metadata of a Cloud TPU machine for these, and waits.
  os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": f"{kind.replace('v5e', 'v5litepod')}-{chips}",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so no other process is in the way
  }
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(name, "tpu", **small).devices)
  except Exception as error:
    raise ValueError(
      f"cannot describe the slice '{name}' ({str(error).splitlines()[0]}); names are like v5e:4x4, "
      "and pip install '.[tpu]' installs the compiler"
    ) from error


def add_options(parser: argparse.ArgumentParser) -> None:
  """The options that describe data that is not there."""
  parser.add_argument("--vocab_size", type=int, help="of data that is not there")
  parser.add_argument("--length", type=int, help="tokens of a sequence, likewise")
  parser.add_argument("--image_shape", default="32x32x3", help="of images, likewise")
  parser.add_argument("--classes", type=int, default=0, help="of images with labels, likewise")


def described(options: argparse.Namespace) -> dict[str, Any]:
  """Those options, as the arguments of `stand_in`."""
  return {key: getattr(options, key) for key in ("vocab_size", "length", "image_shape", "classes")}


def stand_in(
  config: Any,
  vocab_size: int | None = None,
  length: int | None = None,
  image_shape: str = "32x32x3",
  classes: int = 0,
):
  """A dataset without examples, with the vocabulary, length and classes of the config's.

  Raises:
    ValueError: the config does not say them.
  """
  from md4vmd.data import Dataset

  shape = None
  if config.data.name == "images":
    sides = re.fullmatch(r"(\d+)x(\d+)x(\d+)", image_shape)
    if not sides:
      raise ValueError(f"--image_shape={image_shape} must be like 64x64x3")
    height, width, channels = map(int, sides.groups())
    shape, length = (height, width, channels), height * width * channels
  if bool(config.data.get("class_conditional")) != (classes > 0):
    raise ValueError(
      f"--classes={classes} and data.class_conditional={config.data.get('class_conditional')}: "
      "give the number of classes where the data are conditioned on them, and only there"
    )
  known: dict[str, Any] = dict(_DATA.get(config.data.name, {}))
  if config.data.name == "sudoku":
    known |= {"vocab_size": config.data.size, "length": config.data.size**2}
  if config.data.get("length"):
    known["length"] = config.data.length
  known |= {key: value for key, value in (("vocab_size", vocab_size), ("length", length)) if value}
  missing = {"vocab_size", "length"} - known.keys()
  if missing:
    raise ValueError(
      f"data '{config.data.name}' needs {' and '.join(f'--{m}' for m in sorted(missing))}"
    )
  dataset = Dataset(splits={}, about="a stand-in", **known)
  dataset.image_shape, dataset.classes = shape, classes
  return dataset


def compile_step(config: Any, dataset: Any, devices: list[Any]):
  """The compiled training step on these devices, with the shardings that training would use."""
  from benchmarks import products
  from md4vmd import build, partitioning, train, train_state

  model = build.model(config, stand_in=dataset, devices=devices)
  with partitioning.use(model.mesh):
    state = train_state.abstract(model)
    return train.compiled_step(model).lower(state, products.batch_like(model)).compile()


def measure(config: Any, dataset: Any, topology: str) -> dict[str, float]:
  """Figures of one slice, per chip and step; `fits` is 0 where the compiler ran out of memory."""
  from benchmarks import products

  devices = topology_devices(topology)
  figures: dict[str, float] = {"chips": len(devices), "batch": config.run.batch_size}
  try:
    compiled = compile_step(config, dataset, devices)
  except jax.errors.JaxRuntimeError as error:
    # The compiler says "Used 58.9G of 15.75G", or, where arrays between steps alone are too many,
    # "required for HLO temporaries (17.26G) exceeds available HBM (15.75G)".
    sizes = re.findall(r"\b([\d.]+)([MG])\b", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
      raise
    scale = {"M": 1e6, "G": 1e9}
    needed, limit = (float(size) * scale[unit] for size, unit in sizes[:2])
    return figures | {"fits": 0, "memory_bytes": needed, "limit_bytes": limit}
  memory = compiled.memory_analysis()
  counted = hlo.cost(compiled.as_text())
  arguments = memory.argument_size_in_bytes
  figures |= {
    "fits": 1,
    "memory_bytes": arguments
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    "state_bytes": arguments,
    "temp_bytes": memory.temp_size_in_bytes,
    "matrix_flops": counted.matrix_flops,
    "model_flops": products.of_step(config, dataset) / len(devices),
    "traffic_bytes": counted.memory_bytes,
    "collective_bytes": counted.bytes,
    "collectives": counted.collectives,
    "open_loops": counted.open_loops,
  }
  return figures | {f"{kind}_bytes": size for kind, size in counted.collective_bytes.items()}


def parse_config(arguments: list[str]) -> Any:
  """The config of --config=... and --config.key=value, as the trainer reads them."""
  from absl import flags
  from ml_collections import config_flags

  from md4vmd import main as command_line

  for argument in arguments:
    if argument.startswith("--config="):
      command_line.find_config(argument.partition("=")[2].partition(":")[0])
  values, line = flags.FlagValues(), ["tpu_compile", *arguments]
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=line)
  values(line)
  loaded: Any = values["config"].value
  if loaded is None:
    raise ValueError("no --config given; try --config=configs/text8.py:md4")
  return loaded


HEADER = (
  "slice", "chips", "batch", "fits", "GB", "state GB", "TFLOP", "traffic GB", "collective GB",
  "count",
)  # fmt: skip


def row(topology: str, figures: dict[str, float]) -> list[Any]:
  """A line of the table."""
  if not figures["fits"]:
    over = f"no: {figures['memory_bytes'] / 1e9:.1f} of {figures['limit_bytes'] / 1e9:.1f} GB"
    return [topology, int(figures["chips"]), int(figures["batch"]), over, *[""] * 6]
  return [
    topology,
    int(figures["chips"]),
    int(figures["batch"]),
    "yes",
    f"{figures['memory_bytes'] / 1e9:.2f}",
    f"{figures['state_bytes'] / 1e9:.3f}",
    f"{figures['matrix_flops'] / 1e12:.3f}",
    f"{figures['traffic_bytes'] / 1e9:.0f}",
    f"{figures['collective_bytes'] / 1e9:.3f}",
    int(figures["collectives"]),
  ]


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--topology", default="v5e:4x4", help="slices, with commas between them")
  add_options(parser)
  parser.add_argument("--batch_per_device", type=int, help="in place of run.batch_size")
  options, rest = parser.parse_known_args(arguments)
  try:
    figures, rows = {}, []
    for topology in options.topology.split(","):
      config = parse_config(rest)
      if options.batch_per_device:
        config.run.batch_size = options.batch_per_device * len(topology_devices(topology))
      dataset = stand_in(config, **described(options))
      found = measure(config, dataset, topology)
      rows.append(row(topology, found))
      figures |= {f"{topology}/{name}": value for name, value in found.items()}
      timing.say(timing.table(HEADER, rows[-1:]))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  if len(rows) > 1:
    timing.say("")
    timing.say(timing.table(HEADER, rows))
  timing.finish(figures, options.json)
  if not all(found for name, found in figures.items() if name.endswith("/fits")):
    sys.exit(3)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")  # nothing runs on the devices that are here
  main()
