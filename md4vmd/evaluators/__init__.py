"""Measurements of a model. A new evaluator is one file and one line of TABLE."""

from md4vmd.evaluators.answers import Answers
from md4vmd.evaluators.any_order import AnyOrder
from md4vmd.evaluators.blocks import Blocks
from md4vmd.evaluators.exact import Exact
from md4vmd.evaluators.fid import FID
from md4vmd.evaluators.importance_weighted import ImportanceWeighted
from md4vmd.evaluators.latent import LatentUse
from md4vmd.evaluators.likelihood import Likelihood
from md4vmd.evaluators.sudoku import Sudoku
from md4vmd.evaluators.text_samples import TextSamples
from md4vmd.evaluators.token_power import TokenPower
from md4vmd.evaluators.zero_shot import ZeroShot

TABLE = {
  "likelihood": Likelihood,
  "exact": Exact,
  "blocks": Blocks,
  "any_order": AnyOrder,
  "importance_weighted": ImportanceWeighted,
  "latent": LatentUse,
  "sudoku": Sudoku,
  "text_samples": TextSamples,
  "token_power": TokenPower,
  "zero_shot": ZeroShot,
  "answers": Answers,
  "fid": FID,
}
