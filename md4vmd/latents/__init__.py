"""Latent variables: distributions over z, and the families that a config names.

A distribution is of the latents of a batch, one per group: z_BxKxGxZ are K draws of each. A family
turns the raw outputs of networks into distributions. A new family is one file and one line of
TABLE.
"""

from md4vmd.latents.base import Distribution, Family, Support
from md4vmd.latents.categorical import CategoricalFamily, Codes, Table
from md4vmd.latents.gaussian import Gaussian, GaussianFamily
from md4vmd.latents.mixture import Mixture, MixtureFamily

__all__ = [
  "TABLE",
  "CategoricalFamily",
  "Codes",
  "Distribution",
  "Family",
  "Gaussian",
  "GaussianFamily",
  "Mixture",
  "MixtureFamily",
  "Support",
  "Table",
]

TABLE = {
  "gaussian": GaussianFamily,
  "mixture": MixtureFamily,
  "categorical": CategoricalFamily,
}
