"""Denoisers. A new network is one file and one line of TABLE."""

from md4vmd.networks.bundle import bind
from md4vmd.networks.import_md4 import import_md4
from md4vmd.networks.latent import LatentNetwork, with_latent
from md4vmd.networks.token_power import TokenPowerNetwork
from md4vmd.networks.transformer import Transformer
from md4vmd.networks.unet import UNet, UViT

TABLE = {"transformer": Transformer, "unet": UNet, "uvit": UViT}

__all__ = [
  "TABLE",
  "LatentNetwork",
  "TokenPowerNetwork",
  "Transformer",
  "UNet",
  "UViT",
  "bind",
  "import_md4",
  "with_latent",
]
