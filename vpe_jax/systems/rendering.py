"""Drawing with a unified model: the plan token by token, then the picture by flow steps.

What the picture stands on is computed once. Prompt and plan leave their keys and values in a cache
while the plan is decoded; each flow step runs the picture's rows alone against it. The null
branch of guidance is `[bos] [boi]` with its own positions: one row, shared by the whole batch.
Without visual prompt the picture stands on the prompt alone.
With two rows (`arch=external`) decoding and flow steps are the same, and systems/external.py makes
what the latter stand on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params, Region, concatenate
from vpe_jax.data import sequence
from vpe_jax.models import mot
from vpe_jax.models.unified import Unified, row_visibility
from vpe_jax.objectives.flow_matching import FlowConfig, implied_velocity
from vpe_jax.sampling import decoding, guidance, solver

Regions = dict[str, Region]


@dataclasses.dataclass(frozen=True)
class Job:
  """What is static in a call: the network, its sequence, the settings, and the flow's target."""

  model: Unified
  spans: tuple[sequence.Span, ...]
  vocabulary: sequence.Vocabulary
  settings: SampleConfig
  flow: FlowConfig = dataclasses.field(default=FlowConfig(), kw_only=True)

  def slot(self, kind: str) -> int:
    """First slot of a span in its expert's region."""
    return sequence.place(self.spans, kind)[0]

  @property
  def codes(self) -> int:
    """Tokens of a plan."""
    return sum(span.length for span in self.spans if span.kind == 'codes')

  def regions(self, request: Batch, codes: Array, dropped: Sequence[str] = ()) -> Regions:
    """The rows of tokens of this request, without some of its conditions."""
    every = lambda keep: jnp.full(request.example.shape, keep)
    return sequence.build(
      self.spans,
      self.vocabulary,
      request.inputs['text'],
      request.inputs['text_length'],
      codes,
      {name: every(name not in dropped) for name in sequence.CONDITIONS},
      self.model.config.multiple,
    )

  def begin(
    self, params: Params, request: Batch, region: Region, cache: mot.Cache
  ) -> tuple[Array, mot.Cache]:
    """Final-norm hidden states of a row's first tokens, whose keys and values go to its slots."""
    del request
    return tokens(self, params, region, cache, 0)

  def head_streams(self, params: Params, stream: mot.Stream) -> dict[str, mot.Stream]:
    """A whole row of tokens as the head takes it."""
    del params
    return {'ar': stream}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """What all flow steps of a branch reuse.

  Attributes:
    picture: the picture's rows.
    body: cache of the backbone.
    head: cache of the head.
    memory: what cross-attention looks at, of a model that has any.
  """

  picture: Region
  body: mot.Cache
  head: mot.Cache
  memory: mot.Cache | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
  """The token expert's row with a plan in it: what it left behind, up to the last code.

  Attributes:
    region: the row's tokens; of the codes' ids, those that were given.
    rest: the other regions that the network's row has.
    hidden: final-norm hidden states of the slots before [eot] [B, L, D].
    body: keys and values of these slots, in a cache for the whole row.
  """

  region: Region
  rest: dict[str, Region]
  hidden: Array
  body: mot.Cache


def draw(job: Job, params: Params, request: Batch, rng: Array) -> tuple[Array, Array]:
  """Codes [B, P] and latents [B, h, w, C] float32 for a batch of requests."""
  begin = plan if job.codes else unplanned
  codes, prefix = begin(job, params, request, rng)
  null = lambda: null_prefix(job, params, request)
  return codes, guided(job, params, request, prefix, null, rng)


def guided(
  job: Job,
  params: Params,
  request: Batch,
  prefix: Prefix,
  null: Callable[[], Prefix],
  rng: Array,
) -> Array:
  """Latents [B, h, w, C] of a batch of requests, on the branches that the guidance needs."""
  weights = guidance.branches(job.settings.guidance)
  made = {'conditional': lambda: prefix, 'null': null}
  branches = {name: made[name]() for name in weights}
  return render(job, params, branches, noise(job, request, rng), weights)


