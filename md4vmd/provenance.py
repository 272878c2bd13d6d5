"""What made a file: versions of the libraries, and the commit of this code."""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

import md4vmd

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record() -> dict[str, str]:
  """Versions by name, and "commit" where the code is a git checkout or came with its COMMIT."""
  versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  own = {"md4vmd": md4vmd.__version__, "python": platform.python_version()}
  return own | versions | ({"commit": commit()} if commit() else {})


@functools.cache
def commit() -> str:
  """The commit that is checked out, ending in "+" if tracked files differ.

  Outside of git it is what the file COMMIT says, which `launch/tpu_pod.sh` writes; "" without it.
  """
  if not (_ROOT / ".git").exists():
    file = _ROOT / "COMMIT"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
  try:
    head = _git("rev-parse", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
  except (OSError, subprocess.SubprocessError):
    return ""


def _git(*arguments: str) -> str:
  command = ["git", "-C", str(_ROOT), *arguments]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
  return done.stdout.strip()


def source(workdir: pathlib.Path, step: int, initial: str) -> str:
  """Where the parameters of a job are from: a checkpoint, or `initial` if the workdir has none."""
  folder = workdir / "checkpoints"
  return initial if initial and not folder.is_dir() else str(folder / str(step))
