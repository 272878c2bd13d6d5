"""Masked diffusion for discrete data in JAX: MD4 and the models measured against it."""

__version__ = "0.1.0"
