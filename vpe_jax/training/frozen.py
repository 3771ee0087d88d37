"""Networks that never train: loaded once, spread over the mesh, an argument of every call."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import numpy as np

from vpe_jax import sharding
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import Array, Examples, Params, System


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Frozen networks by name.

  Attributes:
    params: name -> tree, sharded; in no checkpoint, never closed over.
    fingerprints: name -> what stands for every bit of the tree.
    encode: the system's `encode(params, images) -> (codes, latents)`, jitted once for all who
      use it (None: the system has no encoders).
  """

  params: Params
  fingerprints: dict[str, str]
  encode: Callable[[Params, Array], tuple[Array, Array]] | None

  def with_codes(self, batch: Examples) -> Examples:
    """A batch of pictures with codes and latents beside them."""
    codes, latents = self.encode(self.params, batch.image)
    return dataclasses.replace(batch, codes=codes, latents=latents)


def load(system: System, mesh: jax.sharding.Mesh, strategy: str) -> Frozen:
  """Loads the frozen networks of a system.

  Raises:
    UserError: weights are missing or can't be read.
  """
  loaded = {name: weights.load(source)[0] for name, source in system.frozen_weights.items()}
  # No names: each leaf is split along its largest dimension that divides.
  table = [
    (re.escape(path), (None,) * np.ndim(leaf)) for path, leaf in sharding.by_path(loaded).items()
  ]
  placed = jax.device_put(loaded, sharding.param_shardings(loaded, table, mesh, strategy))
  fingerprints = {name: weights.fingerprint(tree) for name, tree in loaded.items()}
  return Frozen(placed, fingerprints, jax.jit(system.encode) if hasattr(system, 'encode') else None)
