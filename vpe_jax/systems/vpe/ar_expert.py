"""The AR expert of a unified model: its token sequence, its input, and its decoder.

The visual prompt is decoded with a cache of all earlier tokens. In guided decoding
(`plan_guidance`), sequences without text are stacked behind the conditional ones, and each step
runs both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, concatenate
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified, sequence_visibility
from vpe_jax.sampling import autoregressive, guidance
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sequence.spans import Layout
from vpe_jax.systems.vpe import layouts
from vpe_jax.systems.vpe.networks.editing import SourceImageNetwork

# Names the missing caption in guidance of the visual prompt, whose branch has [bot] and the codes.
TEXT = frozenset({'text'})


@dataclasses.dataclass(frozen=True)
class ArExpert:
  """The expert of text and visual prompt, and of the source image of an edit.

  Attributes:
    model: the network of both experts.
    vocabulary: joint ids of text and codes.
    layout: the sequence that contains the expert's tokens, from systems/vpe/layouts.py.
  """

  model: Unified
  vocabulary: layouts.Vocabulary
  layout: Layout

  @functools.cached_property
  def codes(self) -> int:
    """Codes P of a visual prompt; 0 where the sequence has none."""
    if 'codes' not in self.layout:
      return 0
    first, last = self.layout.place('codes')
    return last - first

  @functools.cached_property
  def editor(self) -> SourceImageNetwork | None:
    """The network that embeds the source image among the tokens; None in other sequences."""
    if 'source_latents' not in self.layout:
      return None
    first, last = map(self.layout.place, ('source_time', 'source_latents'))
    return SourceImageNetwork(self.model, (first[0], last[1]))

  def slot(self, name: str) -> int:
    """First slot of a span in its expert's region."""
    return self.layout.place(name)[0]

  def regions(
    self, batch: Batch, codes: Array, keep: Array | Mapping[str, Array]
  ) -> dict[str, Region]:
    """The regions of `layout` for prompts and visual prompts [B, P]; see layouts.build."""
    text = (batch.inputs['text'], batch.inputs['text_length'])
    multiple = self.model.config.multiple
    return layouts.build(self.layout, self.vocabulary, *text, codes, keep, multiple)

  def request_regions(
    self, request: Batch, codes: Array, dropped: frozenset[str] = frozenset()
  ) -> dict[str, Region]:
    """The regions of requests without the conditions `dropped`."""
    constant = lambda value: jnp.full(request.example.shape, value)
    keep = {name: constant(name not in dropped) for name in layouts.CONDITIONS}
    return self.regions(request, codes, keep)

  def stream(self, params: Params, region: Region, source: Array | None) -> mot.Stream:
    """The expert's input; `source` are latents [B, h, w, C] of the source images, if any."""
    if self.editor is None:
      return self.model.token_stream(params, region)
    return self.editor.token_stream(params, region, source)[0]

  def head_streams(self, params: Params, stream: mot.Stream) -> dict[str, mot.Stream]:
    """The flow head's input from final-norm hidden states `stream.x`, which begin at slot 0."""
    if self.editor is None:
      return {'ar': stream}
    condition, _ = self.editor.clean(params, stream.x.shape[0])
    return self.editor.head_streams(stream, condition)

  def hidden(self, params: Params, region: Region, source: Array | None) -> Array:
    """Final-norm hidden states [B, L, D] of the expert alone, as in training."""
    return self.model.backbone(params, {'ar': self.stream(params, region, source)})[0]['ar']

  def extend(
    self, params: Params, region: Region, cache: mot.Cache, at: Array | int
  ) -> tuple[Array, mot.Cache]:
    """Final-norm hidden states [B, L, D] of a region; keys and values go to slots from `at`."""
    hidden, cache = self.model.backbone(
      params, {'ar': self.model.token_stream(params, region)}, cache, at
    )
    return hidden['ar'], cache

  def begin(
    self, params: Params, request: Batch, region: Region, cache: mot.Cache
  ) -> tuple[Array, mot.Cache]:
    """As `extend`, for the first slots, which include the source image of an edit."""
    stream = self.stream(params, region, request.encoded.get('source_latents'))
    hidden, cache = self.model.backbone(params, {'ar': stream}, cache, 0)
    return hidden['ar'], cache

  def decode(
    self, params: Params, request: Batch, rng: Array, settings: SampleConfig
  ) -> tuple[Array, Prefix]:
    """Decodes the visual prompt, or reads the request's, and runs all tokens before [eot].

    With `plan_guidance` other than 1, sequences without text are stacked behind the conditional
    ones, and their logits are the null branch.

    Returns:
      Codes [B, P], and a prefix: the backbone's cache for the whole sequence, and the final-norm
      hidden states [B, L, D] of the slots before [eot].
    """
    B, end = request.example.shape[0], self.slot('eot')
    if 'visual_prompt' in request.encoded:
      codes = request.encoded['visual_prompt']
      regions = self.request_regions(request, codes)
      body, _ = self.model.caches(params, sequence_visibility(regions))
      hidden, body = self.begin(params, request, slots(regions['ar'], 0, end), body)
      return codes, Prefix(body, hidden)

    guided = Guidance.classifier_free(settings.plan_guidance, TEXT)
    branches = guidance.stacked(guided)
    requests = [_without_text(request) if branch.dropped else request for branch in branches]
    regions, body, hidden, first = self._prefill(params, concatenate(requests, 0))

    def feed(prefix: Prefix, codes: Array, index: Array) -> Prefix:
      (body, hidden), at = prefix.cache, first + index
      ids = codes[:, None] + self.vocabulary.text
      token = dataclasses.replace(_slot(regions['ar'], at), ids=ids)
      state, body = self.extend(params, token, body, at)
      hidden = jax.lax.dynamic_update_slice_in_dim(hidden, state, at, 1)
      return Prefix((body, hidden), state)

    logits = lambda state: self.model.code_logits(params, state)[:, -1]
    sample = autoregressive.categorical(logits, settings, guided, branches, self.codes)
    keys = rng_lib.example_keys(rng, 'codes', request.example)
    start = Prefix((body, hidden), hidden[:, first - 1 : first])
    codes, prefix = autoregressive.generate(feed, start, self.codes, keys, sample, len(branches))
    return codes, Prefix(*prefix.first(B).cache)

  def _prefill(
    self, params: Params, request: Batch
  ) -> tuple[dict[str, Region], mot.Cache, Array, int]:
    """Regions, cache, hidden states [B, L, D] (zeros at the codes), and slot of the first code."""
    first, B = self.slot('codes'), request.example.shape[0]
    regions = self.request_regions(request, jnp.zeros((B, self.codes), jnp.int32))
    body, _ = self.model.caches(params, sequence_visibility(regions))
    start, body = self.begin(params, request, slots(regions['ar'], 0, first), body)
    hidden = jnp.zeros((B, self.slot('eot'), self.model.config.ar.width), self.model.dtype)
    return regions, body, hidden.at[:, :first].set(start), first


def slots(region: Region, start: int, stop: int | None) -> Region:
  """The slots [start, stop) of a region."""
  return jax.tree.map(lambda leaf: leaf[:, start:stop], region)


def _slot(region: Region, at: Array) -> Region:
  return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, 1, 1), region)


def _without_text(request: Batch) -> Batch:
  empty = {'text_length': jnp.zeros_like(request.inputs['text_length'])}
  return dataclasses.replace(request, inputs={**request.inputs, **empty})
