"""The contracts between the rooms of md4vmd, and the legend of its array names.

Arrays with two or more axes carry them in the name: `x_BxL` has shape [B, L].

  B  batch (sequences)          L  length (tokens of a sequence)
  V  vocabulary, mask excluded  P  vocabulary, padded as it is stored
  G  groups; G divides L        Z  latent width
  K  steps, draws or positions  D  features            N  rows, B*L

Values are nats and sums until `metrics.report`. Time runs from t=0 (clean) to t=1 (all masked).
The mask id is V, the first id after the vocabulary.

The group axis gives one code path: times are `t_BxG`. MD4, SEDD and VMD use G=1; block diffusion
uses G = L / block_size, and a group is the set of consecutive tokens that share one time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Batch:
  """A batch of sequences.

  Attributes:
    x_BxL: clean tokens, int32 in [0, V).
    weight_B: 1.0 for an example that counts, 0.0 for one that only fills the last batch.
    index_B: number of the example in its split, the same on any number of processes.
    given_BxL: True where the token is a clue: visible at every time, never masked or scored.
    scored_BxL: True where the token counts; False on padding and on prompts.
    label_B: class of the example, for class-conditional models.
  """

  x_BxL: jax.Array
  weight_B: jax.Array
  index_B: jax.Array
  given_BxL: jax.Array | None = None
  scored_BxL: jax.Array | None = None
  label_B: jax.Array | None = None

  @property
  def free_BxL(self) -> jax.Array:
    """True where a token may be masked and is scored: neither a clue nor padding."""
    free_BxL = jnp.ones(self.x_BxL.shape, bool)
    if self.given_BxL is not None:
      free_BxL &= ~self.given_BxL
    if self.scored_BxL is not None:
      free_BxL &= self.scored_BxL
    return free_BxL

  @property
  def tokens_B(self) -> jax.Array:
    """Number of scored tokens of each example, 0 where the example only fills the batch."""
    return self.free_BxL.sum(-1) * self.weight_B


@flax.struct.dataclass
class Draws:
  """The random part of a loss, drawn once for the global batch; microbatches slice axis 0.

  Attributes:
    t_BxG: time of each group, or what the loss turns into one where it depends on parameters.
    weight_BxG: weight of the group's cross-entropies in the loss.
    uniform_BxL: i.i.d. U[0, 1) per token, from which the loss decides what is masked.
    count_BxG: number of free tokens to mask in each group; None where tokens are masked
      independently with probability 1 - alpha(t).
    reveal_BxG: probability that a masked token is revealed in the step that is scored; None where
      no step is.
    block_B: number of the block that is scored, of those decoded from left to right; None where
      the sequence is one.
    key_B: a key per example for what only the parameters can draw, such as latents.
  """

  t_BxG: jax.Array
  weight_BxG: jax.Array
  uniform_BxL: jax.Array
  count_BxG: jax.Array | None = None
  reveal_BxG: jax.Array | None = None
  block_B: jax.Array | None = None
  key_B: jax.Array | None = None


@flax.struct.dataclass
class LossTerms:
  """What an objective returns for a batch.

  Attributes:
    loss: differentiated scalar, a sum over the batch; the train step divides it once by the
      number of scored tokens of the global batch.
    nelbo_B: reported bound on -log p(x) per example in nats, without gradient; 0 where the example
      only fills the batch; None where the objective is no bound.
    tokens_B: scored tokens per example.
    parts: diagnostics per example in nats; those of a bound sum to nelbo_B.
  """

  loss: jax.Array
  nelbo_B: jax.Array | None
  tokens_B: jax.Array
  parts: dict[str, jax.Array]


class Schedule(Protocol):
  """A masking schedule: a frozen dataclass of functions that act elementwise on any shape."""

  def alpha(self, t: jax.Array) -> jax.Array:
    """Probability that a token is visible at time t."""
    ...

  def masked(self, t: jax.Array) -> jax.Array:
    """1 - alpha(t), the probability that it is masked, with all its digits near t = 0."""
    ...

  def dalpha(self, t: jax.Array) -> jax.Array:
    """Derivative of alpha, at most 0."""
    ...

  def alpha_inverse(self, a: jax.Array) -> jax.Array:
    """The time t at which alpha(t) = a."""
    ...

  def weight(self, t: jax.Array) -> jax.Array:
    """-alpha'(t) / (1 - alpha(t)), the weight of the continuous-time bound."""
    ...


