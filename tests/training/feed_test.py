"""Tests of reading ahead."""

import itertools
import threading

import pytest

from vpe_jax.training.feed import DEPTH, Feed


class _Source:
  """Counts, notes what was read, and can be closed."""

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


def test_batches_come_in_order_and_reading_ahead_is_bounded():
  source = _Source()
  feed = Feed(source, lambda batch: -batch)
  assert list(itertools.islice(feed, 50)) == [-n for n in range(1, 51)]
  feed.close()
  assert 50 <= source.read <= 50 + DEPTH + 1
  assert source.closed and not any(t.name == 'feed' for t in threading.enumerate())


def test_an_error_reaches_the_reader_after_the_good_batches():
  feed = Feed(_Source(stop=2, error=RuntimeError('disk')), lambda batch: batch)
  assert [next(feed), next(feed)] == [1, 2]
  with pytest.raises(RuntimeError, match='disk'):
    next(feed)
  feed.close()
