"""Memory that a step frees on the host and that the next step wants again.

A step on CPUs allocates its temporaries anew. Blocks of more than 32 MB glibc takes from the kernel
and gives back each time, and clearing their pages can take a fifth of a step.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os

# Parameters of glibc's mallopt, by malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> bool:
  """Lets this process keep the memory that it frees; True if it does.

  Call it before jax uses a device: what threads allocate is kept if they start after it. With an
  accelerator installed, or without glibc, nothing is changed.
  """
  if _may_use_an_accelerator():
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
  if mallopt is None:
    return False
  # Blocks of any size come from one heap that never shrinks; other heaps hold no large ones.
  settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
  return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())


def _may_use_an_accelerator() -> bool:
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return False
  return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