class Prediction(Protocol):
  """The denoiser's distribution mu over V tokens at every position, never held as [B, L, V].

  It is a pytree, lives inside one traced function and never crosses vmap, scan or cond.
  """

  @property
  def vocab_size(self) -> int:
    """V, the size of the vocabulary without the mask."""
    ...

  def weighted_nll(self, x_BxL: jax.Array, weight_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of weight * -log mu[x], the unweighted nats_BxL without gradient).

    The weights are constants. Rows of weight 0 cost nothing and report 0 nats.
    """
    ...

  def weighted_loss(
    self,
    row_loss: Callable[..., Any],
    x_BxL: jax.Array,
    weight_BxL: jax.Array,
    values_V: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum of weight * row_loss, its unweighted nats_BxL, -log mu[x] as nll_BxL).

    `row_loss` is a function of `md4vmd.row_losses`. The sum is differentiable in the values too;
    weights, nats and nll carry no gradient.
    """
    ...

  def map_rows(
    self,
    function: Callable[..., Any],
    where_BxL: jax.Array,
    *arguments_BxL: jax.Array,
    rows_at_once: int = 64,
  ) -> Any:
    """Applies `function(logits_KxV, *arguments_K) -> pytree of [K]` to the rows chosen by `where`.

    Returns the pytree with leaves [B, L], zero elsewhere. Logits exist for `rows_at_once` rows
    at a time. Not differentiable.
    """
    ...

  def logits(self) -> jax.Array:
    """logits_BxLxV in float32, for vocabularies of at most 1024 tokens."""
    ...


class ModelFns(NamedTuple):
  """A network bound to its parameters, as pure functions; None marks a role that it lacks.

  denoise: (zt_BxL, t_BxG | None, *, label_B=None, latent_BxGxZ=None, dropout_key=None) ->
    Prediction; without a dropout key it is deterministic. A network that attends to blocks also
    needs the clean tokens, clean_BxL=. With cache=, tokens_BxK stand behind the tokens of the cache
    and it returns (Prediction, cache that holds them too).
  encode: (x_BxL, zt_BxL, where_BxL, *, label_B=None) -> latents.Distribution q(z | x_S, z_t), S
    being `where`; None where the latent is enumerated.
  prior: (zt_BxL, *, label_B=None) -> latents.Distribution p(z | z_t); None without a latent.
  token_power: () -> power_V, w of the schedule alpha(t) = 1 - t^w of each token; None where all
    tokens share one schedule.
  init_cache: (batch, length) -> an empty cache, any pytree; None where every token sees all others.
  block_size: tokens that see each other, in a network that has a cache; None where each sees those
    to its left.
  """

  denoise: Callable[..., Any]
  encode: Callable[..., Any] | None = None
  prior: Callable[..., Any] | None = None
  token_power: Callable[[], jax.Array] | None = None
  init_cache: Callable[[int, int], Any] | None = None
  block_size: int | None = None


class Objective(Protocol):
  """A training objective and the bound that it reports.

  One that factorises the sequence from left to right also says what the network's tokens may see:
  `attends`, "left" or "blocks", and the `block_size` of the latter. Others need not speak of it.
  """

  @property
  def latent_refresh(self) -> str:
    """When sampling draws the latent as this objective assumes: "once", "block" or "step"."""
    ...

  @property
  def convention(self) -> str:
    """What the reported figure is, in words, for the record of an evaluation."""
    ...

  def bound(self, steps: int, grid: str) -> Objective:
    """The objective whose `nelbo_B` is reported for a model trained with this one.

    Where the bound depends on the sampler, it is that of `steps` steps over `grid`.
    """
    ...

  def draw(self, noise: Any, batch: Batch) -> Draws:
    """Draws times, counts and mask uniforms for the whole batch from an `rngs.Noise`."""
    ...

  def loss(
    self,
    fns: ModelFns,
    batch: Batch,
    draws: Draws,
    *,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> LossTerms:
    """Loss and bound of a batch, or of a slice of it with the same slice of its draws."""
    ...


class Plan(NamedTuple):
  """What one step of a sampler does, decided before the network is called.

  Attributes:
    s_B: time after the step, per sequence.
    t_B: time before the step.
    reveal_BxL: True where a token is revealed; None where the choice needs the prediction.
  """

  s_B: jax.Array
  t_B: jax.Array
  reveal_BxL: jax.Array | None


class SamplerStep(Protocol):
  """One rule of unmasking; a frozen dataclass. `samplers.loop` runs it, with a key per sequence."""

  @property
  def is_by_token(self) -> bool:
    """Whether it samples models with a schedule for each token, and no others."""
    ...

  def init(
    self,
    key_B: jax.Array,
    zt_BxL: jax.Array,
    is_masked_BxL: jax.Array,
    times: jax.Array,
    schedule: Schedule,
  ) -> Any:
    """State of the sampler: what can be drawn before any prediction exists."""
    ...

  def plan(self, state: Any, i: jax.Array) -> Plan:
    """The times of step i and, where it is known already, the positions revealed."""
    ...

  def fill(
    self,
    key_B: jax.Array,
    zt_BxL: jax.Array,
    is_masked_BxL: jax.Array,
    prediction: Prediction,
    plan: Plan,
    schedule: Schedule,
  ) -> jax.Array:
    """zs_BxL: the sequences after the step."""
    ...


class Evaluator(Protocol):
  """A measurement of a model on a whole split."""

  def run(self, step: int, params: Any) -> dict[str, Any]:
    """Flat mapping from names with units, such as `valid/nelbo_bits_per_token`, to values.

    Strings are shown beside the numbers; "picture", an image, is saved beside the JSON file.
    """
    ...
