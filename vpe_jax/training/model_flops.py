"""Model FLOPs of a training step, traced from the losses of the system."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax import rng as rng_lib
from vpe_jax.contracts import Array, Batch, Params, Stage, System
from vpe_jax.ops.flops import Flops, training_flops
from vpe_jax.training.state import merge, split_trainable
from vpe_jax.training.step import total

_MANY = 2**20  # tokens: no sequence is as long


def step_flops(
  system: System, stage: Stage, images: int, key: Array | jax.ShapeDtypeStruct | None = None
) -> Flops:
  """FLOPs of one training step of a stage: forward, and backward for trainable parameters.

  Frozen encoders that run online are included, the optimizer is not. Nothing is computed on a
  device, so the current mesh may consist of devices that don't exist here.

  Args:
    system: system whose losses are traced.
    stage: which parameters train and which losses drive them.
    images: global batch size.
    key: the run's key. `AttentionKernel.pairs` of the result counts visible pairs only if the key
      is concrete. None: an abstract key.
  """
  params = jax.eval_shape(system.init, rng_lib.abstract_key())
  trainable, fixed = split_trainable(params, stage)
  batch = system.batch_spec(images).batch(system.config.data.encode == 'cached')
  key = rng_lib.abstract_key() if key is None else key
  arguments = (fixed, system.frozen_shapes(), jax.tree.map(_full, batch), key)

  def loss(trainable: Params, fixed: Params, frozen: Params, batch: Batch, key: Array) -> Array:
    step = jnp.int32(0)
    terms = system.losses(merge(trainable, fixed), frozen, batch, key, step, stage)
    return total(terms, system.counts(batch, key, step, stage))

  return training_flops(loss, trainable, *arguments)


def _full(leaf: jax.ShapeDtypeStruct) -> Any:
  """Replaces int32 [B], such as caption lengths, by _MANY, so that no token is absent."""
  if leaf.dtype == jnp.int32 and leaf.ndim == 1:
    return np.full(leaf.shape, _MANY, leaf.dtype)
  return leaf
