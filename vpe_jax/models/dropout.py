"""Dropout of activations, a function of a sequence's own key.

So it depends neither on other sequences of the batch nor on how the batch is sharded.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax import rng
from vpe_jax.contracts import Array


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Shares of activations that training drops, by their place in the network.

  Attributes:
    token: of the embeddings that enter the first layer.
    residual: of the attention's output projection, before it is added to the residual stream.
    mlp: of the MLP's output, before it is added.
  """

  token: float = 0.0
  residual: float = 0.0
  mlp: float = 0.0

  def __bool__(self) -> bool:
    """Whether a share is above 0."""
    return any(dataclasses.astuple(self))


def drop(x: Array, rate: float, keys: Array | None, name: str) -> Array:
  """Zeros a share of the elements and scales the others up, so that the mean stays.

  Args:
    x: [B, L, D].
    rate: the share, below 1.
    keys: one a sequence [B]; None: nothing is dropped.
    name: of this use of the keys; another one drops other elements.
  """
  if keys is None or not rate:
    return x
  mask = lambda key: jax.random.bernoulli(rng.stream(key, name), 1.0 - rate, x.shape[1:])
  return jnp.where(jax.vmap(mask)(keys), x / (1.0 - rate), 0.0).astype(x.dtype)
