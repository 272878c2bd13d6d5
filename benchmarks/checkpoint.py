"""How long training stands still for a checkpoint, and how long the disk then takes.

A state of 30M parameters (with the average and two moments, 480 MB) is trained and saved as the
trainer does it. `stall` is the time until training may go on; the rest happens in the background.
"""

from __future__ import annotations

import pathlib
import tempfile
import time

import jax
import numpy as np

from benchmarks import timing
from benchmarks.train_step import Case, compile_ours, make_batch, make_state
from md4vmd import partitioning, train_state
from md4vmd.checkpoints import Checkpoints
from md4vmd.optim import Optimizer

CASE = Case("30M", 27, 256, 9, 512, 8, remat="dots")


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--folder", type=pathlib.Path, help="where to save; a temporary folder")
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  with (
    partitioning.use(partitioning.make_mesh()),
    tempfile.TemporaryDirectory(dir=options.folder) as folder,
  ):
    figures = measure(CASE, pathlib.Path(folder), options.rounds)
  header = ("parameters", "step s", "stall s", "stall/step", "first stall s", "on disk after s")
  row = [
    int(figures["parameters"]),
    *(figures[name] for name in ("step_s", "stall_s", "stall_steps", "first_stall_s", "disk_s")),
  ]
  timing.say(timing.table(header, [row]))
  timing.finish(figures, options.json)


def measure(case: Case, folder: pathlib.Path, rounds: int) -> dict[str, float]:
  """Medians over the rounds; each is two steps and a save whose writing is waited for."""
  optimizer, batch = Optimizer(steps=1000), make_batch(case)
  state = make_state(case, optimizer)
  parameters = train_state.count_parameters(state.params)
  compiled = compile_ours(case, optimizer, state, batch).step
  checkpoints = Checkpoints(folder, keep=1)
  times: dict[str, list[float]] = {"step_s": [], "stall_s": [], "disk_s": []}

  def timed(name, function):
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    times[name].append(time.perf_counter() - start)
    return result

  for number in range(1, rounds + 2):
    for _ in range(2):
      state, _ = timed("step_s", lambda state=state: compiled(state, batch))
    timed("stall_s", lambda n=number, state=state: checkpoints.save(n, state, {"position": 0}))
    timed("disk_s", checkpoints.wait)
  checkpoints.close()
  first = times["stall_s"][0]  # which compiles the checksums
  median = {name: float(np.median(values[1:])) for name, values in times.items()}
  return median | {
    "parameters": parameters,
    "first_stall_s": first,
    "stall_steps": median["stall_s"] / median["step_s"],
    "cores": timing.cores(),
  }


if __name__ == "__main__":
  main()
