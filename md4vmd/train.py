"""The trainer: one loop for every model, from one device to a pod."""

from __future__ import annotations

import contextlib
import datetime
import functools
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from md4vmd import (
  build,
  calibration,
  config_record,
  data,
  evaluate,
  metrics,
  partitioning,
  pictures,
  provenance,
  sample,
  sections,
  steps,
  train_state,
)
from md4vmd.checkpoints import Checkpoints, has_any
from md4vmd.interfaces import Evaluator
from md4vmd.writers import Writers, read_config, read_metrics, say

PREEMPTED = 42  # exit status after SIGTERM: the scheduler should start the same command again


class Preempted(SystemExit):
  """Training stopped on SIGTERM, with its state saved."""

  def __init__(self):
    super().__init__(PREEMPTED)


class DivergedError(ArithmeticError):
  """A loss or a gradient is no finite number."""


def train(config: build.Config, workdir: pathlib.Path) -> None:
  """Trains to config.run.steps, continuing from the newest checkpoint of the workdir if any.

  Raises:
    Preempted: after SIGTERM, once the state is saved.
    DivergedError: a loss or gradient is not finite; no state from then on is saved.
    ValueError: a config that means nothing, or the workdir holds a run of another one; its files
      stay as they are.
  """
  model = build.model(config)
  begun = read_config(workdir) if has_any(workdir / "checkpoints") else None
  changed = config_record.changes(config, begun or config_record.plain(config))
  if model.run.calibrate:
    calibration.check(model)
  if "sample" in model.run.then:
    sample.prepare(model)  # a bad prompt is reported before hours of training
  with partitioning.use(model.mesh):
    evaluators = evaluate.make_evaluators(model)
    checkpoints = Checkpoints(
      workdir / "checkpoints",
      keep=model.run.keep,
      keep_every=model.run.keep_every,
      keep_best=bool(model.run.best),
    )
    writers = Writers(workdir, active=jax.process_index() == 0)
    restored = checkpoints.restore_latest(train_state.abstract(model))
    if restored is None:
      state, position = train_state.initial(model), 0
    else:
      state, position = restored.state, restored.meta["position"]
    batches = _batches(model, position)  # the last that may refuse the config
    if restored is not None:
      say(f"Continuing from step {restored.step}.")
    for key, (before, now) in changed.items():
      say(f"Changed since the run began: {key}={now}, it was {before}.")
    writers.truncate_after(int(state.step))
    writers.write_config(config_record.plain(config))
    say(f"Data: {model.dataset.describe()}.")
    say(
      f"Network: {train_state.count_parameters(state.params) / 1e6:.2f}M parameters on "
      f"{jax.device_count()} {jax.devices()[0].device_kind} devices. Workdir: {workdir}"
    )
    with _closing(checkpoints, writers):
      loop = _Loop(model, checkpoints, writers, evaluators, config_record.plain(config))
      loop.run(state, position, batches)
  if jax.process_index() == 0:
    _draw_curve(model, workdir)


def _batches(model: build.Model, position: int) -> Iterator[dict[str, np.ndarray]]:
  return data.train_batches(
    model.dataset,
    batch_size=model.run.batch_size,
    seed=model.seed,
    start=position,
    **partitioning.share(model.mesh),
  )


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints, writers: Writers) -> Iterator[None]:
  """Closes both at the end; the checkpoints not after an error in a pod.

  Closing waits until every process has written its part, and the error may be that one is gone.
  All processes stop on SIGTERM and where a run diverges.
  """
  is_orderly = jax.process_count() == 1
  try:
    yield
    is_orderly = True
  except (Preempted, DivergedError):
    is_orderly = True
    raise
  finally:
    writers.close()
    if is_orderly:
      checkpoints.close()


def _draw_curve(model: build.Model, workdir: pathlib.Path) -> None:
  """curve.png: the bound during training, beside the exact entropy where it is known."""
  name = "train/nelbo_bits_per_token"
  lines = [line for line in read_metrics(workdir) if name in line]
  if not lines:
    return
  picture = pictures.curve(
    {"training batches": ([line["step"] for line in lines], [line[name] for line in lines])},
    title=f"bound in bits per {model.dataset.unit}",
    x_label="step",
    references=model.dataset.references_bits,
  )
  picture.save(workdir / "curve.png")
  say(f"Wrote {workdir / 'curve.png'}.")


