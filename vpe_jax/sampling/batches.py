"""Maps a function over many batch elements in batches of one size, with one compiled program."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

Progress = Callable[[int, int], None]
QUIET_SECONDS = 5.0  # before a progress bar appears


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
  """A progress bar on stderr, as a function for `in_batches`; short calls show none.

  A call with several phases, such as drafts and then images, has a bar for each. In a log file, a
  line is added once a minute.
  """
  interval, start = 0.5 if sys.stderr.isatty() else 60.0, time.monotonic()
  bars: list[tqdm] = []

  def show(finished: int, total: int) -> None:
    if bars and (total != bars[-1].total or finished < bars[-1].n):
      bars.pop().close()
    is_long = finished < total and time.monotonic() - start >= QUIET_SECONDS
    if not bars and is_long:
      bars.append(tqdm(total=total, initial=finished, unit='image', mininterval=interval))
    elif bars:
      bars[-1].update(finished - bars[-1].n)

  try:
    yield show
  finally:
    for bar in bars:
      bar.close()


def in_batches(
  run: Callable[[Any], Any], inputs: Any, batch_size: int, progress: Progress | None = None
) -> Any:
  """Calls `run` on `batch_size` elements at a time; returns the results [N, ...] as numpy arrays.

  Results are fetched while the next batch is computed.

  Args:
    run: maps a batch to its results, both trees of arrays [batch_size, ...].
    inputs: a tree of arrays [N, ...], N at least 1.
    batch_size: elements per call; the last batch is padded with its first element.
    progress: called with (elements finished, N) after each batch.
  """
  count, pending, results = len(jax.tree.leaves(inputs)[0]), None, []

  def fetch(finished: int) -> None:
    if pending is not None:
      results.append(jax.device_get(pending))
      if progress:
        progress(finished, count)

  for start in range(0, count, batch_size):
    indices = np.arange(start, start + batch_size)
    indices[indices >= count] = start
    result = run(jax.tree.map(lambda leaf, indices=indices: jnp.asarray(leaf[indices]), inputs))
    fetch(start)
    pending = result
  fetch(count)
  return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *results)
