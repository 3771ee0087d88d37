"""Prefetches batches to the devices in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vpe_jax.contracts import Batch

DEPTH = 2  # prefetched batches


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
    batch, error = self._ready.get()
    if error is not None:
      raise error
    return batch

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