def compiled_step(model: build.Model) -> Any:
  """The jitted training step: (state, batch) -> (state, metrics), in place of the old state."""
  step = functools.partial(
    steps.train_step,
    network=model.network,
    objective=model.objective,
    optimizer=model.optimizer,
    microbatches=model.run.microbatches,
    seed=model.seed,
  )
  return jax.jit(step, donate_argnums=0, out_shardings=(train_state.shardings(model), None))


class _Loop:
  """The steps of a run and what happens between them."""

  def __init__(
    self,
    model: build.Model,
    checkpoints: Checkpoints,
    writers: Writers,
    evaluators: dict[str, Evaluator],
    config: dict[str, Any],
  ):
    self.model, self.checkpoints, self.writers = model, checkpoints, writers
    self.evaluators = evaluators
    self.about = {
      "config_hash": model.config_hash,
      "config": config,
      "made_with": provenance.record(),
    }
    self.term_received = False
    self.evaluated_step: int | None = None  # while its evaluation runs

  def run(
    self, state: steps.TrainState, position: int, batches: Iterator[dict[str, np.ndarray]]
  ) -> None:
    run, model = self.model.run, self.model
    train_step = compiled_step(model)
    first = int(state.step)
    is_due = lambda step: run.evaluate_every > 0 and step % run.evaluate_every == 0
    meter = _Meter(model, self.writers, self.checkpoints, first + 1)
    # None shows it at a terminal.
    progress = tqdm(
      total=run.steps,
      initial=first,
      disable=None if jax.process_index() == 0 else True,
      unit="step",
      dynamic_ncols=True,
    )
    with self._watching_for_term(), contextlib.closing(progress):
      if first > 0 and is_due(first) and not self._is_evaluated(first):
        self._evaluate(first, state.ema)  # the run had stopped before it
      for step in range(first + 1, run.steps + 1):
        batch = partitioning.put_batch(model.mesh, next(batches))
        state, sums = train_step(state, batch)
        position += run.batch_size
        meter.add(step, sums)
        progress.update()
        stopping = self.term_received or self.checkpoints.reached_preemption(step)
        if stopping or is_due(step) or step == run.steps or step % run.checkpoint_every == 0:
          meter.flush()  # raises before a state that is not finite could be saved
          if step == run.steps and run.calibrate:
            state = self._calibrated(state)
          self._save(step, state, position)
        if stopping:
          _stop(step)
        if is_due(step):
          self._evaluate(step, state.ema)
          meter.restart_clock()

  def _calibrated(self, state):
    factor, nats_by_factor = calibration.fit(self.model, state.ema)
    say(
      f"Calibrated by {self.model.run.calibrate} draws of z: logits times {factor:.3g}, "
      f"loss {nats_by_factor[factor]:.4f} nats per token in place of {nats_by_factor[1.0]:.4f}."
    )
    return state.replace(ema=calibration.sharpened(state.ema, factor))

  def _save(self, step, state, position):
    self.checkpoints.save(step, state, {"position": position, **self.about})

  def _evaluate(self, step, params):
    model, run = self.model, self.model.run
    hash_now = model.config_hash
    self.evaluated_step = step
    figures = evaluate.run_all(
      self.evaluators, model, self.writers, step, params, trained_config_hash=hash_now
    )
    self.evaluated_step = None
    if run.best and run.best not in figures:
      raise ValueError(
        f"run.best: no evaluator reports '{run.best}'{sections.nearest(run.best, figures)}"
      )
    if run.best:
      value = figures[run.best]
      if self.checkpoints.rate(step, run.best, value, is_loss=run.best_is == "smallest"):
        say(f"Step {step} is the best so far: {run.best} = {value:.6g}.")
    self.writers.write(step, figures)  # last: the line says that all of this is done

  def _is_evaluated(self, step):
    """Whether metrics.jsonl has the figures of a step, as process 0 reads it."""
    names = tuple(f"{name}/" for name in self.evaluators)
    lines = read_metrics(self.writers.workdir) if jax.process_index() == 0 else []
    found = any(
      line["step"] == step and str(key).startswith(names) for line in lines for key in line
    )
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))

  @contextlib.contextmanager
  def _watching_for_term(self):
    """Notes SIGTERM. In a pod jax's own service does, so that all processes stop together."""
    if jax.process_count() > 1:
      yield
      return
    previous = signal.signal(signal.SIGTERM, self._on_term)
    try:
      yield
    finally:
      signal.signal(signal.SIGTERM, previous)

  def _on_term(self, *_):
    self.term_received = True
    if self.evaluated_step is not None:  # its state is saved, and the next run evaluates it
      _stop(self.evaluated_step)


