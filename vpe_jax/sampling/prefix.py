"""The cached prefix: what a network keeps of the tokens that it has processed.

A prefix is computed once, and every later call reuses it: each step of a decoder extends it, each
step of a flow reads it. Branches of guidance are prefixes that are stacked along the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vpe_jax.contracts import Array


@runtime_checkable
class Batched(Protocol):
  """A pytree node whose leaves don't all have the batch in front, such as a cache by layers."""

  def map_batch(self, change: Callable[..., Array], *others: Any) -> Any:
    """The node of `change(*leaves, axis)`, where `axis` is the batch axis of the leaves.

    Args:
      change: takes a leaf of this node, the same leaf of each other one, and their batch axis.
      others: nodes of the same structure.
    """
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """Processed tokens of a batch of sequences.

  In every leaf the batch is the leading axis, unless the leaf belongs to a `Batched` node.

  Attributes:
    cache: keys and values, or whatever else the network reuses.
    state: what the next call reads besides: the hidden state of the last token, from which a
      decoder draws the next; or positions and visibility of the tokens that a flow runs over.
  """

  cache: Any
  state: Any

  @staticmethod
  def stack(prefixes: Sequence[Prefix]) -> Prefix:
    """Joins prefixes along the batch, in their order."""
    if len(prefixes) == 1:
      return prefixes[0]
    return _map_batch(lambda *leaves: jnp.concatenate(leaves[:-1], leaves[-1]), *prefixes)

  def repeat(self, count: int) -> Prefix:
    """The prefix of one batch element, for a batch of `count`."""
    return _map_batch(lambda leaf, axis: jnp.repeat(leaf, count, axis), self)

  def first(self, count: int) -> Prefix:
    """The prefix of the first `count` batch elements."""
    return _map_batch(lambda leaf, axis: jax.lax.slice_in_dim(leaf, 0, count, axis=axis), self)


def _map_batch(change: Callable[..., Array], *prefixes: Prefix) -> Prefix:
  def one(node: Any, *others: Any) -> Any:
    if isinstance(node, Batched):
      return node.map_batch(change, *others)
    return change(node, *others, 0)

  return jax.tree.map(one, *prefixes, is_leaf=lambda node: isinstance(node, Batched))
