"""The optimizer: AdamW with warm-up, decay off norms and biases, and clipping by global norm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

SHAPES = ("constant", "cosine")
_DECAYED = ("kernel", "embedding", "head")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW (arXiv 1711.05101) and the exponential moving average of the parameters.

  Attributes:
    steps: number of training steps, the end of the cosine.
    learning_rate: its peak.
    shape: "constant" or "cosine" (down to 0) after a linear warm-up.
    warmup_steps: steps until the peak.
    b1: decay of the first moment.
    b2: decay of the second moment.
    weight_decay: on matrices; never on norms, biases, gates or shifts.
    clip_norm: largest global norm of the gradient; 0 for no clipping.
    ema: decay of the moving average; it starts low, min(ema, (1 + step) / (10 + step)).
  """

  steps: int
  learning_rate: float = 3e-4
  shape: str = "cosine"
  warmup_steps: int = 100
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.03
  clip_norm: float = 1.0
  ema: float = 0.9999

  def __post_init__(self):
    rules = [
      (self.shape in SHAPES, f"shape '{self.shape}' must be one of {', '.join(SHAPES)}"),
      (self.learning_rate > 0, f"learning_rate {self.learning_rate} must be positive"),
      (
        0 <= self.warmup_steps < self.steps,
        f"warmup_steps {self.warmup_steps} must be below run.steps {self.steps}",
      ),
      (0 <= self.ema < 1, f"ema {self.ema} must be in [0, 1)"),
      (0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"b1 {self.b1} and b2 {self.b2} must be in [0, 1)"),
      (self.weight_decay >= 0, f"weight_decay {self.weight_decay} must not be negative"),
      (self.clip_norm >= 0, f"clip_norm {self.clip_norm} must be positive, or 0 for none"),
    ]
    for holds, message in rules:
      if not holds:
        raise ValueError(f"optimizer {message}")

  def rate(self, step: Any) -> Any:
    """Learning rate at a step."""
    after = self.steps - self.warmup_steps
    tail = (
      optax.constant_schedule(self.learning_rate)
      if self.shape == "constant"
      else optax.cosine_decay_schedule(self.learning_rate, after)
    )
    warmup = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup_steps, 1))
    # The first update uses a rate above 0: the warm-up is read one step ahead.
    return optax.join_schedules([lambda i: warmup(i + 1), tail], [self.warmup_steps])(step)

  def transform(self) -> optax.GradientTransformation:
    """The optax transformation of mean gradients."""
    return optax.chain(
      _clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
      optax.adamw(self.rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=decayed),
    )

  def average(self, ema: Any, params: Any, step: jax.Array) -> Any:
    """The moving average after a step."""
    decay = jnp.minimum(self.ema, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
  """optax's, as one multiplication, which XLA fuses into the moments instead of one more pass."""

  def scaled(grads: Any, params: Any) -> Any:
    del params
    return optax.tree.scale(jnp.minimum(1.0, largest / optax.global_norm(grads)), grads)

  return optax.stateless(scaled)


def decayed(params: Any) -> Any:
  """True at matrices and embeddings. Layers are stacked, so names decide and not shapes."""

  def is_decayed(path, _):
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1] in _DECAYED  # a flax box may stand below the last name

  return jax.tree_util.tree_map_with_path(is_decayed, params)
