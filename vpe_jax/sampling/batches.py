"""Maps a function over many batch elements in batches of one size, with one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Progress = Callable[[int, int], None]


def in_batches(
  run: Callable[[Any], Any], inputs: Any, batch_size: int, progress: Progress | None = None
) -> Any:
  """Calls `run` on `batch_size` elements at a time; returns the results [N, ...] as numpy arrays.

  Results are fetched while the next batch is computed.

  Args:
    run: maps a batch to its results, both trees of arrays [batch_size, ...].
    inputs: a tree of arrays [N, ...].
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
