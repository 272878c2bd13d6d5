"""The benchmarks of docs/pods.md on tiny models: what they count, print and write."""

import json

import jax
import numpy as np
import pytest

from benchmarks import checkpoint, evaluation, loader, roofline, tpu_compile
from benchmarks.train_step import Case
from md4vmd import train_state

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
  "--config=configs/text8.py",
  "--config.data.length=16",
  "--config.network.width=16",
  "--config.network.depth=2",
  "--config.network.heads=2",
  "--config.run.batch_size=8",
]


@pytest.fixture
def here(monkeypatch):
  """A slice that consists of the devices of this process."""
  monkeypatch.setattr(tpu_compile, "topology_devices", lambda name: jax.devices())


def test_the_training_step_is_compiled_without_data_and_counted(here, tmp_path, capsys):
  tpu_compile.main([*TINY, "--topology=here", "--json", str(tmp_path / "out.json")])
  figures = json.loads((tmp_path / "out.json").read_text())
  assert figures["here/fits"] == 1 and figures["here/chips"] == jax.device_count()
  assert figures["here/state_bytes"] > 4 * 4 * 2 * 16 * 16  # the state is among the arguments
  assert figures["here/matrix_flops"] > 6 * 8 * 16 * 2 * (4 * 16 * 16 + 3 * 16 * 64)
  assert figures["here/collective_bytes"] == 0 or jax.device_count() > 1
  assert "here" in capsys.readouterr().out


@pytest.mark.parametrize(
  "words",
  [
    "Used 58.90G of 15.75G hbm. Exceeded hbm capacity by 43.15G.",
    "on HBM, the memory required for HLO temporaries (58.90G) exceeds available HBM (15.75G).",
  ],
)
def test_what_does_not_fit_is_said_with_both_sizes(here, monkeypatch, capsys, words):
  message = f"RESOURCE_EXHAUSTED: Ran out of memory {words}"

  def fail(*_):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(tpu_compile, "compile_step", fail)
  with pytest.raises(SystemExit) as end:
    tpu_compile.main([*TINY, "--topology=here"])
  assert end.value.code == 3
  assert "no: 58.9 of 15.8 GB" in capsys.readouterr().out


def test_data_that_is_not_described_is_asked_for():
  config = tpu_compile.parse_config(["--config=configs/synthetic.py"])
  with pytest.raises(ValueError, match="data 'synthetic' needs --length and --vocab_size"):
    tpu_compile.stand_in(config, None, None)
  dataset = tpu_compile.stand_in(config, 10, 4)
  assert (dataset.vocab_size, dataset.length) == (10, 4)


def test_boards_are_described_by_their_size():
  config = tpu_compile.parse_config(["--config=configs/sudoku.py", "--config.data.size=9"])
  dataset = tpu_compile.stand_in(config)
  assert (dataset.vocab_size, dataset.length) == (9, 81)


def test_classes_are_asked_for():
  config = tpu_compile.parse_config(["--config=configs/cifar10.py:class"])
  assert tpu_compile.stand_in(config, classes=10).classes == 10
  with pytest.raises(ValueError, match=r"--classes=0 and data\.class_conditional=True"):
    tpu_compile.stand_in(config)


def test_images_are_described_by_their_shape():
  config = tpu_compile.parse_config(["--config=configs/imagenet64.py"])
  dataset = tpu_compile.stand_in(config, None, None, "64x64x3")
  assert (dataset.vocab_size, dataset.length, dataset.image_shape) == (256, 12288, (64, 64, 3))
  with pytest.raises(ValueError, match="--image_shape=64 must be like 64x64x3"):
    tpu_compile.stand_in(config, None, None, "64")


def test_the_loader_reads_every_example_of_the_file(tmp_path):
  x_NxL = np.arange(40 * 8).reshape(40, 8).astype(np.uint16)
  loader.write(tmp_path / "x.array_record", x_NxL)
  source = loader.Records(tmp_path / "x.array_record")
  assert len(source) == 40
  np.testing.assert_array_equal([source[i]["x"] for i in range(40)], x_NxL)


def test_the_loader_prints_its_rates(tmp_path):
  out = tmp_path / "out.json"
  loader.main(
    ["--length=8", "--examples=64", "--batch_size=4", "--rounds=2", "--batches=2", f"--json={out}"]
  )
  figures = json.loads(out.read_text())
  assert figures["array_record/tokens_per_second"] > 0 and figures["array_record_over_memory"] > 0


def test_a_checkpoint_is_timed_beside_the_step(tmp_path):
  case = Case("tiny", 11, 8, 1, 16, 2)
  figures = checkpoint.measure(case, tmp_path, rounds=1)
  assert all(figures[name] > 0 for name in ("step_s", "stall_s", "disk_s", "stall_steps"))
  assert figures["parameters"] == train_state.count_parameters(
    checkpoint.make_state(case, checkpoint.Optimizer(steps=1000)).params
  )


def test_evaluation_is_timed_beside_training(monkeypatch, tmp_path):
  monkeypatch.setattr(evaluation, "CASES", (Case("tiny", 11, 8, 1, 16, 2),))
  out = tmp_path / "out.json"
  evaluation.main(["--rounds=1", f"--json={out}"])
  figures = json.loads(out.read_text())
  assert figures["tiny/over_training_step"] > 0 and figures["tiny/tokens_per_second"] > 0


def test_the_roofline_divides_by_the_measured_peak(tmp_path):
  out = tmp_path / "out.json"
  roofline.main([*TINY, "--rounds=2", "--matrix_size=64", f"--json={out}"])
  figures = json.loads(out.read_text())
  per_second = figures["flops_per_token"] * figures["tokens_per_second"]
  assert figures["mfu"] == pytest.approx(per_second / figures["peak_flops_per_second"], rel=1e-6)
