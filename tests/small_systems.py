"""What tests feed systems with: parameters of which nothing is the identity, and examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Examples, Params, System


def redrawn(params: Params, deviation: float) -> Params:
  """Parameters with normal noise on each, as many maps of fresh ones start at zero."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = lambda key, leaf: leaf + deviation * jax.random.normal(key, leaf.shape)
  return jax.tree.unflatten(tree, [noisy(*pair) for pair in zip(keys, leaves, strict=True)])


def encoded_examples(system: System, B: int) -> Examples:
  """Captions of different lengths, and random codes and latents, of a `t2i` system's sizes."""
  draw = np.random.default_rng(0)
  c, data = system.config.model, system.config.data
  grid = (B, c.latent_size, c.latent_size, c.latent_channels)
  return Examples(
    example=jnp.arange(B, dtype=jnp.int32),
    text=jnp.asarray(draw.integers(8, 1024, (B, data.text_length)), jnp.int32),
    text_length=jnp.asarray(draw.integers(1, data.text_length + 1, B), jnp.int32),
    codes=jnp.asarray(draw.integers(0, c.codes, (B, c.plan_tokens)), jnp.int32),
    latents=jnp.asarray(draw.standard_normal(grid), jnp.float32),
  )
