"""Latent distributions against numerical integrals, listed sums and their own draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from md4vmd import latents

RNG = np.random.default_rng(0)
DRAWS = 20_000


def gaussian(batch=2, groups=1, width=2, seed=0):
  rng = np.random.default_rng(seed)
  return latents.Gaussian(
    jnp.asarray(rng.normal(size=(batch, groups, width))),
    jnp.asarray(0.5 * rng.normal(size=(batch, groups, width))),
  )


def keys(batch=2):
  return jax.random.split(jax.random.key(0), batch)


def test_a_gaussians_log_density_is_scipys(x64):
  q, z = gaussian(), RNG.normal(size=(2, 5, 1, 2))
  expected = scipy.stats.norm.logpdf(
    z, q.mean_BxGxZ[:, None], np.exp(q.log_scale_BxGxZ)[:, None]
  ).sum(-1)
  np.testing.assert_allclose(q.log_prob(jnp.asarray(z)), expected, rtol=1e-12)


@pytest.mark.parametrize("make", [
  lambda: (gaussian(), gaussian(seed=1)),
  lambda: tuple(
    latents.CategoricalFamily(codes=3, classes=4, enumerated=False).make_posterior(
      jnp.asarray(np.random.default_rng(seed).normal(size=(2, 1, 12))))
    for seed in (0, 1)
  ),
])  # fmt: skip
def test_the_closed_divergence_is_the_mean_log_ratio_of_draws(make):
  q, p = make()
  z = q.sample(keys(), DRAWS)
  ratio_BxK = np.asarray(q.log_prob(z) - p.log_prob(z))[..., 0]
  error_B = ratio_BxK.std(axis=1, ddof=1) / np.sqrt(DRAWS)
  kl_B = np.asarray(q.kl(p))[:, 0]
  assert (kl_B > 10 * error_B).all()
  assert (np.abs(ratio_BxK.mean(1) - kl_B) < 4 * error_B).all()


def test_a_mixtures_log_density_is_the_log_of_the_weighted_sum_and_its_draws_follow_it(x64):
  family = latents.MixtureFamily(width=1, components=3)
  raw = RNG.normal(size=(2, 1, family.prior_size))
  p = family.make_prior(jnp.asarray(raw))
  grid = np.linspace(-15, 15, 6001)
  density_BxK = np.exp(p.log_prob(jnp.asarray(np.tile(grid, (2, 1)))[:, :, None, None]))[..., 0]
  np.testing.assert_allclose(density_BxK.sum(1) * (grid[1] - grid[0]), 1.0, rtol=1e-6)
  z_BxK = np.asarray(p.sample(keys(), DRAWS))[..., 0, 0]
  for b in range(2):
    cdf = np.cumsum(density_BxK[b]) * (grid[1] - grid[0])
    assert scipy.stats.kstest(z_BxK[b], lambda z, cdf=cdf: np.interp(z, grid, cdf)).pvalue > 1e-3


@pytest.mark.parametrize("enumerated", [True, False])
def test_codes_are_normalised_and_drawn_as_often_as_they_should(enumerated):
  family = latents.CategoricalFamily(codes=2, classes=3, components=2, enumerated=enumerated)
  p = family.make_prior(jnp.asarray(RNG.normal(size=(1, 1, family.prior_size))))
  listed = latents.Table(jnp.zeros((1, 1, 9)), 2, 3, family.scale).support().z_JxZ
  log_p_J = np.asarray(p.log_prob(listed[None, :, None]), np.float64)[0, :, 0]
  assert np.exp(log_p_J).sum() == pytest.approx(1.0, abs=1e-5)
  if enumerated:
    np.testing.assert_allclose(p.support().log_p_BxGxJ[0, 0], log_p_J, rtol=1e-5)
  else:
    assert p.support() is None
  z_KxZ = np.asarray(p.sample(keys(1), DRAWS))[0, :, 0]
  drawn_J = (np.abs(z_KxZ[:, None] - np.asarray(listed)).max(-1) < 1e-5).sum(0)
  assert drawn_J.sum() == DRAWS
  assert (
    scipy.stats.chisquare(drawn_J, DRAWS * np.exp(log_p_J) / np.exp(log_p_J).sum()).pvalue > 1e-3
  )


@pytest.mark.parametrize(
  "family",
  [
    latents.GaussianFamily(width=2),
    latents.MixtureFamily(width=2, components=3),
    latents.CategoricalFamily(codes=2, classes=3, components=2, enumerated=False),
    latents.CategoricalFamily(codes=2, classes=3),
  ],
)
def test_the_expectation_is_the_mean_of_draws(family):
  raw = np.random.default_rng(0).normal(size=(2, 1, family.prior_size))
  p = family.make_prior(jnp.asarray(raw))
  z_BxKxZ = np.asarray(p.sample(keys(), DRAWS), np.float64)[:, :, 0]
  error_BxZ = z_BxKxZ.std(axis=1, ddof=1) / np.sqrt(DRAWS)
  assert (np.abs(z_BxKxZ.mean(1) - p.expectation()[:, 0]) < 4 * error_BxZ).all()


def test_the_joint_table_can_tie_its_codes_and_a_product_cannot():
  family = latents.CategoricalFamily(codes=2, classes=2)
  tied = family.make_prior(jnp.array([[[10.0, -10.0, -10.0, 10.0]]]))
  z_KxZ = np.asarray(tied.sample(keys(1), 500))[0, :, 0].reshape(500, 2, 2).argmax(-1)
  assert (z_KxZ[:, 0] == z_KxZ[:, 1]).all() and 0 < z_KxZ.mean() < 1


def test_straight_through_draws_carry_the_gradient_of_the_soft_ones():
  family = latents.CategoricalFamily(codes=1, classes=3, enumerated=False)
  value = jnp.array([1.0, 2.0, 4.0])

  def mean(raw):
    return (family.make_posterior(raw).sample(keys(1), 64) @ value).mean()

  raw = jnp.zeros((1, 1, 3))
  slope = jax.grad(mean)(raw)[0, 0]
  assert slope[2] > 0 > slope[0]


@pytest.mark.parametrize(
  ("family", "zero_is_standard"),
  [
    (latents.GaussianFamily(width=3), True),
    (latents.MixtureFamily(width=3, components=2), False),
    (latents.CategoricalFamily(codes=6, classes=8), False),
  ],
)
def test_a_posterior_of_zeros_is_the_standard_prior(family, zero_is_standard):
  q = family.make_posterior(jnp.zeros((1, 1, family.posterior_size)))
  p = family.make_prior(jnp.zeros((1, 1, family.prior_size)))
  z = q.sample(keys(1), 10)
  assert z.shape == (1, 10, 1, family.width)
  np.testing.assert_allclose(q.log_prob(z), p.log_prob(z), rtol=1e-5)
  assert (q.kl(p) is not None) or not zero_is_standard


@pytest.mark.parametrize("products", [1, 2])
def test_straight_through_draws_of_codes_reach_the_divergence(products, x64):
  """A Gumbel-softmax has the direction of the exact gradient; its length depends on temperature."""
  rng = np.random.default_rng(1)
  raw = jnp.asarray(rng.normal(size=(1, 1, 1, 1, 4)))
  other = jnp.asarray(rng.normal(size=(1, 1, products, 1, 4)))
  log_weight = jnp.full((1, 1, products), -jnp.log(products))
  p = latents.Codes(log_weight, jax.nn.log_softmax(other))
  make = lambda raw: latents.Codes(jnp.zeros((1, 1, 1)), jax.nn.log_softmax(raw))

  def drawn(raw, key):
    q = make(raw)
    z = q.sample(key[None], 1)
    return jnp.sum(q.log_prob(z) - p.log_prob(z))

  def exact(raw):
    log_q_A = jax.nn.log_softmax(raw)[0, 0, 0, 0]
    log_p_A = jax.nn.logsumexp(p.log_weight_BxGxM[0, 0, :, None] + p.log_p_BxGxMxCxA[0, 0, :, 0], 0)
    return jnp.sum(jnp.exp(log_q_A) * (log_q_A - log_p_A))

  found = jax.vmap(jax.grad(drawn), (None, 0))(raw, jax.random.split(jax.random.key(0), DRAWS))
  mean, true = found.mean(0).ravel(), jax.grad(exact)(raw).ravel()
  lengths = np.linalg.norm(mean), np.linalg.norm(true)
  assert mean @ true / np.prod(lengths) > 0.95
  assert 0.5 < lengths[0] / lengths[1] < 1.1


@pytest.mark.parametrize(
  ("make", "rule"),
  [
    (lambda: latents.GaussianFamily(width=0), "width is 0"),
    (lambda: latents.GaussianFamily(prior="flat"), "prior 'flat' of a gaussian must be one of"),
    (lambda: latents.MixtureFamily(prior="standard"), "must be one of learned, conditional"),
    (lambda: latents.MixtureFamily(components=0), "components 0 must be at least 1"),
    (lambda: latents.CategoricalFamily(classes=1), "classes is 1; it must be at least 2"),
    (lambda: latents.CategoricalFamily(scale=0.0), "scale 0.0"),
    (lambda: latents.CategoricalFamily(9, 10, enumerated=True), "1,000,000,000 values"),
  ],
)
def test_settings_that_mean_nothing_are_refused(make, rule):
  with pytest.raises(ValueError, match=rule):
    make()
