"""Dropout of activations with a random key for each sequence.

A sequence's dropout depends neither on the rest of the batch nor on how the batch is sharded.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax import rng
from vpe_jax.contracts import Array


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Dropout rates in training, by place in the network.

  Attributes:
    token: rate for the embeddings that enter the first layer.
    residual: rate for the attention output, before it is added to the residual stream.
    mlp: rate for the MLP output, before it is added to the residual stream.
  """

  token: float = 0.0
  residual: float = 0.0
  mlp: float = 0.0

  def __bool__(self) -> bool:
    """Whether any rate is above 0."""
    return any(dataclasses.astuple(self))


def drop(x: Array, rate: float, keys: Array | None, name: str) -> Array:
  """Sets random elements to 0 and divides the others by 1 - rate, which preserves the mean.

  Args:
    x: activations [B, L, D].
    rate: probability that an element is dropped, below 1.
    keys: random keys [B], one per sequence; None: nothing is dropped.
    name: name of the place of this dropout; different names drop different elements.
  """
  if keys is None or not rate:
    return x
  mask = lambda key: jax.random.bernoulli(rng.stream(key, name), 1.0 - rate, x.shape[1:])
  return jnp.where(jax.vmap(mask)(keys), x / (1.0 - rate), 0.0).astype(x.dtype)
