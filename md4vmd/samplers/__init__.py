"""Samplers: rules of unmasking, and the loop that runs them.

A new rule is one file and one line of TABLE.
"""

from functools import partial

from md4vmd.samplers.ancestral import Ancestral
from md4vmd.samplers.autoregressive import sample_blocks, sample_tokens
from md4vmd.samplers.confidence import Confidence
from md4vmd.samplers.loop import REFRESHES, Samples, sample
from md4vmd.samplers.token_ancestral import TokenAncestral
from md4vmd.schedules.grids import GRIDS, times

TABLE = {
  "ancestral": Ancestral,
  "top_prob": partial(Confidence, "top_prob"),
  "margin": partial(Confidence, "margin"),
  "entropy": partial(Confidence, "entropy"),
  "token_ancestral": TokenAncestral,
}

__all__ = [
  "GRIDS",
  "REFRESHES",
  "TABLE",
  "Ancestral",
  "Confidence",
  "Samples",
  "TokenAncestral",
  "sample",
  "sample_blocks",
  "sample_tokens",
  "times",
]
