"""Training step: md4vmd against the plain formulation, speed and temporary memory.

Before anything is timed, loss and gradients of both are compared on the benchmark's own batch.
Goals: v50257 at least 3.5 times the tokens per second in at most .25 of the temporary memory;
v27 at least the same speed in at most half of it; genmd4_v50257, whose plain formulation holds the
logits of two masked sets, at least 4 times the speed in at most .2 of the memory, and at most 2.2
times the milliseconds of an MD4 step with the same network and batch (`md4_ratio`).
v50257_tilted has no goal: it is v50257 with masks by tilted counts, as configs/text8.py trains, so
that a third of the rows are masked on average in place of half. Both sides of a comparison have the
same masks; the plain one computes all rows whatever they are, so its ratio flatters the library.

--public adds the naive step with one more pass over the logits, which the public MD4
implementation makes; figures ending in `_public` are against it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import naive, timing
from md4vmd import partitioning, rngs, schedules, steps
from md4vmd.interfaces import Batch
from md4vmd.networks import TokenPowerNetwork, Transformer
from md4vmd.objectives import MD4, GenMD4
from md4vmd.optim import Optimizer

_SEED = 0
_LARGEST_LOSS_ERROR = 1e-6  # relative
_LARGEST_GRADIENT_ERROR = 1e-5  # of the largest entry of each leaf


@dataclasses.dataclass(frozen=True)
class Case:
  """A network, a batch and how the library is to run it.

  Attributes:
    name: stands before the slash of the figures' names.
    vocab_size: V.
    length: tokens of a sequence.
    depth: blocks.
    width: features; heads have 64 where the width allows it.
    batch: sequences.
    microbatches: of the library's step.
    remat: of the library's network.
    estimator: of both objectives.
    is_genmd4: GenMD4 in place of MD4, on a network that sees the time.
  """

  name: str
  vocab_size: int
  length: int
  depth: int
  width: int
  batch: int
  microbatches: int = 1
  remat: str = "none"
  estimator: str = "count"
  is_genmd4: bool = False

  @property
  def network(self) -> nn.Module:
    """The network, as the library runs it."""
    network = self.denoiser
    return TokenPowerNetwork(network) if self.is_genmd4 else network

  @property
  def denoiser(self) -> Transformer:
    """The network without learned schedules."""
    return Transformer(
      self.vocab_size,
      width=self.width,
      depth=self.depth,
      heads=max(1, self.width // 64),
      time_conditioning=self.is_genmd4,
      remat=self.remat,
    )

  @property
  def objective(self) -> MD4 | GenMD4:
    """The objective with the case's estimator."""
    make = GenMD4 if self.is_genmd4 else MD4
    return make(schedules.Linear(), self.vocab_size, estimator=self.estimator)


CASES = (
  Case("v50257", 50257, 256, 4, 256, 8, remat="dots"),
  Case("v50257_tilted", 50257, 256, 4, 256, 8, remat="dots", estimator="tilted"),
  Case("v27", 27, 256, 6, 384, 16, microbatches=4, remat="dots"),
  Case("genmd4_v50257", 50257, 256, 4, 256, 8, remat="dots", is_genmd4=True),
)


class Compiled(NamedTuple):
  """A compiled training step and the bytes of its temporaries."""

  step: Callable[..., Any]
  temp_bytes: int


def make_batch(case: Case) -> Batch:
  """Random tokens; their values do not change the work."""
  x_BxL = np.random.default_rng(_SEED).integers(0, case.vocab_size, (case.batch, case.length))
  return Batch(
    *jax.device_put(
      (x_BxL.astype(np.int32), np.ones(case.batch, np.float32), np.arange(case.batch))
    )
  )


