"""Sampling with LlamaGen: the visual prompt code by code, then the image's codes, from a class.

One cache holds the keys and values of the whole sequence. With guidance, sequences of the null
class are stacked behind the conditional ones and are fed the same codes. Visual prompt and image
have separate guidance scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params
from vpe_jax.models import mot
from vpe_jax.models.llamagen import LlamaGen
from vpe_jax.sampling import autoregressive, guidance
from vpe_jax.sampling.guidance import Branch, Guidance
from vpe_jax.sampling.prefix import Prefix

CLASS = frozenset({'class'})  # the condition that guidance drops


def sample(
  model: LlamaGen, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[dict[str, Array], Array]:
  """The visual prompt [B, P], where the model has one, and the image's codes [B, N]: int32.

  Args:
    model: the network.
    settings: sampling settings, static under jit.
    params: parameters of the network, layers stacked or unstacked.
    request: `text[:, 0]` is the class; an encoded `visual_prompt` is used instead of the model's.
    rng: the key of the call.
  """
  encoded, has_visual_prompt = dict(request.encoded), bool(model.config.prefix_tokens)
  blocks = ('plan', 'codes') if has_visual_prompt and not encoded else ('codes',)
  branches = guidance.stacked(*(_guidance(settings, block) for block in blocks))
  prefix = _start(model, params, request, branches)
  if 'plan' in blocks:
    codes, prefix = _sample_block(model, settings, params, request, rng, 'plan', branches, prefix)
    encoded = {'visual_prompt': codes}
  elif has_visual_prompt:
    codes = jnp.concatenate([encoded['visual_prompt']] * len(branches))
    prefix = _feed(model, params, model.embed_prefix(params, codes), prefix, 1)
  return encoded, _sample_block(model, settings, params, request, rng, 'codes', branches, prefix)[0]


def draft(
  model: LlamaGen, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> Array:
  """Only the visual prompt [B, P] int32, of a model that has one; arguments: see `sample`."""
  branches = guidance.stacked(_guidance(settings, 'plan'))
  prefix = _start(model, params, request, branches)
  return _sample_block(model, settings, params, request, rng, 'plan', branches, prefix)[0]


def plan_likelihood(model: LlamaGen, params: Params, request: Batch) -> Array:
  """Mean log-probability [B] of the request's visual prompts given the classes, in nats."""
  codes = request.encoded['visual_prompt']
  before = model.embed_prefix(params, codes[:, :-1])
  x = jnp.concatenate([model.embed_classes(params, request.inputs['text'][:, 0]), before], axis=1)
  hidden, _ = model.states(params, model.stream(x))
  return autoregressive.log_likelihood(model.logits(params, hidden, 'prefix'), codes)


def _guidance(settings: SampleConfig, block: str) -> Guidance:
  """Guidance of a block: `plan` (the visual prompt) or `codes` (the image)."""
  scale = settings.plan_guidance if block == 'plan' else settings.guidance
  return Guidance.classifier_free(scale, CLASS)


def _start(model: LlamaGen, params: Params, request: Batch, branches: Sequence[Branch]) -> Prefix:
  """Feeds the class tokens of all branches to a cache with a slot for each token."""
  c, classes = model.config, request.inputs['text'][:, 0]
  null = jnp.full_like(classes, c.classes)
  classes = jnp.concatenate([null if branch.dropped else classes for branch in branches])
  slots = 1 + c.prefix_tokens + c.image_tokens
  whole = model.stream(jnp.zeros((classes.shape[0], slots, c.body.width)))
  cache = mot.empty_cache(model.layer, params['layers'], whole.visibility, model.dtype)
  x = model.embed_classes(params, classes)
  return _feed(model, params, x, Prefix(cache, x), 0)


def _feed(model: LlamaGen, params: Params, x: Array, prefix: Prefix, at: Array | int) -> Prefix:
  """Runs tokens [B, L, D] whose keys and values go to slots from `at`.

  The state of the returned prefix is the hidden state [B, 1, D] of the last token.
  """
  hidden, cache = model.states(params, model.stream(x, at), prefix.cache, at)
  return Prefix(cache, hidden[:, -1:])


def _sample_block(
  model: LlamaGen,
  settings: SampleConfig,
  params: Params,
  request: Batch,
  rng: Array,
  block: str,
  branches: Sequence[Branch],
  prefix: Prefix,
) -> tuple[Array, Prefix]:
  """Samples the codes [B, L] of a block (see `_guidance`), which has its own random stream."""
  c, is_prefix = model.config, block == 'plan'
  first, length = (1, c.prefix_tokens) if is_prefix else (1 + c.prefix_tokens, c.image_tokens)
  embed = model.embed_prefix if is_prefix else model.embed_codes

  def feed(prefix: Prefix, codes: Array, index: Array) -> Prefix:
    return _feed(model, params, embed(params, codes[:, None]), prefix, first + index)

  logits = lambda hidden: model.logits(params, hidden, 'prefix' if is_prefix else block)[:, -1]
  guided = _guidance(settings, block)
  choose = autoregressive.categorical(logits, settings, guided, branches, length)
  keys = rng_lib.example_keys(rng, block, request.example)
  return autoregressive.generate(feed, prefix, length, keys, choose, len(branches))
