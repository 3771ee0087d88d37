"""Networks that never train: loaded once, spread over the mesh, an argument of every call."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np

from vpe_jax import sharding
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import Params, System


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Frozen networks by name.

  Attributes:
    params: name -> tree, sharded; in no checkpoint, never closed over.
    fingerprints: name -> what stands for every bit of the tree.
  """

  params: Params
  fingerprints: dict[str, str]


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
  return Frozen(placed, {name: weights.fingerprint(tree) for name, tree in loaded.items()})
