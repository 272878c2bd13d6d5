"""Freed memory is kept where steps run on CPUs, and there alone."""

import importlib.util
import subprocess
import sys

import pytest

from md4vmd import host_memory

# Faults of the second of two equal blocks, of a thread as jax's steps have one.
FAULTS = """
import ctypes, resource, threading
from md4vmd import host_memory

def faults_of_a_block():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  libc = ctypes.CDLL(None)
  libc.malloc.restype = ctypes.c_void_p
  block = libc.malloc(ctypes.c_size_t(2**27))
  ctypes.memset(block, 1, 2**27)
  libc.free(ctypes.c_void_p(block))
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

is_kept = host_memory.keep()
faults = []
thread = threading.Thread(target=lambda: faults.extend(faults_of_a_block() for _ in range(2)))
thread.start()
thread.join()
print(is_kept, faults[1])
"""


def test_a_block_that_was_freed_costs_no_page_when_it_is_wanted_again(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  command = [sys.executable, "-c", FAULTS]
  is_kept, faults = subprocess.run(command, capture_output=True, text=True).stdout.split()
  if is_kept == "False":
    pytest.skip("this C library is not glibc")
  assert int(faults) < 32  # of 32,768 pages, or 64 large ones


@pytest.mark.parametrize("name", ["jax_plugins", "libtpu"])
def test_nothing_changes_beside_an_accelerator(name, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: module == name or None)
  monkeypatch.setattr(host_memory.ctypes, "CDLL", None)
  assert not host_memory.keep()
