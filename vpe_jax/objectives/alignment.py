"""Image-caption alignment: SigLIP's sigmoid loss, hard negatives, and retrieval within groups.

Captions may repeat in a batch ("a red circle" fits several images), so the positives of an image
are all captions equal to its own. Near misses are hard negatives: captions that are wrong in one
detail.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array


def same_caption(text: Array) -> Array:
  """Compares captions (token ids [B, T]): bool [B, B].

  They are compared by two 32-bit hashes, so that [B, B, T] never exists. In a batch of 32,768 the
  probability that two different captions have equal hashes is below 1e-9.
  """
  multipliers = np.random.default_rng(0).integers(0, 2**31, (2, text.shape[1]), np.uint32) * 2 + 1
  mixed = (text.astype(jnp.uint32)[:, None] + jnp.uint32(0x9E3779B9)) * multipliers
  mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
  hashes = jnp.sum(mixed ^ (mixed >> 13), -1, dtype=jnp.uint32)
  return jnp.all(hashes[:, None] == hashes[None], -1)


def sigmoid_loss(logits: Array, positive: Array, counted: Array | None = None) -> Array:
  """Loss of each image over all captions, float32 [B] (arXiv 2303.15343, Eq. 1).

  It is -sum log sigmoid(z logit), with z = 1 for positive pairs and -1 for others.

  Args:
    logits: images x captions [B, B], float32.
    positive: bool [B, B], whether the caption fits the image.
    counted: bool [B, B], pairs to include (None: all).
  """
  terms = jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
  return -jnp.sum(terms if counted is None else jnp.where(counted, terms, 0.0), -1)


def near_loss(own: Array, wrong: Array, present: Array) -> Array:
  """Cross-entropy of the own caption among its near misses: float32 [B], 0 without near misses.

  It is a ranking loss, as in NegCLIP (arXiv 2210.01936), because near misses have logits so similar
  to the own caption's that a single bias of the sigmoid loss can't separate them for all captions.

  Args:
    own: logits of the images with their own captions [B], float32.
    wrong: logits of the images with their near misses [B, M].
    present: bool [B, M], whether there is a near miss.
  """
  all_logits = jnp.concatenate([own[:, None], jnp.where(present, wrong, -jnp.inf)], -1)
  return jax.nn.logsumexp(all_logits, -1) - own


def near_hits(own: Array, wrong: Array, present: Array) -> Array:
  """1 where the own caption has a larger logit than all near misses: float32 [B], 0 without any.

  Args:
    own: logits of the images with their own captions [B].
    wrong: logits of the images with their near misses [B, M].
    present: bool [B, M], whether there is a near miss.
  """
  largest = jnp.max(jnp.where(present, wrong, -jnp.inf), -1)
  return ((own > largest) & jnp.any(present, -1)).astype(jnp.float32)


def retrieval_hits(logits: Array, positive: Array, group: int = 32) -> Array:
  """1 where the caption with the largest logit in a group is positive: float32 [B].

  Groups are `group` consecutive batch elements, so that the result doesn't depend on batch size.

  Args:
    logits: images x captions [B, B].
    positive: bool [B, B], whether the caption fits the image.
    group: batch elements of a group.
  """
  index = jnp.arange(logits.shape[0]) // group
  same_group = index[:, None] == index[None]
  best = jnp.argmax(jnp.where(same_group, logits, -jnp.inf), -1)
  return jnp.take_along_axis(positive, best[:, None], -1)[:, 0].astype(jnp.float32)
