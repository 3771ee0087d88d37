"""Many rows in batches of one size: one compiled program serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Progress = Callable[[int, int], None]


def by_rows(
  run: Callable[[Any], Any], inputs: Any, rows: int, progress: Progress | None = None
) -> Any:
  """Calls `run` on `rows` rows at a time, and returns what it does for each row, in numpy.

  Results are fetched while the next batch is computed.

  Args:
    run: from a batch to its results, both trees of arrays [rows, ...].
    inputs: a tree of arrays [N, ...].
    rows: of a batch. A short one is filled up with its first row.
    progress: called with (rows done, rows in all) after each batch.
  """
  count, waiting, found = len(jax.tree.leaves(inputs)[0]), None, []

  def fetch(done: int) -> None:
    if waiting is not None:
      found.append(jax.device_get(waiting))
      if progress:
        progress(done, count)

  for start in range(0, count, rows):
    chosen = np.arange(start, start + rows)
    chosen[chosen >= count] = start
    begun = run(jax.tree.map(lambda leaf, chosen=chosen: jnp.asarray(leaf[chosen]), inputs))
    fetch(start)
    waiting = begun
  fetch(count)
  return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *found)
