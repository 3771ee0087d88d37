"""Inputs for tests of systems: parameters far from identity maps, and batches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, Batch, Params, System


def redrawn(params: Params, deviation: float) -> Params:
  """Parameters with added normal noise, as many kernels are initialized to zero."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = lambda key, leaf: leaf + deviation * jax.random.normal(key, leaf.shape)
  return jax.tree.unflatten(tree, [noisy(*pair) for pair in zip(keys, leaves, strict=True)])


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
