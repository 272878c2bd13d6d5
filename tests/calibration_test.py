"""The fit of one factor on the logits, against what each factor gives by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import synthetic
from md4vmd import build, calibration, latents, networks, partitioning, train, train_state
from md4vmd.networks import Transformer, UNet
from tests import toys

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_config(**changes):
  config = synthetic.get_config("vmd-pairs")
  config.network.update({"width": 8, "depth": 1, "condition_width": 4})
  config.latent.width = 2
  config.run.update({"steps": 2, "batch_size": 8, "then": (), "calibrate": 4})
  config.optimizer.warmup_steps = 1
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize("denoiser", [
  Transformer(vocab_size=5, width=8, depth=1, heads=1),
  UNet(vocab_size=5, image_shape=(2, 2, 1), width=32, depth=1, heads=1),
])  # fmt: skip
def test_all_logits_are_multiplied(denoiser):
  network = networks.with_latent(denoiser, latents.TABLE["gaussian"](width=2), depth=1)
  zt_BxL, t_Bx1, z = jnp.array([[5, 1, 5, 2]]), jnp.ones((1, 1)), jnp.ones((1, 1, 2))
  params = toys.random_params(network, zt_BxL, t_Bx1, scale=0.2)
  logits = lambda params: (
    networks.bind(network, params).denoise(zt_BxL, t_Bx1, latent_BxGxZ=z).logits()
  )
  one, three = jax.jit(logits)(params), jax.jit(logits)(calibration.sharpened(params, 3.0))
  np.testing.assert_allclose(three, 3 * one, rtol=1e-5, atol=1e-6)
  assert float(jnp.ptp(one)) > 0.1


def test_the_best_factor_is_found_and_taking_it_shifts_all_others():
  model = build.model(make_config())
  rng = np.random.default_rng(0)
  off_start = lambda leaf: leaf + 0.5 * rng.normal(size=leaf.shape).astype(np.float32)
  with partitioning.use(model.mesh):
    params = jax.tree.map(off_start, train_state.initial(model).ema)
    factor, nats = calibration.fit(model, params)
    doubled = calibration.fit(model, calibration.sharpened(params, 2.0))[1]
  assert list(nats) == calibration.FACTORS.tolist() and nats[factor] == min(nats.values())
  for each in (0.5, 1.0, 2.0, 4.0):
    assert doubled[each] == pytest.approx(nats[2 * each], rel=1e-5)
  assert max(nats.values()) > min(nats.values()) + 0.01


def test_training_ends_with_the_factor_in_the_averaged_head_alone(tmp_path):
  states = []
  for draws in (0, 4):
    config = make_config(**{"run.calibrate": draws})
    folder = tmp_path / str(draws)
    train.train(config, folder)
    train.train(config, folder)  # a finished run is not calibrated again
    model = build.model(config)
    with partitioning.use(model.mesh):
      states.append(train_state.load_average(model, folder).state["ema"])
  plain, calibrated = states
  with partitioning.use(model.mesh):
    factor, _ = calibration.fit(model, plain)
  jax.tree.map(np.testing.assert_array_equal, calibrated, calibration.sharpened(plain, factor))
  assert factor != 1.0


@pytest.mark.parametrize("changes", [
  {"latent.name": "none", "objective.samples": 1},
  {"latent.switched_off": True, "objective.samples": 1},
  {"latent.name": "categorical", "latent.width": None},
  {"objective.form": "global", "objective.samples": 1},
  {"objective.form": "step", "objective.posterior_reads": "clean", "objective.samples": 1},
])  # fmt: skip
def test_a_model_without_such_draws_is_refused_before_training(changes, tmp_path):
  with pytest.raises(ValueError, match=r"set run\.calibrate=0"):
    train.train(make_config(**changes), tmp_path)


def test_a_negative_number_of_draws_is_refused():
  with pytest.raises(ValueError, match=r"run\.calibrate is -1; it must be at least 0"):
    build.model(make_config(**{"run.calibrate": -1}))
