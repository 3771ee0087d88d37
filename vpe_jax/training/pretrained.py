"""Parameters that a run starts from, put where they go: published weights, or an earlier run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.checkpoints import convert, converted, weights
from vpe_jax.config import Config
from vpe_jax.contracts import Array, Params, Start, UserError
from vpe_jax.sharding import by_path


def load(starts: Sequence[Start], abstract: Params) -> dict[str, Array]:
  """Reads the weights that a system starts from.

  Args:
    starts: see vpe_jax.contracts.Start.
    abstract: the system's parameters, with their shardings.

  Returns:
    Path -> array, for every parameter that the weights fill, sharded as `abstract` is.

  Raises:
    UserError: weights are missing, don't fit, or are of another size.
  """
  wanted, found = by_path(abstract), {}
  for start in starts:
    for path, leaf in by_path(_read(start, wanted)).items():
      for target in _targets(start, path):
        found[target] = _as(leaf, wanted[target], start.source, target)
  return found


def from_run(config: Config, abstract: Params) -> dict[str, Array]:
  """Reads all parameters of the run that `config.start` names, from its newest good checkpoint.

  Args:
    config: says which run, and which of its weights.
    abstract: our parameters, with their shardings.

  Returns:
    Path -> array for every parameter, sharded as `abstract` is.

  Raises:
    UserError: there is no such run, or its parameters are not ours in paths and shapes.
  """
  params, _ = weights.load_run(config.start, config.start_weights)
  found, wanted = by_path(params), by_path(abstract)
  if difference := weights.mismatch(wanted, found):
    path, ours, theirs = difference
    raise UserError(
      f"config.start={config.start} has other parameters than this config: '{path}' is {theirs} "
      f'there and {ours} here; name a run of the same sizes, or give config.model its sizes'
    )
  return {path: _as(leaf, wanted[path], config.start, path) for path, leaf in found.items()}


def _read(start: Start, wanted: Mapping[str, Any]) -> Params:
  """The family's parameters; from published weights, each where its first target lies."""

  def place(tree: Params) -> Params:
    leaves = by_path(tree)
    for path, leaf in leaves.items():
      for target in _targets(start, path)[:1]:
        where = getattr(wanted[target], 'sharding', None)
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return convert.tree(leaves)

  return converted.network(start, place)


def _targets(start: Start, path: str) -> list[str]:
  """Where a leaf of the family's tree goes in ours."""
  return [
    ours + path.removeprefix(theirs) for theirs, ours in start.paths if path.startswith(theirs)
  ]


def _as(leaf: Array, wanted: Any, source: str, path: str) -> Array:
  """A leaf in its place: a copy, as one that fills several places may share memory with none."""
  if leaf.shape != wanted.shape:
    raise UserError(
      f"'{source}' has {list(leaf.shape)} for our '{path}' of {list(wanted.shape)}: it is of "
      'another size than the config says'
    )
  return jnp.copy(jax.device_put(leaf, getattr(wanted, 'sharding', None)))
