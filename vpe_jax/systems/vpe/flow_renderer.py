"""Rendering by flow steps, each of which runs the image's tokens on a cached prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified
from vpe_jax.objectives.flow_matching import FlowConfig, implied_velocity
from vpe_jax.sampling import flow
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.prefix import Prefix


class Caches(NamedTuple):
  """Cache of a flow's prefix: keys and values that all flow steps of a branch reuse.

  It is the `cache` of a Prefix, whose `state` is the image's Region.

  Attributes:
    body: keys and values of the backbone.
    head: keys and values of the flow head.
    context: keys and values of the cross-attention; None in a model without it.
  """

  body: mot.Cache
  head: mot.Cache
  context: mot.Cache | None = None


@dataclasses.dataclass(frozen=True)
class FlowRenderer:
  """The diffusion expert as a velocity function.

  Attributes:
    model: the network of both experts.
    config: the flow; its `target` is what the network predicts.
  """

  model: Unified
  config: FlowConfig

  def noise(self, request: Batch, rng: Array) -> Array:
    """Standard normal latents [B, h, w, C], a function of each example's own key."""
    c = self.model.config
    shape = (c.latent_size, c.latent_size, c.latent_channels)
    normal = lambda key: jax.random.normal(key, shape)
    return rng_lib.per_example(normal, rng, 'noise', request.example)

  def render(
    self,
    params: Params,
    noise: Array,
    settings: SampleConfig,
    guidance: Guidance,
    prefix: Callable[[frozenset[str]], Prefix],
  ) -> Array:
    """Latents [B, h, w, C] from `noise` of that shape, by flow steps; `prefix`: see flow.Phase."""
    network = lambda x, time, whole: self.velocity(params, x, time, whole)
    times = flow.time_grid(settings.steps, settings.shift)
    return flow.sample(network, noise, times, [flow.Phase(settings.steps, guidance, prefix)])

  def velocity(self, params: Params, x: Array, time: Array, prefix: Prefix) -> Array:
    """Velocities [n B, h, w, C] of noisy latents [B, h, w, C] on a prefix of n branches."""
    model, B, image, caches = self.model, x.shape[0], prefix.state, prefix.cache
    at = caches.body.visibility.order.shape[1] - image.ids.shape[1]
    # All branches see the same image: it is embedded once.
    shared = jax.tree.map(lambda leaf: leaf[:B], image)
    stream, condition = model.image_stream(params, x, jnp.full((B,), 1.0 - time), shared)
    repeat = lambda leaf: jnp.concatenate([leaf] * (image.ids.shape[0] // B))
    tokens, condition = repeat(stream.x), repeat(condition)
    stream = mot.Stream(tokens, image.positions, image.visibility, context=caches.context)
    hidden, _ = model.backbone(params, {'dit': stream}, caches.body, at)
    stream = dataclasses.replace(stream, x=hidden['dit'], condition=condition)
    out, _ = model.head(params, {'dit': stream}, caches.head, at)
    # Show-o2's sign: the network predicts the negative of the flow's target.
    prediction = -model.velocity(params, out['dit'], condition)
    return implied_velocity(self.config, prediction, repeat(x), time)