def noise(job: Job, request: Batch, rng: Array) -> Array:
  """Where the flow of each request begins: normal latents [B, h, w, C]."""
  c = job.model.config
  shape = (c.latent_size, c.latent_size, c.latent_channels)
  normal = lambda key: jax.random.normal(key, shape)
  return rng_lib.per_example(normal, rng, 'noise', request.example)


def plan(job: Job, params: Params, request: Batch, rng: Array) -> tuple[Array, Prefix]:
  """Decodes the plan (or takes the request's) and leaves the whole prefix in caches."""
  codes, row = decode(job, params, request, rng)
  end = job.slot('eot')
  tail = _slots(row.region, end, row.region.ids.shape[1])
  last, body = tokens(job, params, tail, row.body, end)
  hidden = jnp.concatenate([row.hidden, last], 1)
  return codes, _prefix(job, params, {'ar': row.region, **row.rest}, hidden, body)


def unplanned(job: Job, params: Params, request: Batch, rng: Array) -> tuple[Array, Prefix]:
  """No codes [B, 0], and the prefix `[bos] text [boi]`, of a model without visual prompt."""
  del rng
  codes = jnp.zeros((request.example.shape[0], 0), jnp.int32)
  regions = job.regions(request, codes)
  body, _ = job.model.caches(params, row_visibility(regions))
  hidden, body = job.begin(params, request, regions['ar'], body)
  return codes, _prefix(job, params, regions, hidden, body)


def decode(job: Job, params: Params, request: Batch, rng: Array) -> tuple[Array, Decoded]:
  """Decodes the plan, or reads the request's: all of the token expert's row before [eot].

  With `plan_guidance` other than 1, rows without text are decoded beside the others on the same
  codes, for the logits to be guided away from theirs.
  """
  length, B = job.codes, request.example.shape[0]
  given = request.encoded.get('visual_prompt')
  led = given is None and job.settings.plan_guidance != 1.0
  if led:
    empty = {'text_length': jnp.zeros_like(request.inputs['text_length'])}
    untold = dataclasses.replace(request, inputs={**request.inputs, **empty})
    request = guidance.stack(request, untold)
  rows = request.example.shape[0]
  codes = jnp.zeros((rows, length), jnp.int32) if given is None else given
  rest = job.regions(request, codes)
  body, _ = job.model.caches(params, row_visibility(rest))
  region = rest.pop('ar')
  if given is not None:
    hidden, body = job.begin(params, request, _slots(region, 0, job.slot('eot')), body)
    return codes, Decoded(region, rest, hidden, body)

  first = job.slot('codes')
  hidden = jnp.zeros((rows, job.slot('eot'), job.model.config.ar.width), job.model.dtype)
  start, body = job.begin(params, request, _slots(region, 0, first), body)
  hidden = hidden.at[:, :first].set(start)

  def step(cache: Any, drawn: Array, index: Array) -> tuple[Array, Any]:
    held, states = cache
    at = first + index
    drawn = guidance.both(drawn) if led else drawn
    here = dataclasses.replace(_slot(region, at), ids=drawn[:, None])
    state, held = tokens(job, params, here, held, at)
    states = jax.lax.dynamic_update_slice_in_dim(states, state, at, 1)
    return logits_of(state), (held, states)

  def logits_of(state: Array) -> Array:
    logits = job.model.code_logits(params, state)[:, -1]
    if not led:
      return logits
    return guidance.classifier_free(*guidance.split(logits), job.settings.plan_guidance)

  keys = rng_lib.example_keys(rng, 'codes', request.example[:B])
  codes, (body, hidden) = decoding.decode(
    step, (body, hidden), logits_of(start), length, keys, job.settings, offset=job.vocabulary.text
  )
  if led:
    region, rest, hidden = jax.tree.map(lambda leaf: leaf[:B], (region, rest, hidden))
    body = mot.first(body, B)
  return codes, Decoded(region, rest, hidden, body)


