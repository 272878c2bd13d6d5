"""FID: the distance, the network's features, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from md4vmd import build
from md4vmd.evaluators import fid
from md4vmd.networks import inception
from md4vmd.samplers import Samples
from tests import shrunken


def test_the_distance_of_diagonal_gaussians_is_its_closed_form():
  rng = np.random.default_rng(0)
  mean_F, other_mean_F = rng.normal(size=(2, 6))
  deviation_F, other_deviation_F = rng.uniform(0.0, 2.0, size=(2, 6))
  turn_FxF, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  cov_FxF, other_cov_FxF = (
    turn_FxF @ np.diag(d_F**2) @ turn_FxF.T for d_F in (deviation_F, other_deviation_F)
  )
  expected = (
    np.square(mean_F - other_mean_F).sum() + np.square(deviation_F - other_deviation_F).sum()
  )
  found = fid.frechet(mean_F, cov_FxF, other_mean_F, other_cov_FxF)
  np.testing.assert_allclose(found, expected, rtol=1e-10)
  np.testing.assert_allclose(fid.frechet(mean_F, cov_FxF, mean_F, cov_FxF), 0.0, atol=1e-12)


def test_the_distance_of_covariances_that_do_not_commute_has_the_root_of_their_product():
  rng = np.random.default_rng(1)
  first_FxF, second_FxF = (a_FxF @ a_FxF.T for a_FxF in rng.normal(size=(2, 4, 4)))
  root = np.sqrt(np.linalg.eigvals(first_FxF @ second_FxF).real).sum()
  expected = np.trace(first_FxF) + np.trace(second_FxF) - 2 * root
  zero_F = np.zeros(4)
  found = fid.frechet(zero_F, first_FxF, zero_F, second_FxF)
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_moments_are_those_of_the_rows():
  rows_NxF = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]], np.float32)
  mean_F, cov_FxF = fid.moments(rows_NxF)
  assert mean_F.tolist() == [2.0, 2.0] and cov_FxF.tolist() == [[4.0, 3.0], [3.0, 3.0]]


@pytest.fixture(scope="module")
def arrays():
  """Arrays of the names and shapes of pt_inception-2015-12-05."""
  made = {
    "fc.weight": np.zeros((1008, 2048), np.float32),
    "Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64),
  }
  for i, (layer, leaves) in enumerate(inception.shapes().items()):
    height, width, inputs, outputs = leaves["kernel"].shape
    made[f"{layer}.conv.weight"] = np.full((outputs, inputs, height, width), 0.5, np.float32)
    for j, leaf in enumerate(("weight", "bias", "running_mean", "running_var")):
      made[f"{layer}.bn.{leaf}"] = np.full(outputs, 1.0 + i + j, np.float32)
  return made


def test_the_weights_become_2048_features_of_images_of_any_size(arrays):
  params = inception.read(arrays)
  assert len(params) == 94
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 21_785_568
  image = jax.ShapeDtypeStruct((3, 64, 32, 3), jnp.uint8)
  features = jax.eval_shape(inception.Inception().apply, {"params": params}, image)
  assert (features.shape, features.dtype) == ((3, 2048), jnp.float32)


def test_a_batch_norm_at_rest_is_one_affine_map(arrays):
  layer = "Mixed_6c.branch7x7_2"
  found = inception.read(arrays)[layer]
  weight, bias, mean, variance = (
    arrays[f"{layer}.bn.{leaf}"][0] for leaf in ("weight", "bias", "running_mean", "running_var")
  )
  assert found["kernel"].shape == (1, 7, 160, 160)
  x = 3.0
  expected = weight * (x - mean) / np.sqrt(variance + 1e-3) + bias
  np.testing.assert_allclose(x * found["scale"] + found["shift"], expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda a: a.pop("Conv2d_1a_3x3.bn.bias"), r"Conv2d_1a_3x3\.bn\.bias is missing"),
    (lambda a: a.update(more=np.zeros(1)), "more is extra"),
    (
      lambda a: a.update({"Mixed_7c.branch1x1.conv.weight": np.zeros((320, 2048))}),
      r"Mixed_7c\.branch1x1\.conv\.weight has shape \(320, 2048\)",
    ),
  ],
)
def test_other_weights_are_refused(arrays, change, words):
  changed = dict(arrays)
  change(changed)
  with pytest.raises(ValueError, match=f"pt_inception-2015-12-05: {words}"):
    inception.read(changed)


@pytest.fixture
def model(tmp_path):
  config = shrunken.config("cifar10", "small", folder=tmp_path)
  config.data.class_conditional = True
  return build.model(config)


def test_without_weights_nothing_is_called_fid(model):
  figures = fid.FID(model).run(0, {})
  assert list(figures) == ["convention"]
  assert "set evaluators.fid.weights_path" in figures["convention"]


def test_samples_of_all_classes_are_compared_with_the_images_of_the_split(model, tmp_path):
  evaluator = fid.FID(model, count=11, split="train", limit=20)
  evaluator._params, seen = {}, []
  evaluator._features = lambda params, x_BxL: jnp.asarray(x_BxL, jnp.float32)[:, :4]

  def draw(params, batch, key):
    seen.extend(batch.label_B[batch.weight_B > 0].tolist())
    assert (batch.x_BxL == 256).all() and batch.free_BxL.all()
    x_BxL = jnp.broadcast_to(batch.index_B[:, None], batch.x_BxL.shape)
    return Samples(x_BxL, x_BxL, batch.index_B)

  evaluator._sample = draw
  figures = evaluator.run(0, {})
  assert seen == [i % 3 for i in range(11)]
  source = model.dataset.split("train")
  images_NxF = np.stack([source[i]["x"][:4] for i in range(20)])
  made_NxF = np.repeat(np.arange(11.0)[:, None], 4, axis=1)
  expected = fid.frechet(*fid.moments(made_NxF), *fid.moments(images_NxF))
  np.testing.assert_allclose(figures["samples/fid"], expected, rtol=1e-9)
  assert (figures["samples/count"], figures["samples/network_calls_mean"]) == (11, 5.0)


def test_statistics_of_other_features_are_refused(tmp_path):
  path = tmp_path / "moments.npz"
  np.savez(path, mu=np.zeros(64), sigma=np.eye(64))
  with pytest.raises(ValueError, match=r"a mu of \(64,\) and a sigma of \(64, 64\)"):
    fid.read_moments(str(path))
  with pytest.raises(ValueError, match="has no mu and sigma"):
    fid.read_moments(str(tmp_path / "none.npz"))


def test_files_that_are_no_npz_or_damaged_are_refused(tmp_path):
  path = tmp_path / "moments.npz"
  with path.open("wb") as file:
    np.save(file, np.zeros(2048))
  single = path.read_bytes()
  np.savez_compressed(path, mu=np.arange(2048.0), sigma=np.ones((2048, 2048)))
  whole = path.read_bytes()
  middle = len(whole) // 2
  torn = whole[: middle - 20] + bytes(40) + whole[middle + 20 :]
  for wrong in (b"", b"PK\3\4 and no more", single, whole[:-100], whole[:middle], torn):
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r"statistics: .*moments\.npz has no mu and sigma: ."):
      fid.read_moments(str(path))
