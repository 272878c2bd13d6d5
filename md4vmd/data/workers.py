"""Work shared out over processes, a bounded number of jobs ahead."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Workers:
  """Runs a function over jobs in order, in other processes if there are to be several."""

  def __init__(self, count: int):
    self._count = count
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None

  def __enter__(self):
    if self._count > 1:
      context = multiprocessing.get_context("spawn")
      self._pool = concurrent.futures.ProcessPoolExecutor(
        self._count, mp_context=context, initializer=_begin
      )
    return self

  def __exit__(self, *error):
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)

  def run(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """The results in order; a few jobs are read ahead and no more, so that memory is bounded.

    Raises:
      ChildProcessError: a worker came to an end before its job did.
    """
    if self._pool is None:
      yield from map(function, jobs)
      return
    try:
      yield from self._ahead(self._pool, function, jobs)
    except concurrent.futures.BrokenExecutor as error:
      raise ChildProcessError(
        "a worker came to an end before its job did, perhaps killed for want of memory; the same "
        "command continues, with fewer workers in less memory"
      ) from error

  def _ahead(self, pool, function, jobs):
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    for job in jobs:
      pending.append(pool.submit(function, job))
      if len(pending) > 2 * self._count:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def _begin() -> None:
  """A worker keeps to one core, and ends when the process that started it does."""
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  parent = multiprocessing.parent_process()
  assert parent is not None

  def watch():
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
