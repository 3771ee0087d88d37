"""External+VPE, `arch=external`: tokens and image in sequences of their own (networks/external.py).

With `model.condition=cross` the picture expert has cross-attention
(systems/vpe/networks/external_cross.py).

Stage `plan` trains the token expert as with `arch=internal`, and its checkpoint serves both: the
row lacks internal's [boi], which comes last there, so that no other token sees it, and predicts
nothing. Stage `render` trains the picture expert alone, on what the frozen token expert makes of
true plans.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, Stage
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sequence.spans import Layout
from vpe_jax.systems.vpe import layouts, unified_sampler
from vpe_jax.systems.vpe.internal import PLAN
from vpe_jax.systems.vpe.networks import external, external_cross
from vpe_jax.systems.vpe.sequences import Rows

RENDER = Stage('render', ('dit/',), {'flow': 1.0}, ema=True)


class External(Rows):
  """Both rows, and what is done with them; methods as those of systems/vpe/internal.py."""

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
    """The two networks, and what passes from one to the other."""
    return external_cross.pair(self.model, self.layout.place('codes'))

  def regions(self, batch: Batch, codes: Array, keep: Array) -> dict[str, Region]:
    """`ar`, `prefix` and `dit` of a batch; where `keep` [B] is False, the picture has no plan."""
    return self.build(batch, codes, jnp.ones_like(keep)) | self._picture(codes, keep)

  def both(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array],
    reference: Array | None,
  ) -> tuple[Array, Array]:
    """The token expert over its row, then the other over its own; see Rows.forward."""
    stream = self.token_stream(params, regions['ar'], reference)
    hidden, plan = self.pair.read(params, regions['ar'], stream)
    row = {name: regions[name] for name in ('prefix', 'dit')}
    return hidden, self.pair(params, plan, row, *noisy)

  def draw(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Array]:
    """Codes [B, P] and latents [B, h, w, C] of a batch of requests."""
    codes, decoded = unified_sampler.decode(self, settings, params, request, rng)
    conditional = self.prefix(params, request, codes, decoded)
    prefix = lambda dropped: self.null_prefix(params, request) if dropped else conditional
    return codes, unified_sampler.guided(self, settings, params, request, rng, prefix)

  def prefix(self, params: Params, request: Batch, codes: Array, decoded: Prefix) -> Prefix:
    """The prefix of the flow in the picture expert's sequence, from a decoded visual prompt."""
    region = unified_sampler.build(self, request, codes)['ar']
    plan = self.pair.plan(region, decoded.state, decoded.cache)
    regions = self.pair.placed(plan, self._row(codes.shape[0], keep=True))
    caches = unified_sampler.Caches(*self.pair.prefill(params, plan, regions))
    return Prefix(caches, regions['dit'])

  def null_prefix(self, params: Params, request: Batch) -> Prefix:
    """The prefix without the visual prompt, computed once and repeated for the batch."""
    regions = self._row(1, keep=False)
    caches = unified_sampler.Caches(*self.pair.prefill_null(params, regions))
    return Prefix(caches, regions['dit']).repeat(request.example.shape[0])

  def tokens(self, stage: Stage) -> int:
    """Tokens of the token expert, and in `render` those that pass the picture expert's layers."""
    length = lambda layout, expert: layout.region_length(expert, self.model.config.multiple)
    if 'flow' not in stage.losses:
      return length(self.layout, 'ar')
    first, last = self.pair.codes
    # Only with the condition `prefix` do the codes pass the picture expert's layers.
    codes = 0 if self.model.config.condition == 'prefix' else last - first
    own = sum(length(self.diffusion_layout, expert) for expert in ('prefix', 'dit'))
    return length(self.layout, 'ar') + own - codes

  def _row(self, B: int, keep: bool) -> dict[str, Region]:
    """The picture expert's rows of any plans: the codes' ids aren't read there."""
    first, last = self.pair.codes
    return self._picture(jnp.zeros((B, last - first), jnp.int32), jnp.full((B,), keep))

  def _picture(self, codes: Array, keep: Array) -> dict[str, Region]:
    multiple = self.model.config.multiple
    return layouts.build(self.diffusion_layout, self.vocabulary, None, None, codes, keep, multiple)
