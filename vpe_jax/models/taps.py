"""Taps: inner states of a stack of layers, returned by the pass that computes them.

The scan over layers carries one buffer each for selected hidden states, keys and values; a static
table gives each layer its slot. The alternatives cost more:

  Every layer's states as outputs of the scan: memory of all layers, to return a few.
  One scan between each two taps: a loop body is compiled for each scan. XLA also copies the slice
    of stacked weights that each scan reads, which takes the memory of all weights again.

A buffer costs the memory of the selected states and, in each selected layer, one write in place.
Other layers write past the end, and these writes are dropped. The gradient of a write needs no
residuals: it reads the slot and clears it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax import sharding
from vpe_jax.contracts import Array, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tapped:
  """Inner states of n selected layers, in the order of Taps; None for kinds not selected.

  The slots of these states (`Taps.slots`) have the same structure.

  Attributes:
    hidden: hidden states [n, B, L, D].
    k: keys [n, B, L, K, H].
    v: values [n, B, L, K, H].
  """

  hidden: Any = None
  k: Any = None
  v: Any = None

  def write(self, states: Tapped, slots: Tapped) -> Tapped:
    """Writes one layer's states into these buffers, at `slots`: traced or Python integers."""
    return jax.tree.map(_write, self, states, slots)

  def layer(self, index: int) -> Tapped:
    """The slots of one layer as Python integers, from the tables of `Taps.slots`."""
    return jax.tree.map(lambda table: int(table[index]), self)


@dataclasses.dataclass(frozen=True)
class Taps:
  """Selects the inner states of one expert that a pass returns; static under jit.

  Attributes:
    hidden: numbers of layers: n selects the residual stream after the first n layers, 0 the
      embeddings. These are the indices of `hidden_states` in transformers, whose last is normed.
    kv: indices of layers, from 0, whose keys and values of this call's tokens are selected.
    normed: whether the network's final norm is applied to `hidden`.
    rotated: whether keys are taken after the rotary embedding or before it.
  """

  hidden: tuple[int, ...] = ()
  kv: tuple[int, ...] = ()
  normed: bool = False
  rotated: bool = True

  def __post_init__(self) -> None:
    for name in ('hidden', 'kv'):
      numbers = getattr(self, name)
      if len(set(numbers)) < len(numbers):
        raise UserError(f'taps.{name} {numbers} names a layer twice: name each layer once')

  def check(self, layers: int) -> None:
    """Checks that a network of `layers` layers has all selected layers.

    Raises:
      UserError: a selected layer is missing.
    """
    for name, last in (('hidden', layers), ('kv', layers - 1)):
      numbers = getattr(self, name)
      if any(not 0 <= number <= last for number in numbers):
        raise UserError(
          f'taps.{name} is {numbers}, and the network has {layers} layers: use 0 to {last}'
        )

  def select(self, hidden: Any, k: Any = None, v: Any = None) -> Tapped:
    """The arguments as Tapped, with None for the kinds of state that are not selected."""
    return Tapped(hidden if self.hidden else None, *((k, v) if self.kv else (None, None)))

  def slots(self, layers: int) -> Tapped:
    """Tables int32 [layers] of the layers' slots; past the end for layers not selected."""
    kv = _table(self.kv, range(layers))
    return self.select(_table(self.hidden, range(1, layers + 1)), kv, kv)

  def buffers(self, x: Array, kv: jax.ShapeDtypeStruct | None = None) -> Tapped:
    """Buffers before the first layer: zeros, and the embeddings if `hidden` selects them.

    Args:
      x: input of the first layer [B, L, D].
      kv: shape and dtype of one layer's keys [B, L, K, H]; None if no keys are selected.
    """
    hidden = k = v = None
    if self.hidden:
      hidden = _zeros(len(self.hidden), x)
    if 0 in self.hidden:
      hidden = _write(hidden, x, self.hidden.index(0))
    if self.kv:
      k, v = (_zeros(len(self.kv), kv) for _ in range(2))
    return Tapped(hidden, k, v)


def _zeros(count: int, state: Array | jax.ShapeDtypeStruct) -> Array:
  return jnp.zeros((count, *state.shape), state.dtype)


def _table(numbers: tuple[int, ...], layers: range) -> np.ndarray:
  """The index in `numbers` of each layer; len(numbers) for layers not selected."""
  places = {number: place for place, number in enumerate(numbers)}
  return np.asarray([places.get(layer, len(numbers)) for layer in layers], np.int32)


def _write(buffer: Array, state: Array, slot: Array | int) -> Array:
  if isinstance(slot, int) and slot >= buffer.shape[0]:
    return buffer
  names = (None, 'batch', None) + ((None,) if state.ndim == 3 else ('kv_heads', None))
  written = buffer.at[slot].set(state, mode='drop', unique_indices=True)
  return sharding.constrain(written, names)
