"""Sampling with a unified model: the visual prompt token by token, then the image by flow steps.

Prompt and visual prompt are computed once: each flow step runs the image's tokens against their
cache. The null branch of guidance is `[bos] [boi]` with positions of its own: one sequence,
repeated for the batch. Without visual prompt the image sees the prompt alone. With two sequences
(`arch=external`) decoder and flow steps are the same, and systems/vpe/external.py makes the
prefixes of the latter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, concatenate
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified, sequence_visibility
from vpe_jax.objectives.flow_matching import implied_velocity
from vpe_jax.sampling import autoregressive, flow, guidance
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.systems.vpe import layouts
from vpe_jax.systems.vpe.sequences import Rows

ALL = frozenset(layouts.CONDITIONS)
TEXT = frozenset({'text'})  # the caption without the visual prompt


class Caches(NamedTuple):
  """Keys and values that all flow steps of a branch reuse, the cache of the flow's prefix.

  The state of that prefix is the image's Region.

  Attributes:
    body: of the backbone.
    head: of the head.
    context: of the cross-attention, in a model that has any.
  """

  body: mot.Cache
  head: mot.Cache
  context: mot.Cache | None = None


def draw(
  rows: Rows, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[Array, Array]:
  """Codes [B, P] and latents [B, h, w, C] float32 for a batch of requests."""
  prefill = plan if rows.codes else unplanned
  codes, conditional = prefill(rows, settings, params, request, rng)
  prefix = lambda dropped: null_prefix(rows, params, request) if dropped else conditional
  return codes, guided(rows, settings, params, request, rng, prefix)


def guided(
  rows: Rows,
  settings: SampleConfig,
  params: Params,
  request: Batch,
  rng: Array,
  prefix: Callable[[frozenset[str]], Prefix],
) -> Array:
  """Latents [B, h, w, C] by classifier-free guidance; `prefix` is that of flow.Phase."""
  branches = Guidance.classifier_free(settings.guidance, ALL)
  return render(rows, settings, params, noise(rows.model, request, rng), branches, prefix)


def noise(model: Unified, request: Batch, rng: Array) -> Array:
  """The noise that the flow of each request starts from: normal latents [B, h, w, C]."""
  c = model.config
  shape = (c.latent_size, c.latent_size, c.latent_channels)
  normal = lambda key: jax.random.normal(key, shape)
  return rng_lib.per_example(normal, rng, 'noise', request.example)


def plan(
  rows: Rows, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[Array, Prefix]:
  """Decodes the visual prompt (or takes the request's), and makes the flow's whole prefix."""
  codes, decoded = decode(rows, settings, params, request, rng)
  regions, end = build(rows, request, codes), rows.slot('eot')
  tail = _slots(regions['ar'], end, None)
  last, body = tokens(rows.model, params, tail, decoded.cache, end)
  hidden = jnp.concatenate([decoded.state, last], 1)
  return codes, _prefix(rows, params, regions, hidden, body)


def unplanned(
  rows: Rows, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[Array, Prefix]:
  """No codes [B, 0], and the prefix `[bos] text [boi]`, of a model without visual prompt."""
  del settings, rng
  codes = jnp.zeros((request.example.shape[0], 0), jnp.int32)
  regions = build(rows, request, codes)
  body, _ = rows.model.caches(params, sequence_visibility(regions))
  hidden, body = _begin(rows, params, request, regions['ar'], body)
  return codes, _prefix(rows, params, regions, hidden, body)


def decode(
  rows: Rows, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[Array, Prefix]:
  """Decodes the visual prompt, or reads the request's: all of the token expert before [eot].

  With `plan_guidance` other than 1, sequences without text are stacked behind the others, and their
  logits guide the others' away from them.

  Returns:
    Codes [B, P], and a prefix: the backbone's cache for the whole sequence, and the final-norm
    hidden states [B, L, D] of the slots before [eot].
  """
  model, B, end = rows.model, request.example.shape[0], rows.slot('eot')
  if 'visual_prompt' in request.encoded:
    codes = request.encoded['visual_prompt']
    regions = build(rows, request, codes)
    body, _ = model.caches(params, sequence_visibility(regions))
    hidden, body = _begin(rows, params, request, _slots(regions['ar'], 0, end), body)
    return codes, Prefix(body, hidden)

  guided = Guidance.classifier_free(settings.plan_guidance, TEXT)
  branches = guidance.stacked(guided)
  every = [_without_text(request) if branch.dropped else request for branch in branches]
  regions, body, hidden, first = _prefill(rows, params, concatenate(every, 0))

  def feed(prefix: Prefix, codes: Array, index: Array) -> Prefix:
    (body, hidden), at = prefix.cache, first + index
    ids = codes[:, None] + rows.vocabulary.text
    here = dataclasses.replace(_slot(regions['ar'], at), ids=ids)
    state, body = tokens(model, params, here, body, at)
    hidden = jax.lax.dynamic_update_slice_in_dim(hidden, state, at, 1)
    return Prefix((body, hidden), state)

  logits = lambda state: model.code_logits(params, state)[:, -1]
  draw = autoregressive.categorical(logits, settings, guided, branches, rows.codes)
  keys = rng_lib.example_keys(rng, 'codes', request.example)
  start = Prefix((body, hidden), hidden[:, first - 1 : first])
  codes, prefix = autoregressive.generate(feed, start, rows.codes, keys, draw, len(branches))
  return codes, Prefix(*prefix.first(B).cache)


def _without_text(request: Batch) -> Batch:
  empty = {'text_length': jnp.zeros_like(request.inputs['text_length'])}
  return dataclasses.replace(request, inputs={**request.inputs, **empty})


def _prefill(
  rows: Rows, params: Params, request: Batch
) -> tuple[dict[str, Region], mot.Cache, Array, int]:
  """All before the codes: regions, cache, hidden states of the slots before [eot], first slot."""
  first, count = rows.slot('codes'), request.example.shape[0]
  regions = build(rows, request, jnp.zeros((count, rows.codes), jnp.int32))
  body, _ = rows.model.caches(params, sequence_visibility(regions))
  start, body = _begin(rows, params, request, _slots(regions['ar'], 0, first), body)
  hidden = jnp.zeros((count, rows.slot('eot'), rows.model.config.ar.width), rows.model.dtype)
  return regions, body, hidden.at[:, :first].set(start), first


def null_prefix(rows: Rows, params: Params, request: Batch) -> Prefix:
  """The prefix `[bos] [boi]` of the null branch, computed once and repeated for the batch."""
  model = rows.model
  one = jax.tree.map(lambda leaf: leaf[:1], dataclasses.replace(request, encoded={}))
  regions = build(rows, one, jnp.zeros((1, rows.codes), jnp.int32), ALL)
  present = jnp.array([rows.slot('bos'), rows.slot('boi')])
  pair = jax.tree.map(lambda leaf: leaf[:, present], regions['ar'])
  # The two tokens move to the front; the slots behind them stay absent.
  absent = regions['ar'].ids.shape[1] - 2
  rest = jax.tree.map(lambda leaf: jnp.zeros((1, absent), leaf.dtype), pair.visibility)
  key = concatenate([pair.visibility, rest, regions['dit'].visibility])
  body, _ = model.caches(params, key)
  hidden, body = tokens(model, params, pair, body, 0)
  _, head = model.caches(params, body.key)
  stream = mot.Stream(hidden, pair.positions, pair.visibility)
  caches = Caches(body, model.head(params, {'ar': stream}, head, 0)[1])
  return Prefix(caches, regions['dit']).repeat(request.example.shape[0])


def render(
  rows: Rows,
  settings: SampleConfig,
  params: Params,
  noise: Array,
  guidance: Guidance,
  prefix: Callable[[frozenset[str]], Prefix],
) -> Array:
  """Flow steps from `noise` [B, h, w, C] to latents; `prefix` is that of flow.Phase."""
  network = functools.partial(velocity, rows, params)
  times = flow.time_grid(settings.steps, settings.shift)
  return flow.sample(network, noise, times, [flow.Phase(settings.steps, guidance, prefix)])


def velocity(rows: Rows, params: Params, x: Array, time: Array, prefix: Prefix) -> Array:
  """Velocities [n B, h, w, C] of noisy latents [B, h, w, C] on a prefix of n branches."""
  model, B, image, caches = rows.model, x.shape[0], prefix.state, prefix.cache
  at = caches.body.key.order.shape[1] - image.ids.shape[1]
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
  return implied_velocity(rows.flow, prediction, repeat(x), time)


def build(
  rows: Rows, request: Batch, codes: Array, dropped: frozenset[str] = frozenset()
) -> dict[str, Region]:
  """The regions of a request's sequences, without some of its conditions."""
  every = lambda keep: jnp.full(request.example.shape, keep)
  keep = {name: every(name not in dropped) for name in layouts.CONDITIONS}
  return rows.build(request, codes, keep)


def tokens(
  model: Unified, params: Params, region: Region, cache: mot.Cache, at: Array | int
) -> tuple[Array, mot.Cache]:
  """Final-norm hidden states of tokens whose keys and values go to slots from `at`."""
  stream = model.token_stream(params, region)
  hidden, cache = model.backbone(params, {'ar': stream}, cache, at)
  return hidden['ar'], cache


def _begin(
  rows: Rows, params: Params, request: Batch, region: Region, cache: mot.Cache
) -> tuple[Array, mot.Cache]:
  """`tokens` of the first slots, among which the source image of an edit may be."""
  stream = rows.token_stream(params, region, request.encoded.get('source_latents'))
  hidden, cache = rows.model.backbone(params, {'ar': stream}, cache, 0)
  return hidden['ar'], cache


def _prefix(
  rows: Rows, params: Params, regions: Mapping[str, Region], hidden: Array, body: mot.Cache
) -> Prefix:
  """The flow's prefix: fills a cache for the head from the tokens' hidden states."""
  region = regions['ar']
  _, head = rows.model.caches(params, body.key)
  stream = mot.Stream(hidden, region.positions, region.visibility)
  _, head = rows.model.head(params, rows.head_streams(params, stream), head, 0)
  return Prefix(Caches(body, head), regions['dit'])


def _slots(region: Region, start: int, stop: int | None) -> Region:
  return jax.tree.map(lambda leaf: leaf[:, start:stop], region)


def _slot(region: Region, at: Array) -> Region:
  return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, 1, 1), region)
