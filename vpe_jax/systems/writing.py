"""Drawing with LlamaGen: the plan code by code, then the picture code by code, from a class.

One cache holds the keys and values of the whole row. Where guidance is asked for, rows of the null
class stand beside the others: they are given the same codes, and each block's logits are led away
from theirs by its own scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params
from vpe_jax.models import mot
from vpe_jax.models.llamagen import LlamaGen
from vpe_jax.sampling import decoding, guidance

State = tuple[mot.Cache, Array]  # what was fed, and the hidden state [B, 1, D] of the last of it


@dataclasses.dataclass(frozen=True)
class Job:
  """What is static in a call: the network, the settings, and whether null rows stand beside."""

  model: LlamaGen
  settings: SampleConfig
  guided: bool

  def feed(self, params: Params, x: Array, state: State, at: Array | int) -> State:
    """Runs tokens [B, L, D] whose keys and values go to slots from `at`."""
    hidden, cache = self.model.states(params, self.model.stream(x, at), state[0], at)
    return cache, hidden[:, -1:]

  def both(self, codes: Array) -> Array:
    """Codes [B, ...] for all rows."""
    return guidance.both(codes) if self.guided else codes


@dataclasses.dataclass(frozen=True)
class Block:
  """A run of codes that are drawn from a vocabulary of their own.

  Attributes:
    name: of the vocabulary, as `LlamaGen.logits` knows it; and of the stream of randomness.
    first: place of the first code in the row.
    length: number of codes.
    scale: of the guidance.
    embed: maps parameters and codes [B, L] to tokens [B, L, D].
  """

  name: str
  first: int
  length: int
  scale: float
  embed: Callable[[Params, Array], Array]


def draw(
  model: LlamaGen, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[dict[str, Array], Array]:
  """The visual prompt [B, P], where the model has one, and the image's codes [B, N]: int32.

  Args:
    model: the network.
    settings: static.
    params: of the network, layers stacked or apart.
    request: `text[:, 0]` is the class; an encoded `visual_prompt` is used instead of the model's.
    rng: the key of the call.
  """
  c = model.config
  plan = dict(request.encoded)
  plans = bool(c.plan_tokens) and not plan
  guided = settings.guidance != 1.0 or (plans and settings.plan_guidance != 1.0)
  job = Job(model, settings, guided)
  start = _start(job, params, request)
  if plans:
    codes, start = _write(job, params, _plan_block(job), start, request, rng)
    plan = {'visual_prompt': codes}
  elif c.plan_tokens:
    codes = plan['visual_prompt']
    start = job.feed(params, model.embed_plan(params, job.both(codes)), start, 1)
  first, scale = 1 + c.plan_tokens, settings.guidance
  block = Block('codes', first, c.image_tokens, scale, model.embed_codes)
  return plan, _write(job, params, block, start, request, rng)[0]


def plan(
  model: LlamaGen, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> Array:
  """The plan alone [B, P] int32, of a model that has one; arguments as those of `draw`."""
  job = Job(model, settings, settings.plan_guidance != 1.0)
  start = _start(job, params, request)
  return _write(job, params, _plan_block(job), start, request, rng)[0]


def plan_likelihood(model: LlamaGen, params: Params, request: Batch) -> Array:
  """The mean log-probability [B] of the request's visual prompts given the classes, in nats."""
  codes = request.encoded['visual_prompt']
  before = model.embed_plan(params, codes[:, :-1])
  x = jnp.concatenate([model.embed_classes(params, request.inputs['text'][:, 0]), before], axis=1)
  hidden, _ = model.states(params, model.stream(x))
  return decoding.log_likelihood(model.logits(params, hidden, 'plan'), codes)


def _plan_block(job: Job) -> Block:
  length, scale = job.model.config.plan_tokens, job.settings.plan_guidance
  return Block('plan', 1, length, scale, job.model.embed_plan)


def _start(job: Job, params: Params, request: Batch) -> State:
  """Feeds the class tokens to an empty cache, which has a slot for each token of the row."""
  model, c, classes = job.model, job.model.config, request.inputs['text'][:, 0]
  if job.guided:
    classes = guidance.stack(classes, jnp.full_like(classes, c.classes))
  slots = 1 + c.plan_tokens + c.image_tokens
  row = model.stream(jnp.zeros((classes.shape[0], slots, c.body.width)))
  cache = mot.empty_cache(model.layer, params['layers'], row.visibility, model.dtype)
  x = model.embed_classes(params, classes)
  return job.feed(params, x, (cache, x), 0)


def _write(
  job: Job, params: Params, block: Block, start: State, request: Batch, rng: Array
) -> tuple[Array, State]:
  """Draws the codes [B, L] of a block; each is fed, so that the next block begins after it."""

  def logits_of(state: State) -> Array:
    logits = job.model.logits(params, state[1], block.name)[:, -1]
    if not job.guided:
      return logits
    return guidance.classifier_free(*guidance.split(logits), block.scale)

  def step(state: State, codes: Array, index: Array) -> tuple[Array, State]:
    x = block.embed(params, job.both(codes)[:, None])
    state = job.feed(params, x, state, block.first + index)
    return logits_of(state), state

  keys = rng_lib.example_keys(rng, block.name, request.example)
  return decoding.decode(step, start, logits_of(start), block.length, keys, job.settings)