def null_prefix(job: Job, params: Params, request: Batch) -> Prefix:
  """The prefix `[bos] [boi]` of the null branch, computed on one row for the whole batch."""
  one = jax.tree.map(lambda leaf: leaf[:1], dataclasses.replace(request, encoded={}))
  regions = job.regions(one, jnp.zeros((1, job.codes), jnp.int32), sequence.CONDITIONS)
  present = jnp.array([job.slot('bos'), job.slot('boi')])
  pair = jax.tree.map(lambda leaf: leaf[:, present], regions['ar'])
  # The two tokens move to the front of the row; the slots behind them stay absent.
  absent = regions['ar'].ids.shape[1] - 2
  rest = jax.tree.map(lambda leaf: jnp.zeros((1, absent), leaf.dtype), pair.visibility)
  key = concatenate([pair.visibility, rest, regions['dit'].visibility])
  body, _ = job.model.caches(params, key)
  hidden, body = tokens(job, params, pair, body, 0)
  _, head = job.model.caches(params, body.key)
  stream = mot.Stream(hidden, pair.positions, pair.visibility)
  prefix = Prefix(regions['dit'], body, job.model.head(params, {'ar': stream}, head, 0)[1])
  return repeated(prefix, request.example.shape[0])


def render(
  job: Job,
  params: Params,
  branches: Mapping[str, Prefix],
  noise: Array,
  weights: Mapping[str, float],
) -> Array:
  """Euler steps from `noise` [B, h, w, C] to latents; all branches of guidance in one batch.

  Each branch's velocity counts with its weight; they sum up to 1.
  """
  count, first = len(branches), next(iter(branches.values()))
  prefix = functools.reduce(_join, branches.values())
  at = prefix.body.key.order.shape[1] - prefix.picture.ids.shape[1]

  def velocity(state: Array, time: Array) -> Array:
    # All branches see the same picture: it is embedded once.
    stream, condition = job.model.picture_stream(
      params, state, jnp.full(state.shape[:1], 1.0 - time), first.picture
    )
    x, condition = (jnp.concatenate([leaf] * count) for leaf in (stream.x, condition))
    stream = mot.Stream(
      x, prefix.picture.positions, prefix.picture.visibility, memory=prefix.memory
    )
    hidden, _ = job.model.backbone(params, {'dit': stream}, prefix.body, at)
    stream = dataclasses.replace(stream, x=hidden['dit'], condition=condition)
    out, _ = job.model.head(params, {'dit': stream}, prefix.head, at)
    # Show-o2's sign: the network predicts the negative of the flow's target.
    prediction = -job.model.velocity(params, out['dit'], condition)
    prediction = guidance.weighted(prediction, [weights[name] for name in branches])
    return implied_velocity(job.flow, prediction, state, time)

  times = solver.time_grid(job.settings.steps, job.settings.shift)
  return solver.euler(velocity, noise, times)


def tokens(
  job: Job, params: Params, region: Region, cache: mot.Cache, at: Array | int
) -> tuple[Array, mot.Cache]:
  """Final-norm hidden states of tokens whose keys and values go to slots from `at`."""
  stream = job.model.token_stream(params, region)
  hidden, cache = job.model.backbone(params, {'ar': stream}, cache, at)
  return hidden['ar'], cache


def _prefix(
  job: Job,
  params: Params,
  regions: Mapping[str, Region],
  hidden: Array,
  body: mot.Cache,
) -> Prefix:
  """Fills a cache for the head from the prefix's hidden states."""
  region = regions['ar']
  _, head = job.model.caches(params, body.key)
  stream = mot.Stream(hidden, region.positions, region.visibility)
  _, head = job.model.head(params, job.head_streams(params, stream), head, 0)
  return Prefix(regions['dit'], body, head)


def _slots(region: Region, start: int, stop: int) -> Region:
  return jax.tree.map(lambda leaf: leaf[:, start:stop], region)


def _slot(region: Region, at: Array) -> Region:
  return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, at, 1, 1), region)


def repeated(prefix: Prefix, count: int) -> Prefix:
  """A prefix of one row, for a batch of `count`."""
  picture = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, 0), prefix.picture)
  again = lambda cache: cache and mot.repeat(cache, count)
  return Prefix(picture, *map(again, (prefix.body, prefix.head, prefix.memory)))


def _join(first: Prefix, second: Prefix) -> Prefix:
  picture = concatenate([first.picture, second.picture], 0)
  pairs = [(getattr(first, name), getattr(second, name)) for name in ('body', 'head', 'memory')]
  return Prefix(picture, *(one and mot.join(one, other) for one, other in pairs))
