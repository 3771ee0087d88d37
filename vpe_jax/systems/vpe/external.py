"""External+VPE, `arch=external`: a sequence for each of the two experts (networks/external.py).

With `model.condition=cross` the diffusion expert has cross-attention (networks/external_cross.py).

Stage `plan` trains the AR expert as with `arch=internal`, and its checkpoint serves both
architectures. Only internal's sequence has [boi]: the AR expert's last token, which none of its
other tokens sees and which predicts nothing. Stage `render` trains the diffusion expert alone, on
features that the frozen AR expert computes from ground-truth visual prompts.
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
  """The experts in two sequences; Internal (internal.py) has the same methods for one.

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
    """The visual prompt: the one condition that the diffusion expert sees."""
    return self.layout.conditions

  @functools.cached_property
  def pair(self) -> external.ExternalNetworks:
    """The networks of both experts, and the features that the AR expert passes on."""
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
    """The AR expert over its sequence, then the diffusion expert over its own; see Internal."""
    stream = self.ar.stream(params, regions['ar'], source)
    hidden, features = self.pair.read(params, regions['ar'], stream)
    image_regions = {name: regions[name] for name in ('prefix', 'dit')}
    return hidden, self.pair(params, features, image_regions, *noisy)

  def sample(
    self,
    params: Params,
    request: Batch,
    rng: Array,
    settings: SampleConfig,
    guidance: Guidance,
  ) -> tuple[Array, Array]:
    """Samples codes [B, P] and latents [B, h, w, C] of requests."""
    codes, decoded = self.ar.decode(params, request, rng, settings)
    conditional = self.prefix(params, request, codes, decoded)
    prefix = lambda dropped: self.null_prefix(params, request) if dropped else conditional
    noise = self.renderer.noise(request, rng)
    return codes, self.renderer.render(params, noise, settings, guidance, prefix)

  def prefix(self, params: Params, request: Batch, codes: Array, decoded: Prefix) -> Prefix:
    """The prefix of the flow in the diffusion expert's sequence, from a decoded visual prompt."""
    region = self.ar.request_regions(request, codes)['ar']
    features = self.pair.features(region, decoded.state, decoded.cache)
    regions = self.pair.shifted(features, self._empty_regions(codes.shape[0], keep=True))
    caches = Caches(*self.pair.prefill(params, features, regions))
    return Prefix(caches, regions['dit'])

  def null_prefix(self, params: Params, request: Batch) -> Prefix:
    """The prefix without the visual prompt, computed once and repeated for the batch."""
    regions = self._empty_regions(1, keep=False)
    caches = Caches(*self.pair.prefill_null(params, regions))
    return Prefix(caches, regions['dit']).repeat(request.example.shape[0])

  def tokens(self, stage: Stage) -> int:
    """Tokens of the AR expert; with a flow loss, also those in the diffusion expert's layers."""
    config = self.ar.model.config
    length = lambda layout, expert: layout.region_length(expert, config.multiple)
    tokens = length(self.ar.layout, 'ar')
    if 'flow' not in stage.losses:
      return tokens
    # With `keys` and `cross`, codes don't pass through the diffusion expert's layers.
    codes = 0 if config.condition == 'prefix' else self.ar.codes
    return tokens + length(self.layout, 'prefix') - codes + length(self.layout, 'dit')

  def _empty_regions(self, B: int, keep: bool) -> dict[str, Region]:
    """The diffusion expert's regions, with code ids 0: it doesn't read them."""
    codes = jnp.zeros((B, self.ar.codes), jnp.int32)
    return self._image_regions(codes, {layouts.VISUAL_PROMPT: jnp.full((B,), keep)})

  def _image_regions(self, codes: Array, keep: dict[str, Array]) -> dict[str, Region]:
    multiple = self.ar.model.config.multiple
    return layouts.build(self.layout, self.ar.vocabulary, None, None, codes, keep, multiple)
