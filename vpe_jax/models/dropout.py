"""Dropout of activations: what is dropped of a row is a function of the row's own key.

So it depends neither on the row's neighbours nor on how a batch is cut or spread.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax import rng
from vpe_jax.contracts import Array


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Shares of activations that training drops, by where they are.

  Attributes:
    token: of the embeddings that enter the first layer.
    residual: of what attention adds to the residual stream, after its output projection.
    mlp: of what the MLP adds to it.
  """

  token: float = 0.0
  residual: float = 0.0
  mlp: float = 0.0

  def __bool__(self) -> bool:
    """Whether anything is dropped at all."""
    return any(dataclasses.astuple(self))


def drop(x: Array, rate: float, keys: Array | None, name: str) -> Array:
  """Zeros a share of the elements and scales the others up, so that the mean stays.

  Args:
    x: [B, L, D].
    rate: the share, below 1.
    keys: one a row [B]; None: nothing is dropped.
    name: of this use of the keys; another one drops other elements.
  """
  if keys is None or not rate:
    return x
  kept = lambda key: jax.random.bernoulli(rng.stream(key, name), 1.0 - rate, x.shape[1:])
  return jnp.where(jax.vmap(kept)(keys), x / (1.0 - rate), 0.0).astype(x.dtype)
