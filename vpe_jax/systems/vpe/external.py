"""External+VPE, `arch=external`: a sequence for each of the two experts (networks/external.py).

With `model.condition=cross` the diffusion expert has cross-attention (networks/external_cross.py).

Stage `plan` trains the AR expert as with `arch=internal`, and its checkpoint serves both
architectures. With `arch=internal` the AR expert's region ends with one more token, the [boi] of
the image. It predicts nothing and no other AR token sees it, so stage `plan` is the same. Stage
`render` trains the diffusion expert alone, on features that the frozen AR expert computes from
ground-truth visual prompts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, Stage
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sequence.spans import Layout
from vpe_jax.systems.vpe import layouts
from vpe_jax.systems.vpe.ar_expert import ArExpert
from vpe_jax.systems.vpe.flow_renderer import Caches, FlowRenderer
from vpe_jax.systems.vpe.networks import external, external_cross

RENDER = Stage('render', ('dit/',), {'flow': 1.0}, ema=True)


@dataclasses.dataclass(frozen=True)
class External:
  """Both experts, with a sequence each.

  Internal (internal.py) has the same interface for one shared sequence.

  Attributes:
    ar: the AR expert.
    renderer: the diffusion expert.
    layout: the diffusion expert's sequence.
  """

  ar: ArExpert
  renderer: FlowRenderer
  layout: Layout

  @property
  def conditions(self) -> frozenset[str]:
    """Names of the conditions that the diffusion expert's sequence can drop."""
    return self.layout.conditions

  @functools.cached_property
  def networks(self) -> external.ExternalNetworks:
    """The networks of both experts; `model.condition` chooses how they are connected."""
    return external_cross.pair(self.ar.model, self.ar.layout.place('codes'))

  def regions(self, batch: Batch, codes: Array, keep: dict[str, Array]) -> dict[str, Region]:
    """The regions `ar`, `prefix` and `dit` of a batch; `keep` has bool [B] by condition."""
    return self.ar.regions(batch, codes, keep) | self._image_regions(codes, keep)

  def forward(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array],
    source: Array | None,
  ) -> tuple[Array, Array]:
    """Runs the AR expert on its sequence, then the diffusion expert on its own; see Internal."""
    stream = self.ar.stream(params, regions['ar'], source)
    hidden, features = self.networks.read(params, regions['ar'], stream)
    image_regions = {name: regions[name] for name in ('prefix', 'dit')}
    return hidden, self.networks(params, features, image_regions, *noisy)

  def sample(
    self,
    params: Params,
    request: Batch,
    rng: Array,
    settings: SampleConfig,
    guidance: Guidance,
  ) -> tuple[Array, Array]:
    """Samples codes [B, P] and latents [B, h, w, C] of requests."""
    codes, ar_prefix = self.ar.decode(params, request, rng, settings)
    conditional = self.prefix(params, request, codes, ar_prefix)
    prefix_of = lambda dropped: self.null_prefix(params, request) if dropped else conditional
    noise = self.renderer.noise(request, rng)
    return codes, self.renderer.render(params, noise, settings, guidance, prefix_of)

  def prefix(self, params: Params, request: Batch, codes: Array, ar_prefix: Prefix) -> Prefix:
    """The diffusion expert's cached prefix, from the codes and the AR expert's prefix."""
    region = self.ar.request_regions(request, codes)['ar']
    features = self.networks.features(region, ar_prefix.state, ar_prefix.cache)
    regions = self.networks.shifted(features, self._empty_regions(codes.shape[0], keep=True))
    caches = Caches(*self.networks.prefill(params, features, regions))
    return Prefix(caches, regions['dit'])

  def null_prefix(self, params: Params, request: Batch) -> Prefix:
    """The prefix without the visual prompt, computed once and repeated for the batch."""
    regions = self._empty_regions(1, keep=False)
    caches = Caches(*self.networks.prefill_null(params, regions))
    return Prefix(caches, regions['dit']).repeat(request.example.shape[0])

  def tokens(self, stage: Stage) -> int:
    """Tokens per example in the AR expert and, with a flow loss, in the diffusion expert."""
    config = self.ar.model.config
    length = lambda layout, expert: layout.region_length(expert, config.multiple)
    tokens = length(self.ar.layout, 'ar')
    if 'flow' not in stage.losses:
      return tokens
    # With `keys` and `cross`, codes don't pass through the diffusion expert's layers.
    codes = 0 if config.condition == 'prefix' else self.ar.codes
    return tokens + length(self.layout, 'prefix') - codes + length(self.layout, 'dit')

  def _empty_regions(self, B: int, keep: bool) -> dict[str, Region]:
    """The diffusion expert's regions; code ids are 0, as it reads features instead of them."""
    codes = jnp.zeros((B, self.ar.codes), jnp.int32)
    return self._image_regions(codes, {layouts.VISUAL_PROMPT: jnp.full((B,), keep)})

  def _image_regions(self, codes: Array, keep: dict[str, Array]) -> dict[str, Region]:
    multiple = self.ar.model.config.multiple
    return layouts.build(self.layout, self.ar.vocabulary, None, None, codes, keep, multiple)
