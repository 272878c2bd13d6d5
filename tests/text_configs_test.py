"""The settings of the published runs that configs of text claim, and how their data are made."""

import shlex

import pytest

from configs import owt, text8
from md4vmd.data import prepare_text
from md4vmd.data.tokens import Tokens

# As published: MD4-S and MD4-M on OpenWebText, MD4 on text8.
OWT = {
  "data": {"length": 1024},
  "schedule": {"name": "linear"},
  "network": {
    "width": 768,
    "depth": 12,
    "heads": 12,
    "mlp": "glu",
    "time_conditioning": True,
    "dropout": 0.02,
  },
  "objective": {"name": "md4"},
  "optimizer": {
    "learning_rate": 3e-4,
    "shape": "cosine",
    "warmup_steps": 2000,
    "b2": 0.999,
    "weight_decay": 0.03,
    "ema": 0.9999,
  },
  "run": {"steps": 1_000_000, "batch_size": 512},
}
MEDIUM = {
  "schedule": {"name": "cosine"},
  "network": {"width": 1024, "depth": 24, "heads": 16, "dropout": 0.0},
  "sampler": {"grid": "uniform"},
}
TEXT8 = {
  "data": {"length": 256, "stride": 1},
  "network": {"width": 768, "depth": 12, "heads": 12, "dropout": 0.05},
  "optimizer": {"learning_rate": 5e-4, "weight_decay": 0.03},
  "run": {"steps": 1_000_000, "batch_size": 512},
}


@pytest.mark.parametrize(
  ("config", "published"),
  [
    (owt.get_config("md4"), OWT),
    (owt.get_config("md4-medium"), OWT | MEDIUM),
    (owt.get_config("genmd4"), OWT | {"objective": {"name": "genmd4"}}),
    (owt.get_config("sedd"), OWT | {"objective": {"name": "sedd"}}),
    (text8.get_config("md4"), TEXT8),
  ],
  ids=["md4", "md4-medium", "genmd4", "sedd", "text8"],
)
def test_a_config_has_the_published_settings(config, published):
  found = {name: {key: config[name][key] for key in keys} for name, keys in published.items()}
  assert found == published


def test_other_variants_of_text8_train_on_windows_side_by_side():
  assert {text8.get_config(variant).data.stride for variant in text8.VARIANTS} == {None, 1}
  assert text8.get_config("small").data.stride is None


@pytest.mark.parametrize("variant", owt.VARIANTS)
def test_without_data_a_config_says_how_to_prepare_it(variant, monkeypatch):
  config = owt.get_config(variant)
  with pytest.raises(FileNotFoundError) as caught:
    Tokens(**{key: value for key, value in config.data.items() if key != "name"})
  command = str(caught.value).partition("prepare_text ")[2]
  asked = []
  monkeypatch.setattr(prepare_text, "prepare", asked.append)
  monkeypatch.setattr(prepare_text.shards, "summary", str)
  prepare_text.main(shlex.split(command))
  (options,) = asked
  assert (str(options.out), options.length) == (config.data.path, config.data.length)
  assert ("openwebtext" in options.source) == (variant not in ("lm1b", "small"))
  assert (options.split, options.unit, options.detokenizer) == (
    ("files", "line", "lm1b") if variant == "lm1b" else ("md4", "file", "none")
  )
