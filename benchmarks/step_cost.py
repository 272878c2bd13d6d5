"""What a training step costs: floating point operations per example, by XLA's own count.

  python -m benchmarks.step_cost --config=configs/cifar10.py:md4 --data=cifar10.npz

The step of a batch of one example is lowered, not compiled or run, so that a laptop can count for a
pod. Recomputation (remat) is counted. XLA counts the body of a loop once, so that only networks
without loops are counted right: U-Nets with a convolutional head, whose loop takes one image.
"""

from __future__ import annotations

import argparse
import importlib

from md4vmd import build, data, networks, partitioning, train, train_state


def count(config: build.Config) -> dict[str, float]:
  """Parameters, and operations of one step for one example.

  Raises:
    ValueError: the network has loops, whose operations XLA does not multiply.
  """
  config.run.update({"batch_size": 1, "microbatches": 1})
  model = build.model(config)
  if not isinstance(model.network, networks.UNet) or model.network.head_width:
    raise ValueError("only networks 'unet' and 'uvit' without a head_width have no loops to count")
  with partitioning.use(model.mesh):
    state = train_state.abstract(model)
    batches = data.train_batches(model.dataset, batch_size=1, seed=0)
    batch = partitioning.put_batch(model.mesh, next(batches))
    costs = train.compiled_step(model).lower(state, batch).cost_analysis()
  assert costs is not None
  return {
    "parameters": float(train_state.count_parameters(state.params)),
    "flops": float(costs["flops"]),
  }


def main() -> None:
  """Prints the count of a config."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--config", required=True, help="configs/NAME.py:VARIANT")
  parser.add_argument("--data", required=True, help="its data.path: only shapes are used")
  given = parser.parse_args()
  path, _, variant = given.config.partition(":")
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  config = module.get_config(*filter(None, [variant]))
  config.data.path = given.data
  found = count(config)
  print(
    f"{given.config}: {found['parameters'] / 1e6:.1f}M parameters, "
    f"{found['flops'] / 1e9:,.1f} GFLOP per example and step"
  )


if __name__ == "__main__":
  main()
