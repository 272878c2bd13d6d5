import json

import jax
import numpy as np
import pytest

from md4vmd import build, networks, sample, samplers, train_state
from md4vmd.checkpoints import Restored
from md4vmd.data import prompts
from tests import shrunken

pytestmark = pytest.mark.usefixtures("quick_compilation")

MASK = 27  # of text8's characters


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return shrunken.config("text8", "small", folder=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dataset(config):
  return build.model(config).dataset


@pytest.fixture(scope="module")
def weights(config):
  return train_state.initial(build.model(config)).ema


@pytest.fixture
def sample_untrained(weights, monkeypatch, tmp_path):
  """A function (config, settings of the sampler) -> the workdir with samples at initial weights."""

  def load(model, workdir, step):
    return Restored(0, {"ema": weights}, {})

  monkeypatch.setattr(sample.train_state, "load_average", load)

  def run(config, **settings):
    config = config.copy_and_resolve_references()
    config.sampler.update(settings)
    sample.sample(config, tmp_path)
    return tmp_path

  return run


def test_a_prompt_that_cannot_be_filled_is_named_by_its_place(config, sample_untrained, tmp_path):
  with pytest.raises(ValueError, match=r"^sampler\.prompt: the prompt 'to be' leaves nothing"):
    sample_untrained(config, prompt="to be")
  file = tmp_path / "prompts.jsonl"
  file.write_text('{"prompt": "a[MASK]"}\n{"prompt": "Hi [MASK]"}\n')
  with pytest.raises(ValueError, match=f"^{file}, line 2: 'H' is not a token"):
    sample_untrained(config, prompt="a[MASK]", prompts_file=str(file))
  assert not (tmp_path / "samples").exists()


def test_a_split_that_does_not_exist_is_named(config, sample_untrained):
  with pytest.raises(ValueError, match="split 'vaild' does not exist: use one of train, valid"):
    sample_untrained(config, split="vaild")


def test_prompts_are_infilled_and_written_line_by_line(config, sample_untrained, tmp_path):
  asked = ["to be [MASK:3] not", "[MASK:5] question"]
  file = tmp_path / "prompts.jsonl"
  file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
  workdir = sample_untrained(config, prompts_file=str(file), count=5, steps=4)
  lines = [json.loads(line) for line in (workdir / "samples/0.jsonl").read_text().splitlines()]
  assert [line["prompt"] for line in lines] == [prompt for prompt in asked for _ in range(5)]
  for line in lines:
    start, end = ("to be ", " not") if line["prompt"] == asked[0] else ("", " question")
    filled = line["text"].removeprefix(start).removesuffix(end)
    assert line["text"] == start + filled + end
    assert len(filled) == (3 if start else 5)
    assert "_" not in filled
    assert 1 <= line["calls"] <= 4
  assert len({line["text"] for line in lines}) > 5  # the samples of a prompt are not all the same
  arrays = np.load(workdir / "samples/0.npz")
  assert arrays["x_BxL"].shape == (10, 16)  # more than one batch of 8
  assert (arrays["x_BxL"][:5, 13:] == MASK).all()
  assert (arrays["call_BxL"][arrays["free_BxL"]] >= 0).all()
  assert (arrays["call_BxL"][~arrays["free_BxL"]] == -1).all()
  assert (workdir / "samples/0.txt").read_text() == "\n\n".join(x["text"] for x in lines) + "\n"


def test_samples_without_prompts_leave_no_jsonl_of_a_job_with_prompts(config, sample_untrained):
  folder = sample_untrained(config, prompt="to be [MASK:3]") / "samples"
  others = {"10.jsonl", "0-mine.png"}
  for name in others:
    (folder / name).touch()
  assert (folder / "0.jsonl").exists()
  with pytest.raises(ValueError):
    sample_untrained(config, prompt="to be")
  assert (folder / "0.jsonl").exists()  # a job that fails deletes nothing
  sample_untrained(config)
  own = {"0.txt", "0.npz", "0.png", "0.json"}
  assert {path.name for path in folder.iterdir()} == own | others


def test_samples_say_what_made_them(config, sample_untrained):
  workdir = sample_untrained(config, grid="uniform", steps=3, count=2)
  about = json.loads((workdir / "samples/0.json").read_text())
  assert about["checkpoint"] == str(workdir / "checkpoints/0")
  assert (about["step"], about["seed"]) == (0, config.seed)
  sampler = about["sampler"]
  assert (sampler["name"], sampler["grid"], sampler["steps"]) == ("ancestral", "uniform", 3)


@pytest.mark.parametrize(
  "settings, is_told",
  [
    ({"name": "margin"}, True),
    ({"name": "margin", "count": 1}, False),
    ({"name": "margin", "temperature": 1.0}, False),
    ({"name": "ancestral"}, False),
  ],
)
def test_samples_that_are_all_the_same_for_want_of_draws_are_told_of(
  config, sample_untrained, capsys, settings, is_told
):
  sample_untrained(config, **({"prompt": "a [MASK:12]", "count": 3, "steps": 3} | settings))
  told = "The samples of a start are all the same, 1 in 3: at sampler.temperature=0 no token"
  assert (told in capsys.readouterr().out) == is_told


@pytest.mark.parametrize("name", sorted(samplers.TABLE))
def test_no_sampler_changes_given_tokens_or_fills_what_is_not_free(
  make_network, config, dataset, name
):
  network, params = make_network(length=16, vocab_size=27)
  model = build.model(config)
  starts = [
    prompts.parse(dataset, prompt)
    for prompt in ("to be [MASK:4] be", "[MASK:16]", "a[MASK]b[MASK]c[MASK]", "x[MASK:9]")
  ]
  tokens_BxL, free_BxL = map(np.stack, zip(*starts, strict=True))
  step = build.sampler(name, temperature=1.0)
  fns = networks.bind(network, params)
  if step.is_by_token:
    fns = fns._replace(token_power=lambda: np.linspace(0.5, 2.0, 27))
  times = samplers.times("cosine", 3)
  done = jax.jit(
    lambda key: samplers.sample(
      key,
      fns,
      model.schedule,
      step,
      times,
      tokens_BxL=tokens_BxL,
      free_BxL=free_BxL,
      vocab_size=27,
    )
  )(jax.random.key(0))
  x_BxL = np.asarray(done.x_BxL)
  np.testing.assert_array_equal(x_BxL[~free_BxL], tokens_BxL[~free_BxL])
  assert (x_BxL[free_BxL] < MASK).all() and (x_BxL[free_BxL] >= 0).all()
  assert (np.asarray(done.calls_B) <= 3).all()


def test_samples_are_the_same_for_the_same_seed_and_others_for_another(config, sample_untrained):
  texts = []
  for seed in (0, 0, 1):
    changed = config.copy_and_resolve_references()
    changed.seed = seed
    texts.append((sample_untrained(changed) / "samples/0.txt").read_text())
  assert texts[0] == texts[1] != texts[2]


def test_samples_need_a_checkpoint(config, tmp_path):
  with pytest.raises(FileNotFoundError, match="train first"):
    sample.sample(config, tmp_path)


@pytest.fixture
def pixels(tmp_path, monkeypatch):
  """A function (settings of the sampler) -> (arrays of samples/, dataset) of an untrained model."""
  config = shrunken.config("mnist", "transformer", folder=tmp_path)
  config.data.class_conditional = True
  model = build.model(config)
  weights = train_state.initial(model).ema
  load = lambda *_: Restored(0, {"ema": weights}, {})
  monkeypatch.setattr(sample.train_state, "load_average", load)

  def run(**settings):
    changed = config.copy_and_resolve_references()
    changed.sampler.update(settings)
    sample.sample(changed, tmp_path)
    return np.load(tmp_path / "samples/0.npz"), model.dataset

  return run


def test_part_of_an_image_is_painted_anew_and_the_rest_kept(pixels, tmp_path):
  arrays, dataset = pixels(inpaint="left", count=3)
  source = dataset.split("valid")
  is_left_L = np.arange(64) % 8 < 4
  for i in range(3):
    assert arrays["free_BxL"][i].tolist() == is_left_L.tolist()
    kept_L = source[i]["x"][~is_left_L]
    np.testing.assert_array_equal(arrays["x_BxL"][i][~is_left_L], kept_L)
    assert arrays["label_B"][i] == source[i]["label"]
  assert (arrays["call_BxL"][:, is_left_L] >= 0).all()
  names = {path.name for path in (tmp_path / "samples").iterdir()}
  assert names == {"0.npz", "0.png", "0-film.png", "0.gif", "0.json"}


def test_samples_go_through_the_labels_that_are_asked_for_or_all(pixels):
  assert pixels(count=4)[0]["label_B"].tolist() == [0, 1, 2, 0]
  assert pixels(count=3, labels=(2, 1))[0]["label_B"].tolist() == [2, 1, 2]
  with pytest.raises(
    ValueError, match=r"sampler.labels are \(3,\) and the model knows classes 0 to 2"
  ):
    pixels(labels=(3,))
  with pytest.raises(ValueError, match=r"sampler\.inpaint must be one of left, right"):
    pixels(inpaint="middle")
  with pytest.raises(ValueError, match=r"sampler\.inpaint is 'left' and there is a prompt too"):
    pixels(inpaint="left", split="valid", prompts_file="", prompt="00[MASK:63]")


def test_what_only_images_and_classes_have_is_refused_for_text(config, sample_untrained):
  with pytest.raises(ValueError, match=r"sampler\.inpaint is 'top' and this data has no images"):
    sample_untrained(config, inpaint="top")
  with pytest.raises(ValueError, match="the model knows no classes"):
    sample_untrained(config, labels=(1,))
