"""Internal+VPE, `arch=internal`: tokens and image in one sequence, joined by attention.

With `arch=single` one expert runs both; the sequence is the same. Without visual prompt there is no
stage `plan`. Edits have the source image among the tokens (layouts.edit).

Sampling computes prompt and visual prompt once: flow steps reuse their keys and values. The null
branch of guidance is `[bos] [boi]` with positions of its own: one sequence, repeated for the batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, Stage, concatenate
from vpe_jax.models import mot
from vpe_jax.models.unified import sequence_visibility
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.systems.vpe import layouts
from vpe_jax.systems.vpe.ar_expert import ArExpert, slots
from vpe_jax.systems.vpe.flow_renderer import Caches, FlowRenderer

PLAN = Stage('plan', ('ar/', 'embed/'), {'next_token': 1.0}, ema=False, samples=False)
JOINT = Stage('joint', ('.*',), {'next_token': 1.0, 'flow': 1.0}, ema=True)
UNPLANNED = dataclasses.replace(JOINT, losses={'flow': 1.0})  # a model without visual prompt


@dataclasses.dataclass(frozen=True)
class Internal:
  """Both experts in one sequence; External (external.py) has the same methods for two sequences.

  Attributes:
    ar: the AR expert; its layout includes the image's tokens.
    renderer: the diffusion expert.
  """

  ar: ArExpert
  renderer: FlowRenderer

  @property
  def conditions(self) -> frozenset[str]:
    """Names of all conditions; without them, only `[bos] [boi]` and the image remain."""
    return self.ar.layout.conditions

  def regions(self, batch: Batch, codes: Array, keep: dict[str, Array]) -> dict[str, Region]:
    """The regions `ar` and `dit` of a batch; `keep` has bool [B] by condition."""
    return self.ar.regions(batch, codes, keep)

  def forward(
    self,
    params: Params,
    regions: dict[str, Region],
    noisy: tuple[Array, Array],
    source: Array | None,
  ) -> tuple[Array, Array]:
    """Both experts over whole sequences, as in training.

    Args:
      params: parameters of both experts.
      regions: see `regions`.
      noisy: noisy latents [B, h, w, C] and Show-o2's time [B], 0 at noise and 1 at data.
      source: latents of the source images [B, h, w, C]; None if the sequence has none.

    Returns:
      Final-norm hidden states [B, L, D] of the AR expert, and Show-o2's velocity [B, h, w, C].
    """
    if self.ar.editor is None:
      return self.ar.model(params, regions, *noisy)
    return self.ar.editor(params, regions, source, *noisy)

  def sample(
    self,
    params: Params,
    request: Batch,
    rng: Array,
    settings: SampleConfig,
    guidance: Guidance,
  ) -> tuple[Array, Array]:
    """Samples codes [B, P] (P = 0 without visual prompt) and latents [B, h, w, C] of requests."""
    codes, conditional = self.prefix(params, request, rng, settings)

    def prefix(dropped: frozenset[str]) -> Prefix:
      if not dropped:
        return conditional
      if dropped == self.conditions:
        return self.null_prefix(params, request)
      return self.source_prefix(params, request, conditional)

    noise = self.renderer.noise(request, rng)
    return codes, self.renderer.render(params, noise, settings, guidance, prefix)

  def prefix(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Prefix]:
    """Codes [B, P], decoded or the request's, and the prefix of the conditional branch."""
    if not self.ar.codes:
      return self._prompt_prefix(params, request)
    codes, decoded = self.ar.decode(params, request, rng, settings)
    regions, end = self.ar.request_regions(request, codes), self.ar.slot('eot')
    last, body = self.ar.extend(params, slots(regions['ar'], end, None), decoded.cache, end)
    hidden = jnp.concatenate([decoded.state, last], 1)
    return codes, self._prefix(params, regions, hidden, body)

  def null_prefix(self, params: Params, request: Batch) -> Prefix:
    """The prefix `[bos] [boi]` of the null branch, computed once and repeated for the batch."""
    model, ar = self.ar.model, self.ar
    one = jax.tree.map(lambda leaf: leaf[:1], dataclasses.replace(request, encoded={}))
    regions = ar.request_regions(one, jnp.zeros((1, ar.codes), jnp.int32), self.conditions)
    present = jnp.array([ar.slot('bos'), ar.slot('boi')])
    pair = jax.tree.map(lambda leaf: leaf[:, present], regions['ar'])
    # The two tokens move to the front; the slots behind them stay absent.
    absent = regions['ar'].ids.shape[1] - 2
    rest = jax.tree.map(lambda leaf: jnp.zeros((1, absent), leaf.dtype), pair.visibility)
    key = concatenate([pair.visibility, rest, regions['dit'].visibility])
    body, _ = model.caches(params, key)
    hidden, body = ar.extend(params, pair, body, 0)
    _, head = model.caches(params, body.visibility)
    stream = mot.Stream(hidden, pair.positions, pair.visibility)
    caches = Caches(body, model.head(params, {'ar': stream}, head, 0)[1])
    return Prefix(caches, regions['dit']).repeat(request.example.shape[0])

  def source_prefix(self, params: Params, request: Batch, conditional: Prefix) -> Prefix:
    """The prefix `[bos] [boi] time x_src [eoi] [boi]`, without instruction and visual prompt.

    All tokens but the last are also the first ones of the conditional prefix, with the same
    visibility among themselves, so their keys and values are reused. Only the last [boi] is
    computed, at the slot after them.
    """
    ar, model = self.ar, self.ar.model
    codes = jnp.zeros((request.example.shape[0], ar.codes), jnp.int32)
    regions = ar.request_regions(request, codes, frozenset({layouts.PROMPT}))
    region, at, boi = regions['ar'], ar.layout.place('eoi')[1], ar.slot('boi')
    cut = lambda leaf, start, stop: jax.tree.map(lambda x: x[:, start:stop], leaf)
    last = slots(region, boi, boi + 1)
    rest = jax.tree.map(jnp.zeros_like, cut(region.visibility, at + 1, None))
    shared = cut(region.visibility, 0, at)
    key = concatenate([shared, last.visibility, rest, regions['dit'].visibility])
    caches = conditional.cache.body, conditional.cache.head
    body, head = (mot.Cache(cache.k, cache.v, key) for cache in caches)
    hidden, body = ar.extend(params, last, body, at)
    stream = mot.Stream(hidden, last.positions, last.visibility)
    _, head = model.head(params, {'ar': stream}, head, at)
    return Prefix(Caches(body, head), regions['dit'])

  def tokens(self, stage: Stage) -> int:
    """Tokens of both experts, or of the AR expert alone in stage `plan`."""
    multiple = self.ar.model.config.multiple
    experts = ('ar', 'dit') if 'flow' in stage.losses else ('ar',)
    return sum(self.ar.layout.region_length(expert, multiple) for expert in experts)

  def _prompt_prefix(self, params: Params, request: Batch) -> tuple[Array, Prefix]:
    """No codes [B, 0], and the prefix `[bos] text [boi]`, of a model without visual prompt."""
    codes = jnp.zeros((request.example.shape[0], 0), jnp.int32)
    regions = self.ar.request_regions(request, codes)
    body, _ = self.ar.model.caches(params, sequence_visibility(regions))
    hidden, body = self.ar.begin(params, request, regions['ar'], body)
    return codes, self._prefix(params, regions, hidden, body)

  def _prefix(
    self, params: Params, regions: dict[str, Region], hidden: Array, body: mot.Cache
  ) -> Prefix:
    """The flow's prefix: fills the head's cache from the tokens' hidden states."""
    region, model = regions['ar'], self.ar.model
    _, head = model.caches(params, body.visibility)
    stream = mot.Stream(hidden, region.positions, region.visibility)
    _, head = model.head(params, self.ar.head_streams(params, stream), head, 0)
    return Prefix(Caches(body, head), regions['dit'])