def make_state(case: Case, optimizer: Any, network: nn.Module | None = None) -> steps.TrainState:
  """The state at step 0 of the case's network, or of another one.

  Parameters are a little off their initial values, some of which would leave gradients at zero.
  """
  network = network or case.network

  @jax.jit
  def init():
    state = nn.unbox(steps.init_state(network, optimizer, _SEED, case.length))
    leaves, structure = jax.tree.flatten(state.params)
    keys = jax.random.split(rngs.stream(_SEED, 0, "offset"), len(leaves))
    moved = [p + 0.02 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(structure, moved)
    return state.replace(params=params, ema=jax.tree.map(jnp.copy, params))

  return init()


def compile_ours(
  case: Case,
  optimizer: Any,
  state: Any,
  batch: Batch,
  *,
  network: nn.Module | None = None,
  objective: Any = None,
) -> Compiled:
  """`steps.train_step` as the trainer runs it: jitted, with the state donated."""
  step = functools.partial(
    steps.train_step,
    network=network or case.network,
    objective=objective or case.objective,
    optimizer=optimizer,
    microbatches=case.microbatches,
    seed=_SEED,
  )
  return _compiled(jax.jit(step, donate_argnums=0), state, batch)


def compile_naive(
  case: Case, optimizer: Any, state: Any, batch: Batch, *, public: bool = False
) -> Compiled:
  """`naive.train_step`, jitted; `public` as in `naive.loss`."""
  network = dataclasses.replace(case, remat="none").network
  step = functools.partial(
    naive.train_step,
    network=network,
    objective=case.objective,
    optimizer=optimizer,
    seed=_SEED,
    public=public,
  )
  return _compiled(jax.jit(step), state, batch)


def _compiled(step, state, batch):
  compiled = step.lower(state, batch).compile()
  return Compiled(compiled, compiled.memory_analysis().temp_size_in_bytes)


def compare(name: str, ours: tuple[float, Any], plain: tuple[float, Any]) -> tuple[float, float]:
  """Compares two pairs of (loss, gradients).

  Returns:
    (relative error of the loss, largest error of a gradient leaf over its largest entry).

  Raises:
    ArithmeticError: the two do not agree.
  """
  loss_error = abs(ours[0] / plain[0] - 1)
  if not loss_error <= _LARGEST_LOSS_ERROR:
    raise ArithmeticError(f"{name}: losses differ by {loss_error:.1e}")
  gradient_error = 0.0
  leaves = jax.tree_util.tree_leaves_with_path(plain[1])
  for leaf, (path, right) in zip(jax.tree.leaves(ours[1]), leaves, strict=True):
    error = float(np.abs(leaf - right).max() / np.abs(right).max()) if right.any() else math.inf
    if not error <= _LARGEST_GRADIENT_ERROR:  # nor is NaN; a gradient of zeros compares nothing
      raise ArithmeticError(
        f"{name}: gradients differ by {error:.1e} at {jax.tree_util.keystr(path)}"
      )
    gradient_error = max(gradient_error, error)
  return loss_error, gradient_error


def measure(
  cases: dict[str, Case], *, rounds: int, public: bool
) -> tuple[list[list[Any]], dict[str, float]]:
  """Compares the variants of one case with the naive step, then times all against each other.

  Returns:
    (rows of the table, figures of the first variant).
  """
  ours, first = next(iter(cases.items()))
  optimizer, batch = Optimizer(steps=1000), make_batch(first)
  state = make_state(first, optimizer)
  compiled = {"naive": compile_naive(first, optimizer, state, batch)}
  if public:
    compiled["public"] = compile_naive(first, optimizer, state, batch, public=True)
  compiled |= {name: compile_ours(case, optimizer, state, batch) for name, case in cases.items()}

  runners, plain = {}, None
  for name, variant in compiled.items():
    after, sums = variant.step(jax.tree.map(jnp.copy, state), batch)
    moment = optax.tree_utils.tree_get(
      after.optimizer_state, "mu"
    )  # the gradient, but for a factor
    found = jax.device_get((sums["loss_nats"], moment))
    plain = plain or found
    errors = compare(f"{first.name} {name}", found, plain)
    timing.say(
      "{} {}: loss agrees to {:.0e}, gradients to {:.0e}".format(first.name, name, *errors)
    )
    runners[name] = _runner(variant, after, batch)
  if first.is_genmd4:
    alone = {"network": first.denoiser, "objective": MD4(schedules.Linear(), first.vocab_size)}
    md4_state = make_state(first, optimizer, first.denoiser)
    compiled["md4"] = compile_ours(first, optimizer, md4_state, batch, **alone)
    runners["md4"] = _runner(compiled["md4"], md4_state, batch)
  seconds = timing.interleave(runners, rounds=rounds)

  tokens, naive_bytes = first.batch * first.length, compiled["naive"].temp_bytes
  rows: list[list[Any]] = []
  for name, (_, temp_bytes) in compiled.items():
    median = float(np.median(seconds[name]))
    speed = timing.ratio(seconds["naive"], seconds[name])
    columns = (1e3 * median, tokens / median, speed, temp_bytes / 1e6, temp_bytes / naive_bytes)
    rows.append([f"{first.name} {name}", *columns])
  figures: dict[str, float] = {}
  for form, ending in (("naive", ""), ("public", "_public")):
    if form in compiled:
      figures |= {
        f"tokens_per_second_ratio{ending}": timing.ratio(seconds[form], seconds[ours]),
        f"temp_bytes_ratio{ending}": compiled[ours].temp_bytes / compiled[form].temp_bytes,
      }
  if first.is_genmd4:
    figures["md4_ratio"] = timing.ratio(seconds[ours], seconds["md4"])
  for label, name in (("naive", "naive"), ("ours", ours)):
    figures[f"{label}_ms"] = 1e3 * float(np.median(seconds[name]))
    figures[f"{label}_temp_bytes"] = compiled[name].temp_bytes
  return rows, {f"{first.name}/{name}": value for name, value in figures.items()}


def _runner(variant: Compiled, state: steps.TrainState, batch: Batch) -> Callable[[], Any]:
  def run():
    nonlocal state
    state, sums = variant.step(state, batch)
    return state, sums

  return run


def variants(case: Case, *, all_variants: bool) -> dict[str, Case]:
  """The case as configured, and with `all_variants` every other way to run it."""
  grid = [
    dataclasses.replace(case, microbatches=m, remat=remat)
    for m in (1, 2, 4, 8)
    for remat in ("none", "dots")
  ]
  chosen = [case, *(other for other in grid if all_variants and other != case)]
  return {f"microbatches={c.microbatches} remat={c.remat}": c for c in chosen}


HEADER = ("step", "ms", "tokens/s", "speed ratio", "temp MB", "memory ratio")


def main(arguments: list[str] | None = None) -> None:
  parser = timing.parser(__doc__)
  parser.add_argument("--all", action="store_true", help="microbatches 1-8, with and without remat")
  parser.add_argument("--public", action="store_true", help="also time the row `public`")
  parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
  parser.add_argument("--rounds", type=int, default=9)
  options = parser.parse_args(arguments)
  timing.say(timing.machine())
  figures: dict[str, float] = {"cores": timing.cores()}
  with partitioning.use(partitioning.make_mesh()):
    for case in CASES:
      if options.case in (None, case.name):
        timing.say("")
        rows, new = measure(
          variants(case, all_variants=options.all), rounds=options.rounds, public=options.public
        )
        timing.say(timing.table(HEADER, rows))
        figures |= new
  timing.finish(figures, options.json)


if __name__ == "__main__":
  main()
