"""Masking schedules alpha(t). A new schedule is one file and one line of TABLE."""

from md4vmd.schedules.cosine import Cosine
from md4vmd.schedules.geometric import Geometric
from md4vmd.schedules.linear import Linear
from md4vmd.schedules.poly import Poly

TABLE = {"linear": Linear, "cosine": Cosine, "poly": Poly, "geometric": Geometric}
