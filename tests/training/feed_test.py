"""Tests of prefetching."""

import itertools
import threading
import time

import pytest

from vpe_jax.training import feed as feed_lib
from vpe_jax.training.feed import DEPTH, Feed


class _Source:
  """An iterator over 1, 2, ... that counts reads and may raise an error."""

  def __init__(self, stop=None, error=None):
    self.read, self.closed, self._stop, self._error = 0, False, stop, error

  def __iter__(self):
    return self

  def __next__(self):
    if self._error is not None and self.read == self._stop:
      raise self._error
    self.read += 1
    return self.read

  def close(self):
    self.closed = True


def test_batches_are_in_order_and_prefetching_is_bounded():
  source = _Source()
  feed = Feed(source, lambda batch: -batch)
  assert list(itertools.islice(feed, 50)) == [-n for n in range(1, 51)]
  feed.close()
  assert 50 <= source.read <= 50 + DEPTH + 1
  assert source.closed and not any(t.name == 'feed' for t in threading.enumerate())


def test_error_is_raised_after_the_preceding_batches():
  feed = Feed(_Source(stop=2, error=RuntimeError('disk')), lambda batch: batch)
  assert [next(feed), next(feed)] == [1, 2]
  with pytest.raises(RuntimeError, match='disk'):
    next(feed)
  feed.close()


def test_only_the_wait_for_idle_devices_counts(monkeypatch):
  """A slow batch that arrives while the devices compute costs nothing."""
  ticks, looks = itertools.count(), itertools.count()
  monkeypatch.setattr(feed_lib.time, 'perf_counter', lambda: float(next(ticks)))

  class Slow(_Source):
    def __next__(self):
      time.sleep(0.1)
      return super().__next__()

  feed = Feed(Slow(), lambda batch: batch)
  _, hidden = feed.get(lambda: True)
  assert hidden == 0.0 and next(ticks) == 0
  _, partly = feed.get(lambda: next(looks) < 3)
  assert partly == 1.0 and next(looks) == 4
  _, idle = feed.get()
  feed.close()
  assert idle == 1.0