def _stop(step: int) -> NoReturn:
  say(f"Stopping at step {step} on SIGTERM; the state is saved.")
  raise Preempted


def _after_divergence(checkpoints: Checkpoints) -> str:
  """What to do next. The state of a step is saved before the loss that it leads to is known."""
  lower = "lower optimizer.learning_rate or optimizer.clip_norm and run again"
  newest, *others = checkpoints.steps() or [None]
  if newest is None:
    return f"{lower}. No checkpoint was saved: the run starts anew"
  before = f"continues from step {others[0]}" if others else "starts anew"
  return (
    f"{lower} to continue from step {newest}, the newest checkpoint. If that is ruined already, "
    f"delete {checkpoints.folder / str(newest)}: the run then {before}"
  )


class _Meter:
  """Reads metrics one step late, so that the host never waits for the step that it just sent."""

  def __init__(self, model: build.Model, writers: Writers, checkpoints: Checkpoints, step: int):
    self.model, self.writers, self.checkpoints = model, writers, checkpoints
    # All at once and now: a rate that is asked for later waits for the step that was just sent.
    self.rate_T = np.asarray(jax.vmap(model.optimizer.rate)(np.arange(model.run.steps)))
    self.pending: tuple[int, Any] | None = None
    self.sums: dict[str, float] = {}
    self.steps = 0
    self.first_step = step
    self.restart_clock()

  def restart_clock(self) -> None:
    """Starts timing anew, after a pause that is no training."""
    self.clock = time.perf_counter()
    self.clock_steps, self.clock_tokens = 0, 0.0

  def add(self, step: int, sums: Any) -> None:
    """Takes the metrics of a step and looks at those of the step before."""
    self.flush()
    self.pending = (step, sums)

  def flush(self) -> None:
    """Reads what is pending; raises DivergedError if it is not finite."""
    if self.pending is None:
      return
    step, sums = self.pending
    self.pending = None
    values = {name: float(value) for name, value in jax.device_get(sums).items()}
    for name, value in values.items():
      if not np.isfinite(value):
        advice = _after_divergence(self.checkpoints)
        raise DivergedError(f"{name} is {value} at step {step}; {advice}")
      self.sums[name] = self.sums.get(name, 0.0) + value
    self.steps += 1
    self.clock_steps += 1
    self.clock_tokens += values["tokens"]
    if step % self.model.run.log_every == 0 or step == self.model.run.steps:
      self._write(step)
    elif step == self.first_step:
      self.restart_clock()  # the first step includes compilation

  def _write(self, step):
    run = self.model.run
    elapsed = time.perf_counter() - self.clock
    rate = max(self.clock_steps, 1) / elapsed
    figures = metrics.train_report(self.sums, self.sums["tokens"], self.steps) | {
      "train/learning_rate": float(self.rate_T[step - 1]),
      "train/steps_per_second": rate,
      "train/tokens_per_second": self.clock_tokens / elapsed,
    }
    self.writers.write(step, figures)
    left = datetime.timedelta(seconds=round((run.steps - step) / rate))
    bound = figures.get("train/nelbo_bits_per_token")
    shown = (
      f"bound {bound:.4f} bits/token"
      if bound is not None
      else f"loss {figures['train/loss_nats_per_token']:.4f} nats/token"
    )
    say(
      f"step {step}/{run.steps}  {shown}  {rate:.2f} steps/s  "
      f"{figures['train/tokens_per_second']:,.0f} tokens/s  {left} left"
    )
    self.sums, self.steps = {}, 0
    self.restart_clock()
