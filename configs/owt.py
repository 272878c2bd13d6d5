"""OpenWebText in the tokens of GPT-2, and any other text that is prepared in the same way.

Paper: MD4 (arXiv 2406.04329): 12 layers x 768, sequences of 1024, batch 512, 1M steps; validation
perplexity (on the 2 % held out) 22.13 for MD4, 21.80 for GenMD4, 24.10 for its SEDD, 16.64 for MD4
at 24 layers. The paper holds out 2 % of the shuffled sequences, our split `md4` 2 % of the
documents by their hash, so that no document is on both sides; the figures compare up to that.
MDLM's 23.21 is on its own held-out documents (the split `mdlm`) and does not compare.

Variants:
  md4 (default): the settings of the paper; its continuous-time bound by counting, the estimator
    with the least noise.
  md4-medium: 24 layers x 1024, the cosine schedule, no dropout.
  genmd4: md4 with a learned schedule for every token and its own sampler.
  vmd: md4 with a Gaussian latent read by a second network of half the depth, trained on the bounds
    of samplers with 16 to 256 steps.
  sedd: md4 trained by score entropy.
  ar: the same transformer from left to right; its likelihood is exact.
  block4: block diffusion (BD3-LM, arXiv 2503.09573) in blocks of 4 tokens.
  block8: the same in blocks of 8.
  block16: the same in blocks of 16.
  lm1b: md4 on the One Billion Word Benchmark, 128 tokens a sequence.
  small: 13M parameters, 3 layers x 128 and 128 tokens, for two CPU cores; MD4 by tilted counts, as
    in configs/text8.py.
Data: python -m md4vmd.data.prepare_text --source hub:Skylion007/openwebtext \
  --tokenizer gpt2:FOLDER --out data/owt --workers 16
For FineWeb-Edu --source hub:HuggingFaceFW/fineweb-edu --hub_config sample-10BT, for lm1b
  --source 'FOLDER/training*/news.en-*' --split files --valid 'FOLDER/heldout*/news.en.*' \
  --unit line --detokenizer lm1b --length 128 --out data/lm1b, which holds out the published files.
Command: python -m md4vmd.main --config=configs/owt.py:md4
Hardware: md4 on a v5e 4x4 slice or more, 9.2 GB per chip at batch 512 (python -m
  benchmarks.tpu_compile --config=configs/owt.py:md4 --topology=v5e:4x4), 624 MFLOP per token, some
  5e11 tokens; md4-medium on v5e 8x8 with --config.mesh.fsdp=8, 7.4 GB per chip, and not on 4x4, 2.1
  GFLOP per token; genmd4, vmd, ar and block16 on v5e 4x4, 7.6 to 13.1 GB; sedd, block4 and block8
  were not compiled.
Cost: not run at full size; small as measured in docs/results.md.
Zero-shot: --mode=evaluate with --config.evaluators.zero_shot.sets naming the files.
"""

from configs import common

BLOCKS = {"block4": 4, "block8": 8, "block16": 16}
# Options of prepare_text by variant, "" for the others: what a run without its data answers.
PREPARE = {
  "": "--source hub:Skylion007/openwebtext --tokenizer gpt2:FOLDER",
  "lm1b": "--source 'FOLDER/training*/news.en-*' --split files --valid 'FOLDER/heldout*/news.en.*' "
  "--unit line --detokenizer lm1b --tokenizer gpt2:FOLDER",
  "small": "--source 'TEXTS/*.jsonl.gz' --tokenizer gpt2:FOLDER",
}
VARIANTS = ["md4", "md4-medium", "genmd4", "vmd", "sedd", "ar", *BLOCKS, "lm1b", "small"]


def get_config(variant: str = "md4"):
  """The config of a model."""
  if variant not in VARIANTS:
    raise common.unknown_variant(variant, VARIANTS)
  config = common.base()
  config.data.update({"name": "tokens", "path": "data/owt", "length": 1024, "verify": True})
  config.data.prepare = PREPARE.get(variant, PREPARE[""])
  config.network.update(
    {
      "width": 768,
      "depth": 12,
      "heads": 12,
      "mlp": "glu",
      "time_conditioning": True,
      "condition_width": 768,
      "dropout": 0.02,
      "dtype": "bfloat16",
      "remat": "dots",
    }
  )
  config.optimizer.update(
    {"learning_rate": 3e-4, "warmup_steps": 2000, "b2": 0.999, "weight_decay": 0.03, "ema": 0.9999}
  )
  config.run.update({"steps": 1_000_000, "batch_size": 512, "microbatches": 4, "log_every": 100})
  config.run.update({"checkpoint_every": 10_000, "evaluate_every": 50_000, "then": ("evaluate",)})
  config.sampler.update({"steps": 256, "count": 4})
  config.evaluators.likelihood.draws = 4
  config.evaluators.zero_shot = common.ConfigDict(
    {
      "sets": (),
      "conventions": ("radd-v1", "mdlm-v1"),
      "draws": 4,
      "limit": common.placeholder(int),
      "calls": 8,
    }
  )
  config.evaluators.answers = common.ConfigDict(
    {"path": "", "draws": 16, "limit": common.placeholder(int)}
  )
  if variant == "md4-medium":
    config.network.update({"width": 1024, "depth": 24, "heads": 16, "dropout": 0.0})
    config.schedule.name = "cosine"
    config.sampler.grid = "uniform"
  if variant == "genmd4":
    config.objective.update({"name": "genmd4"})
    config.sampler.name = "token_ancestral"
    config.evaluators.token_power = {}
  if variant == "vmd":
    config.network.open_gates = True
    config.latent.update({"name": "gaussian", "width": 128, "reader_depth": 6})
    config.objective.update({"name": "vmd", "form": "step"})
    config.objective.update({"step_counts": (16, 32, 64, 128, 256), "kl_warmup": 100_000})
    config.objective.grid = config.sampler.grid
    config.evaluators.latent = {"limit": 64}
  if variant == "sedd":
    config.objective.name = "sedd"
  if variant == "ar":
    config.objective.update({"name": "ar"})
    config.network.time_conditioning = False
    config.evaluators.likelihood.draws = 1  # nothing is drawn
    config.evaluators.zero_shot.draws = 1
    config.evaluators.answers.draws = 1
  if variant in BLOCKS:
    config.objective.block_size = BLOCKS[variant]
  if variant == "lm1b":
    config.data.update({"path": "data/lm1b", "length": 128})
    config.sampler.steps = 128
  if variant == "small":
    config.data.update({"path": "data/text", "length": 128})
    config.objective.estimator = "tilted"
    config.network.update({"width": 128, "depth": 3, "heads": 2, "mlp": "swiglu", "dropout": 0.0})
    config.network.update({"time_conditioning": False, "dtype": "float32", "remat": "none"})
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50, "b2": 0.99, "ema": 0.99})
    config.run.update({"steps": 1000, "batch_size": 16, "microbatches": 1, "log_every": 20})
    config.run.update({"checkpoint_every": 100, "evaluate_every": 0})
    config.sampler.steps = 64
  return config
