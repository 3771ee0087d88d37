"""External+VPE, `arch=external`: tokens and image in sequences of their own (networks/external.py).

With `model.condition=cross` the diffusion expert has cross-attention
(systems/vpe/networks/external_cross.py).

Stage `plan` trains the AR expert as with `arch=internal`, and its checkpoint serves both: the
sequence lacks internal's [boi], which comes last there, so that no other token sees it, and
predicts nothing. Stage `render` trains the diffusion expert alone, on the frozen AR expert's
features of ground-truth visual prompts.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, Stage
from vpe_jax.models import unified
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sequence.spans import Layout
from vpe_jax.systems.vpe import layouts, unified_sampler
from vpe_jax.systems.vpe.internal import PLAN
from vpe_jax.systems.vpe.networks import external, external_cross
from vpe_jax.systems.vpe.sequences import Rows

RENDER = Stage('render', ('dit/',), {'flow': 1.0}, ema=True)


class External(Rows):
  """Both sequences and their networks; methods as those of systems/vpe/internal.py."""

  stages = {stage.name: stage for stage in (PLAN, RENDER)}

  @functools.cached_property
  def layout(self) -> Layout:
    """The AR expert's sequence."""
    return layouts.ar_sequence(self.vocabulary, self.text, self.codes)

  @functools.cached_property
  def diffusion_layout(self) -> Layout:
    """The diffusion expert's sequence."""
    lengths = (self.codes, self.model.config.image_tokens)
    return layouts.diffusion_sequence(self.vocabulary, *lengths)

  @functools.cached_property
  def pair(self) -> external.External:
    """The two networks, and the features that one hands to the other."""
    return external_cross.pair(self.model, self.layout.place('codes'))

  def regions(self, batch: Batch, codes: Array, keep: Array) -> dict[str, Region]:
    """`ar`, `prefix` and `dit` of a batch; without the visual prompt where not `keep` [B]."""
    return self.build(batch, codes, jnp.ones_like(keep)) | self._picture(codes, keep)

  def both(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array],
    reference: Array | None,
  ) -> tuple[Array, Array]:
    """The AR expert over its sequence, then the other over its own; see Rows.forward."""
    stream = self.token_stream(params, regions['ar'], reference)
    hidden, features = self.pair.read(params, regions['ar'], stream)
    sequence = {name: regions[name] for name in ('prefix', 'dit')}
    return hidden, self.pair(params, features, sequence, *noisy)

  def draw(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of a batch of requests."""
    codes, decoded = unified_sampler.decode(self, settings, params, request, rng)
    conditional = self.prefix(params, request, codes, decoded)
    prefix = lambda dropped: self.null_prefix(params, request) if dropped else conditional
    return codes, unified_sampler.guided(self, settings, params, request, rng, prefix)

  def prefix(self, params: Params, request: Batch, codes: Array, decoded: Prefix) -> Prefix:
    """The prefix of the flow in the diffusion expert's sequence, from a decoded visual prompt."""
    region = unified_sampler.build(self, request, codes)['ar']
    features = self.pair.features(region, decoded.state, decoded.cache)
    regions = self.pair.shifted(features, self._sequence(codes.shape[0], keep=True))
    caches = unified_sampler.Caches(*self.pair.prefill(params, features, regions))
    return Prefix(caches, regions['dit'])

  def null_prefix(self, params: Params, request: Batch) -> Prefix:
    """The prefix without the visual prompt, computed once and repeated for the batch."""
    regions = self._sequence(1, keep=False)
    caches = unified_sampler.Caches(*self.pair.prefill_null(params, regions))
    return Prefix(caches, regions['dit']).repeat(request.example.shape[0])

  def train_flops(self, stage: Stage, predicted: int) -> float:
    """Matrix FLOPs of one example; in `render` the token expert runs forward alone."""
    lengths = self._lengths()
    if 'flow' not in stage.losses:
      return unified.train_flops(self.model.config, lengths.tokens, 0, predicted)
    return external.train_flops(self.model.config, lengths)

  def attention_flops(self, stage: Stage) -> tuple[float, float]:
    """Of one forward pass, what attention amounts to: where all is frozen, and elsewhere."""
    reading, drawing = external.attention_flops(self.model.config, self._lengths())
    return (reading, drawing) if 'flow' in stage.losses else (0.0, reading)

  def tokens(self, stage: Stage) -> int:
    """Tokens of the token expert, and in `render` those that pass the picture expert's layers."""
    lengths = self._lengths()
    if 'flow' not in stage.losses:
      return lengths.tokens
    return lengths.tokens + lengths.prefix - lengths.held + lengths.image

  def _lengths(self) -> external.Lengths:
    first, last = self.pair.codes
    length = lambda layout, expert: layout.region_length(expert, self.model.config.multiple)
    codes, condition = last - first, self.model.config.condition
    prefix, seen = length(self.diffusion_layout, 'prefix'), codes if condition == 'cross' else 0
    return external.Lengths(
      length(self.layout, 'ar'),
      prefix - seen,
      length(self.diffusion_layout, 'dit'),
      codes if condition == 'keys' else 0,
      seen,
    )

  def _sequence(self, B: int, keep: bool) -> dict[str, Region]:
    """The diffusion expert's sequence, which doesn't read the ids of the codes."""
    first, last = self.pair.codes
    return self._picture(jnp.zeros((B, last - first), jnp.int32), jnp.full((B,), keep))

  def _picture(self, codes: Array, keep: Array) -> dict[str, Region]:
    multiple = self.model.config.multiple
    return layouts.build(self.diffusion_layout, self.vocabulary, None, None, codes, keep, multiple)
