"""VMD: masked diffusion whose tokens of one step share a latent (arXiv 2510.23606).

p(x_S | x_t) = integral of p(z | x_t) prod_{n in S} mu_n(x_n | x_t, z) dz lets the tokens that are
revealed together depend on each other. Which figures bound -log p(x) is said for each form.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from md4vmd import forward, rngs
from md4vmd.interfaces import Batch, Draws, LossTerms, ModelFns, Schedule
from md4vmd.objectives import latent_scores
from md4vmd.objectives.latent_scores import Decoded, Terms
from md4vmd.objectives.md4 import MD4
from md4vmd.rngs import Noise
from md4vmd.schedules.grids import times

FORMS = ("global", "step", "jump", "paper")


@dataclasses.dataclass(frozen=True)
class VMD:
  """Masked diffusion with a latent z, in four forms.

    global: E_q(z|x)[MD4's loss of mu(x_t, z)] + KL(q(z|x) || p(z)), the divergence once per
      sequence. Bounds -log p of the sampler that holds one z.
    step: a step of a T-step sampler, S the tokens that it reveals: E_q(z|x_S,x_t)[-log mu_S] +
      KL(q(z|x_S,x_t) || p(z|x_t)) where S is not empty, times T. Bounds -log p of the sampler
      that draws z anew at every step.
    jump: -log p(x | x_t) in one step from a chosen x_t. Bounds that jump alone; it trains a model
      for the sampler that draws z anew at every step. With `blocks`, jumps end at the end of a
      block whose predecessors are visible; from all-masked blocks alone (all_masked=1) they bound
      -log p of the sampler that decodes block after block, each in one step.
    paper: the published surrogate, the time weight on cross-entropy and divergence alike. Not a
      bound on -log p(x): it undershoots where tokens depend on each other.

  Without a latent all forms train MD4's denoiser; `global` is then MD4.

  Attributes:
    schedule: masking schedule.
    vocab_size: V.
    form: one of FORMS.
    samples: K draws of the importance-weighted bound (arXiv 1509.00519); for `jump` and `step`.
    sum_values: whether an enumerated latent is summed exactly. If not, `samples` of its values are
      drawn from p(z | x_t, x_S), which is the posterior where the prior follows Bayes' rule.
    estimator: of MD4's loss in `global` and `paper`.
    steps: T of the estimator `steps`.
    step_counts: the numbers of steps T that `step` trains for, equally often.
    grid: grid of times of `step`.
    posterior_reads: "revealed", q(z | x_S, x_t); or "clean", q(z | x, x_t), a looser bound whose
      mean over S is exact; for `step`.
    all_masked: share of jumps that start from all tokens masked; the others mask a number of
      tokens that is uniform.
    blocks: equal stretches of the sequence that are decoded from left to right; for `jump`.
    kl_hold: training steps at the start in which the divergence has weight 0 in the loss; of an
      enumerated latent, in which all values count as equally probable.
    kl_warmup: steps after them in which it rises to 1.
    kl_warmup_masks: which masks that concerns in the forms that draw z again for every mask:
      "whole" ones alone, or "all".
    free_nats: divergence per latent that the loss does not charge (arXiv 1606.04934).
    block_size: tokens of a block of block diffusion, as of `MD4`; for `global`. Every block has a
      latent and pays its divergence: the bound is sum_b {E_q(z_b|x)[MD4's loss of x_b given x_<b
      and z_b] + KL(q(z_b|x) || p(z_b))}.
  """

  schedule: Schedule
  vocab_size: int
  form: str = "jump"
  samples: int = 1
  sum_values: bool = True
  estimator: str = "count"
  steps: int | None = None
  step_counts: tuple[int, ...] = (1,)
  grid: str = "uniform"
  posterior_reads: str = "revealed"
  all_masked: float = 0.5
  blocks: int = 1
  kl_hold: int = 0
  kl_warmup: int = 0
  kl_warmup_masks: str = "whole"
  free_nats: float = 0.0
  block_size: int | None = None

  def __post_init__(self):
    is_single = self.form in ("global", "paper") or self.posterior_reads == "clean"
    rules = [
      (self.form in FORMS, f"form is '{self.form}'; it must be one of {', '.join(FORMS)}"),
      (self.samples >= 1, f"samples is {self.samples}; it must be at least 1"),
      (
        self.samples == 1 or not is_single,
        f"samples is {self.samples}; one time inside the logarithm of several draws is no bound: "
        "'global', 'paper' and posterior_reads 'clean' take 1",
      ),
      (
        self.posterior_reads in ("revealed", "clean"),
        f"posterior_reads is '{self.posterior_reads}'; it must be 'revealed' or 'clean'",
      ),
      (
        len(self.step_counts) > 0 and min(self.step_counts) >= 1,
        f"step_counts is {self.step_counts}; it must name at least one number, each at least 1",
      ),
      (
        self.blocks == 1 or (self.form == "jump" and self.blocks > 1),
        f"blocks is {self.blocks}; it must be at least 1, and 1 for forms other than 'jump'",
      ),
      (0 <= self.all_masked <= 1, f"all_masked is {self.all_masked}; it must be in [0, 1]"),
      (
        self.kl_warmup_masks in ("whole", "all"),
        f"kl_warmup_masks is '{self.kl_warmup_masks}'; it must be 'whole' or 'all'",
      ),
      (
        min(self.kl_hold, self.kl_warmup, self.free_nats) >= 0,
        "kl_hold, kl_warmup and free_nats must not be negative",
      ),
      (
        self.block_size is None or self.form == "global",
        f"block_size is {self.block_size} and the form '{self.form}'; blocks are for 'global'",
      ),
      (
        self.samples == 1 or self.free_nats == 0,
        "free_nats need a divergence of their own, which several samples do not have",
      ),
    ]
    for holds, message in rules:
      if not holds:
        raise ValueError(f"objective {message}")
    self._md4()  # checks the estimator
    times(self.grid, 1)  # checks the grid

  @property
  def attends(self) -> str:
    """See `Objective.attends`."""
    return self._md4().attends

  @property
  def latent_refresh(self) -> str:
    """See `Objective.latent_refresh`."""
    if self.form in ("jump", "step"):
      return "step"
    return "once" if self.block_size is None else "block"

  @property
  def convention(self) -> str:
    """See `Objective.convention`."""
    if self.form == "global":
      sampler = f"T={self.steps}" if self.steps else "continuous-time"
      unit = f"block of {self.block_size}" if self.block_size else "sequence"
      return f"VMD bound 'global' on -log p of the {sampler} sampler with one latent per {unit}"
    if self.form == "step":
      counts = ", ".join(str(count) for count in self.step_counts)
      return (
        f"VMD bound 'step' on -log p of the sampler with T={counts} steps on the {self.grid} grid, "
        f"a new latent every step, K={self.samples}, posterior reads {self.posterior_reads} tokens"
      )
    if self._is_bounding_jump:
      return (
        f"VMD bound 'jump' on -log p of the sampler that decodes {self.blocks} block(s), each in "
        f"one step with its own latent, K={self.samples}"
      )
    return f"VMD '{self.form}', a training loss that does not bound -log p(x)"

  @property
  def _is_bounding_jump(self) -> bool:
    return self.form == "jump" and self.all_masked == 1.0

  def bound(self, steps: int, grid: str) -> VMD:
    """A `global` bound for models that hold z, a `step` bound for those that redraw it.

    Models of several blocks are scored at one step per block, whatever the grid. A posterior that
    was trained on jumps has read all masked tokens; it keeps doing so.
    """
    plain = self.charged_in_full()
    if self.form in ("global", "paper"):
      estimator = self._md4().bound(steps, grid).estimator
      return dataclasses.replace(plain, form="global", estimator=estimator)
    plain = dataclasses.replace(plain, sum_values=True)
    if self.blocks > 1:
      return dataclasses.replace(plain, all_masked=1.0)
    if self.form == "jump" and steps > 1:
      plain = dataclasses.replace(plain, posterior_reads="clean", samples=1)
    return dataclasses.replace(plain, form="step", step_counts=(steps,), grid=grid)

  def charged_in_full(self) -> VMD:
    """The same without what spares the divergence in training."""
    return dataclasses.replace(self, kl_hold=0, kl_warmup=0, free_nats=0.0)

  def _md4(self) -> MD4:
    return MD4(
      self.schedule, self.vocab_size, self.estimator, self.steps, block_size=self.block_size
    )

  def draw(self, noise: Noise, batch: Batch) -> Draws:
    """Times, masks, weights, and a key per example for latents."""
    key_B = noise.keys("latent")
    if self.form in ("global", "paper"):
      return dataclasses.replace(self._md4().draw(noise, batch), key_B=key_B)
    u_BxG = noise.grid("time", 1)
    uniform_BxL = noise.uniform("mask", batch.x_BxL.shape[1:])
    draw = self._draw_jump if self.form == "jump" else self._draw_step
    return dataclasses.replace(draw(u_BxG, uniform_BxL, batch), key_B=key_B)

  def _draw_jump(self, u_BxG, uniform_BxL, batch):
    """One place u stands for a block and for the number of its tokens that are masked."""
    place_B = u_BxG[:, 0] * self.blocks
    block_B = jnp.minimum(place_B.astype(jnp.int32), self.blocks - 1)
    u_BxG = (place_B - block_B)[:, None]
    size_BxG = forward.group_sizes(self._block(batch.free_BxL, block_B), 1)
    partial_BxG = (u_BxG - self.all_masked) / max(1.0 - self.all_masked, 1e-6)
    count_BxG = forward.count_from_uniform(jnp.clip(partial_BxG, 0.0, 1.0 - 1e-7), size_BxG)
    count_BxG = jnp.where(u_BxG < self.all_masked, size_BxG, count_BxG)
    until_Bx1 = (block_B[:, None] + 1.0) / self.blocks
    visible_BxG = until_Bx1 - count_BxG / jnp.maximum(size_BxG, 1) / self.blocks
    t_BxG = self.schedule.alpha_inverse(visible_BxG)
    weight_BxG = jnp.full_like(t_BxG, self.blocks)
    return Draws(t_BxG, weight_BxG, uniform_BxL, count_BxG, block_B=block_B)

  def _draw_step(self, u_BxG, uniform_BxL, batch):
    """One place u stands for a number of steps and for one of its steps."""
    del batch
    counts_J, most = jnp.asarray(self.step_counts), max(self.step_counts)
    grids = [times(self.grid, count) for count in self.step_counts]
    times_JxK = jnp.stack([jnp.pad(grid, (0, most + 1 - len(grid))) for grid in grids])
    place_BxG = u_BxG * len(grids)
    j_BxG = place_BxG.astype(jnp.int32)
    count_BxG = counts_J[j_BxG]
    i_BxG = jnp.minimum(((place_BxG - j_BxG) * count_BxG).astype(jnp.int32), count_BxG - 1)
    t_BxG, s_BxG = times_JxK[j_BxG, i_BxG], times_JxK[j_BxG, i_BxG + 1]
    reveal_BxG = forward.reveal_probability(self.schedule, t_BxG, s_BxG)
    weight_BxG = count_BxG.astype(t_BxG.dtype)
    return Draws(t_BxG, weight_BxG, uniform_BxL, reveal_BxG=reveal_BxG)

  def loss(
    self,
    fns: ModelFns,
    batch: Batch,
    draws: Draws,
    *,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> LossTerms:
    """See `interfaces.LossTerms`; parts are the cross-entropies and the divergence."""
    if self.form == "global" and fns.prior is None:
      return self._md4().loss(fns, batch, draws, step=step, dropout_key=dropout_key)
    is_masked_BxL, scored_BxL = self._masked(batch, draws)
    zt_BxL = forward.mask_tokens(batch, is_masked_BxL, self.vocab_size)
    terms = self._terms(fns, batch, draws, scored_BxL, zt_BxL)

    def decode(z_BxKxGxZ: jax.Array | None) -> Decoded:
      count = 1 if z_BxKxGxZ is None else z_BxKxGxZ.shape[1]
      repeat = lambda array: jnp.repeat(array, count, axis=0)
      inputs = {} if self.block_size is None else {"clean_BxL": repeat(batch.x_BxL)}
      if z_BxKxGxZ is not None:
        inputs["latent_BxGxZ"] = z_BxKxGxZ.reshape(-1, *z_BxKxGxZ.shape[2:])
      prediction = fns.denoise(
        repeat(zt_BxL),
        repeat(draws.t_BxG),
        label_B=None if batch.label_B is None else repeat(batch.label_B),
        dropout_key=dropout_key,
        **inputs,
      )
      return Decoded(prediction, repeat(batch.x_BxL), repeat(terms.scored_BxL))

    charge_BxG = self._kl_charge(step, batch, scored_BxL, draws)
    if fns.prior is None:
      no_kl_BxG = jnp.zeros_like(charge_BxG)
      score = latent_scores.of_one_draw(decode(None), terms, no_kl_BxG, charge_BxG)
    elif fns.encode is None and self.sum_values:
      if self.form in ("global", "paper"):
        raise ValueError(
          f"objective form '{self.form}' needs a posterior and an enumerated latent has none; set "
          "objective.sum_values=False, latent.enumerated=False, or form 'jump' or 'step'"
        )
      prior = fns.prior(terms.seen_BxL, label_B=batch.label_B)
      score = latent_scores.of_all_values(decode, prior, terms, draws.key_B, charge_BxG)
    else:
      score = self._score_draws(fns, decode, batch, terms, draws, charge_BxG)
    loss, nats_BxG, parts_BxG = score
    nelbo_B, parts = nats_BxG.sum(-1), {name: part.sum(-1) for name, part in parts_BxG.items()}
    if self.form == "paper" or (self.form == "jump" and not self._is_bounding_jump):
      surrogates = {f"surrogate_{name}": part_B for name, part_B in parts.items()}
      return LossTerms(loss, None, batch.tokens_B, surrogates | {"surrogate_nats": nelbo_B})
    steps = MD4(self.schedule, self.vocab_size, "steps", 1)
    ends = (self._md4() if self.form == "global" else steps).ends(batch)
    return LossTerms(loss, sum(ends.values(), start=nelbo_B), batch.tokens_B, parts | ends)

  def _score_draws(self, fns, decode, batch, terms, draws, charge_BxG):
    """The score of draws from the posterior; an enumerated latent's reads x_S as if visible."""
    prior = fns.prior(terms.seen_BxL, label_B=batch.label_B)
    if fns.encode is None:
      known_BxL = jnp.where(terms.read_BxL, batch.x_BxL, terms.seen_BxL)
      posterior = jax.lax.stop_gradient(fns.prior(known_BxL, label_B=batch.label_B))
    else:
      posterior = fns.encode(batch.x_BxL, terms.seen_BxL, terms.read_BxL, label_B=batch.label_B)
    z_BxKxGxZ = posterior.sample(rngs.fold_each(draws.key_B, 1), self.samples)
    ratio_BxKxG = prior.log_prob(z_BxKxGxZ) - posterior.log_prob(z_BxKxGxZ)
    if self.samples > 1:
      return latent_scores.of_draws(decode, z_BxKxGxZ, ratio_BxKxG, terms, charge_BxG)
    kl_BxG = posterior.kl(prior)
    kl_BxG = -ratio_BxKxG[:, 0] if kl_BxG is None else kl_BxG
    return latent_scores.of_one_draw(decode(z_BxKxGxZ), terms, kl_BxG, charge_BxG, self.free_nats)

  def _masked(self, batch, draws):
    """(what is masked, those of them that are scored)."""
    if self.blocks == 1:
      is_masked_BxL = self._md4().is_masked(batch, draws)
      return is_masked_BxL, is_masked_BxL
    block_BxL = self._block(batch.free_BxL, draws.block_B)
    scored_BxL = forward.masked_by_count(draws.count_BxG, draws.uniform_BxL, block_BxL)
    later_BxL = self._number_L(batch.free_BxL)[None, :] > draws.block_B[:, None]
    return scored_BxL | (batch.free_BxL & later_BxL), scored_BxL

  def _block(self, free_BxL, block_B):
    """The free tokens of the chosen blocks."""
    return free_BxL & (self._number_L(free_BxL)[None, :] == block_B[:, None])

  def _number_L(self, array_BxL):
    """Number of the block of every position."""
    length = array_BxL.shape[1]
    if length % self.blocks:
      raise ValueError(f"objective blocks {self.blocks} do not divide {length} tokens")
    return jnp.arange(length) // (length // self.blocks)

  def _terms(self, fns, batch, draws, is_masked_BxL, zt_BxL):
    """What is scored; examples that only fill the batch have weight 0."""
    weight_BxG = draws.weight_BxG * batch.weight_B[:, None]
    if self.form == "global":
      clues_BxL = forward.mask_tokens(batch, batch.free_BxL, self.vocab_size)
      is_scored_BxG = forward.group_sizes(batch.free_BxL, weight_BxG.shape[1]) > 0
      once_BxG = is_scored_BxG * batch.weight_B[:, None]
      return Terms(is_masked_BxL, weight_BxG, once_BxG, clues_BxL, batch.free_BxL)
    if self.form in ("jump", "paper"):
      weight_BxG *= forward.group_sizes(is_masked_BxL, weight_BxG.shape[1]) > 0
      return Terms(is_masked_BxL, weight_BxG, weight_BxG, zt_BxL, is_masked_BxL)
    length, groups = is_masked_BxL.shape[1], weight_BxG.shape[1]
    if self.posterior_reads == "clean" and fns.encode is not None:
      masked_BxG = forward.group_sizes(is_masked_BxL, groups)
      some_BxG = 1.0 - (1.0 - draws.reveal_BxG) ** masked_BxG  # P(S is not empty)
      weights = weight_BxG * draws.reveal_BxG, weight_BxG * some_BxG
      return Terms(is_masked_BxL, *weights, zt_BxL, is_masked_BxL)
    uniform_BxL = rngs.uniform_each(rngs.fold_each(draws.key_B, 0), (length,))
    reveal_BxL = forward.group_to_token(draws.reveal_BxG, length)
    revealed_BxL = is_masked_BxL & (uniform_BxL < reveal_BxL)
    weight_BxG *= forward.group_sizes(revealed_BxL, groups) > 0
    return Terms(revealed_BxL, weight_BxG, weight_BxG, zt_BxL, revealed_BxL)

  def _kl_charge(self, step, batch, scored_BxL, draws):
    """charge_BxG, the weight of the divergence in the loss at a training step.

    It rises. In the forms that draw z again for every mask, it does so by default only where a
    block is masked as a whole: where some of it is visible it is 1 from the start, or the denoiser
    could learn to read z instead of the visible tokens.
    """
    ones_BxG = jnp.ones_like(draws.weight_BxG)
    if self.kl_hold + self.kl_warmup == 0:
      return ones_BxG
    charge = jnp.clip((step - self.kl_hold) / max(self.kl_warmup, 1), 0.0, 1.0)
    if self.form in ("global", "paper") or self.kl_warmup_masks == "all":
      return charge * ones_BxG
    free_BxL = batch.free_BxL
    if draws.block_B is not None:
      free_BxL = self._block(free_BxL, draws.block_B)
    is_whole_BxG = forward.group_sizes(scored_BxL != free_BxL, ones_BxG.shape[1]) == 0
    return jnp.where(is_whole_BxG, charge, ones_BxG)
