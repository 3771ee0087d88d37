"""The cached prefix: a network's state after the tokens that it has processed.

A prefix is computed once and reused by later calls: each step of a decoder extends it, each step of
a flow reads it. Guidance branches are prefixes stacked along the batch.
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
  """A pytree node whose batch axis isn't always the first, such as a cache stacked by layers."""

  def map_batch(self, change: Callable[..., Array], *others: Any) -> Any:
    """Maps `change(*leaves, axis)` over the leaves, where `axis` is their batch axis.

    Args:
      change: takes a leaf of this node, the same leaf of each other node, and their batch axis.
      others: nodes of the same structure.
    """
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """A network's state after the tokens of a batch of sequences.

  The batch is the first axis of every leaf, except for leaves of `Batched` nodes.

  Attributes:
    cache: keys and values, or other cached activations.
    state: other inputs of the next call: for a decoder, the hidden state of the last token, from
      which the next one is sampled; for a flow, positions and visibility of its tokens.
  """

  cache: Any
  state: Any

  @staticmethod
  def stack(prefixes: Sequence[Prefix]) -> Prefix:
    """Concatenates prefixes along the batch."""
    if len(prefixes) == 1:
      return prefixes[0]
    return _map_batch(lambda *leaves: jnp.concatenate(leaves[:-1], leaves[-1]), *prefixes)

  def repeat(self, count: int) -> Prefix:
    """Repeats each batch element `count` times."""
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
