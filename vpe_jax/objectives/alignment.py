"""Picture-caption alignment: SigLIP's sigmoid loss, and retrieval within groups.

Captions may repeat in a batch ("a red circle" fits several pictures): a picture's positives are
all captions equal to its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array


def same_caption(text: Array) -> Array:
  """Which captions are equal: token rows [B, T] -> bool [B, B].

  Rows are compared by two 32-bit hashes, so that [B, B, T] never exists; two unequal rows of a
  batch of 32,768 pass for equal with a chance below 1e-9.
  """
  draws = np.random.default_rng(0).integers(0, 2**31, (2, text.shape[1]), np.uint32) * 2 + 1
  mixed = (text.astype(jnp.uint32)[:, None] + jnp.uint32(0x9E3779B9)) * draws
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
  hashes = jnp.sum(mixed ^ (mixed >> 13), -1, dtype=jnp.uint32)
  return jnp.all(hashes[:, None] == hashes[None], -1)


def sigmoid_loss(logits: Array, positive: Array, counted: Array | None = None) -> Array:
  """Each picture's loss over all captions: -sum log sigmoid(+-logit), float32 [B].

  Args:
    logits: pictures x captions [B, B], float32.
    positive: bool [B, B]; +1 where the caption fits, -1 elsewhere (arXiv 2303.15343, Eq. 1).
    counted: bool [B, B]; pairs that say anything (None: all).
  """
  terms = jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
  return -jnp.sum(terms if counted is None else jnp.where(counted, terms, 0.0), -1)


def near_loss(own: Array, wrong: Array, exists: Array) -> Array:
  """-log of the own caption's softmax among it and its near misses: float32 [B], 0 without any.

  A ranking, as in NegCLIP (arXiv 2210.01936), rather than more terms of the sigmoid loss: near
  misses lie so close that no one bias could separate them for all captions at once.

  Args:
    own: logits of the pictures with their captions [B], float32.
    wrong: with their wrong captions [B, M].
    exists: bool [B, M]; False where there is no caption.
  """
  all_logits = jnp.concatenate([own[:, None], jnp.where(exists, wrong, -jnp.inf)], -1)
  return jax.nn.logsumexp(all_logits, -1) - own


def near_hits(own: Array, wrong: Array, exists: Array) -> Array:
  """Whether the own caption beats all wrong ones: float32 [B], 0 where there are none.

  Args:
    own: logits of the pictures with their captions [B].
    wrong: with their wrong captions [B, M].
    exists: bool [B, M].
  """
  worst = jnp.max(jnp.where(exists, wrong, -jnp.inf), -1)
  return ((own > worst) & jnp.any(exists, -1)).astype(jnp.float32)


def retrieval_hits(logits: Array, positive: Array, group: int = 32) -> Array:
  """Whether each picture's best caption among its group is one of its own: float32 [B].

  Groups are `group` neighbours in the batch, so that the figure doesn't depend on batch size.
  """
  place = jnp.arange(logits.shape[0]) // group
  near = place[:, None] == place[None]
  best = jnp.argmax(jnp.where(near, logits, -jnp.inf), -1)
  return jnp.take_along_axis(positive, best[:, None], -1)[:, 0].astype(jnp.float32)
