"""Prefetches batches to the devices in a background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from vpe_jax.contracts import Batch

DEPTH = 2  # prefetched batches
POLL = 0.002  # seconds between two looks at the devices while there is no batch


class Feed:
  """An iterator over device batches; `close` ends its thread.

  Prefetching doesn't advance the position in the data: a batch counts as seen after its step.
  """

  def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], Batch]):
    self._batches = batches
    self._put = put
    self._ready: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(DEPTH)
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._work, name='feed', daemon=True)
    self._thread.start()

  def __iter__(self) -> Feed:
    return self

  def __next__(self) -> Batch:
    return self.get()[0]

  def get(self, is_busy: Callable[[], bool] = lambda: False) -> tuple[Batch, float]:
    """The next batch, and the seconds for which the devices waited for it.

    Args:
      is_busy: whether the devices still compute the newest step; waiting costs nothing meanwhile.
    """
    item, idle_since = None, None
    while item is None:
      if idle_since is None and not is_busy():
        idle_since = time.perf_counter()
      with contextlib.suppress(queue.Empty):
        item = self._ready.get(timeout=POLL if idle_since is None else None)
    batch, error = item
    if error is not None:
      raise error
    return batch, 0.0 if idle_since is None else time.perf_counter() - idle_since

  def close(self) -> None:
    """Ends the thread and closes the underlying iterator."""
    self._stop.set()
    self._thread.join()
    close: Any = getattr(self._batches, 'close', None)
    if close is not None:
      close()

  def _work(self) -> None:
    try:
      for batch in self._batches:
        if not self._offer((self._put(batch), None)):
          return
      self._offer((None, StopIteration('the data ended before the run did')))
    except BaseException as error:  # Raised in the thread that requests the batch.
      self._offer((None, error))

  def _offer(self, item: tuple[Batch | None, BaseException | None]) -> bool:
    while not self._stop.is_set():
      try:
        self._ready.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False
