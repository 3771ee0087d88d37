"""Inputs for tests of systems: parameters far from identity maps, and batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, Batch, Params, System


def redrawn(params: Params, deviation: float) -> Params:
  """Parameters with normal noise on each, as many maps of fresh ones start at zero.

  The noise is generated on the host: a program for each shape would take longer.
  """
  numpy_rng = np.random.default_rng(1)
  noise = lambda leaf: deviation * numpy_rng.standard_normal(leaf.shape, np.float32)
  return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + noise(leaf)), params)


def host_params(system: System, deviation: float = 0.15) -> Params:
  """Random parameters, none of which is zero or the identity, without compiling `init`."""
  shapes = jax.eval_shape(system.init, jax.random.key(0))
  mean = lambda path, leaf: np.full(leaf.shape, 'scale' in jax.tree_util.keystr(path), np.float32)
  return redrawn(jax.tree_util.tree_map_with_path(mean, shapes), deviation)


def flow_step(system: System, params: Params, prefix: Any, latents: Array, clock: Array) -> Array:
  """The velocity of one flow step of a unified system, from the cached keys of its prefix."""
  stream, condition = system.model.image_stream(params, latents, clock, prefix.state)
  stream = dataclasses.replace(stream, context=prefix.cache.context)
  at = prefix.cache.body.visibility.order.shape[1] - prefix.state.ids.shape[1]
  hidden, _ = system.model.backbone(params, {'dit': stream}, prefix.cache.body, at)
  stream = dataclasses.replace(stream, x=hidden['dit'], condition=condition)
  outputs, _ = system.model.head(params, {'dit': stream}, prefix.cache.head, at)
  return system.model.velocity(params, outputs['dit'], condition)


def assert_close(ours: Array, theirs: Array, tolerance: float = 1e-4) -> None:
  """Compares arrays: the largest error, relative to the largest value."""
  error = float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)))
  assert error < tolerance, f'relative error {error:.1e}'


def encoded_examples(system: System, B: int) -> Batch:
  """Prompts of different lengths with random encoded entries, as from a cache."""
  rng = np.random.default_rng(0)
  data, spec = system.config.data, system.batch_spec(B)
  inputs = {
    'text': jnp.asarray(rng.integers(8, 1024, (B, data.text_length)), jnp.int32),
    'text_length': jnp.asarray(rng.integers(1, data.text_length + 1, B), jnp.int32),
  }
  encoded = {}
  for name, leaf in spec.encoded.items():
    codes = spec.codebooks.get(name, 0)
    values = rng.integers(0, codes, leaf.shape) if codes else rng.standard_normal(leaf.shape)
    encoded[name] = jnp.asarray(values, leaf.dtype)
  return Batch(jnp.arange(B, dtype=jnp.int32), inputs, encoded)


def request_of(batch: Batch, *names: str) -> Batch:
  """The request for a batch's prompts, with the encoded entries `names` fixed."""
  return dataclasses.replace(batch, encoded={name: batch.encoded[name] for name in names})


def with_inputs(batch: Batch, **inputs: Array) -> Batch:
  """The batch with other inputs."""
  return dataclasses.replace(batch, inputs={**batch.inputs, **inputs})


def with_encoded(batch: Batch, **encoded: Array) -> Batch:
  """The batch with other encoded entries."""
  return dataclasses.replace(batch, encoded={**batch.encoded, **encoded})
