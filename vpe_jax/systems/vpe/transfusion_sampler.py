"""Sampling with Transfusion: the visual prompt code by code, then the image by flow steps.

Class and visual prompt are computed once; each flow step runs the image's tokens on the cache of
their keys and values. The null branch of guidance is the null class without a visual prompt: one
sequence, repeated for the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params
from vpe_jax.models import mot
from vpe_jax.models.transfusion import Slots, Transfusion
from vpe_jax.objectives.flow_matching import FlowConfig, implied_velocity
from vpe_jax.sampling import autoregressive, flow
from vpe_jax.sampling.guidance import UNGUIDED, Guidance
from vpe_jax.sampling.prefix import Prefix

CLASS = frozenset({'class'})  # the condition that guidance drops


def sample(
  model: Transfusion,
  settings: SampleConfig,
  params: Params,
  request: Batch,
  rng: Array,
  config: FlowConfig,
) -> tuple[dict[str, Array], Array]:
  """The visual prompt [B, P] int32, where the model has one, and latents [B, h, w, C] float32.

  Args:
    model: the network.
    settings: sampling settings, static under jit.
    params: parameters of the network, layers stacked or unstacked.
    request: `text[:, 0]` is the class; an encoded `visual_prompt` is used instead of the model's.
    rng: the key of the call.
    config: the flow; its `target` is what the network predicts.
  """
  c, B = model.config, request.example.shape[0]
  encoded, conditional = prefill(model, settings, params, request, rng)
  normal = lambda key: jax.random.normal(key, (c.latent_size, c.latent_size, c.latent_channels))
  noise = rng_lib.per_example(normal, rng, 'noise', request.example)

  def network(x: Array, time: Array, prefix: Prefix) -> Array:
    # All branches see the same image: it is embedded once.
    tokens = model.embed_image(params, x, jnp.full((B,), time))
    branches = prefix.state.positions.shape[0] // B
    stream = prefix.state.stream(jnp.concatenate([tokens] * branches), c.first)
    hidden, _ = model.states(params, stream, prefix.cache, c.first)
    prediction = model.velocity(params, hidden)
    return implied_velocity(config, prediction, jnp.concatenate([x] * branches), time)

  prefix = lambda dropped: null_prefix(model, params, B) if dropped else conditional
  phase = flow.Phase(settings.steps, Guidance.classifier_free(settings.guidance, CLASS), prefix)
  times = flow.time_grid(settings.steps, settings.shift)
  return encoded, flow.sample(network, noise, times, [phase])


def prefill(
  model: Transfusion, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[dict[str, Array], Prefix]:
  """Samples the visual prompt, or reads the request's, and fills the cache up to the image.

  Returns:
    The visual prompt [B, P] (no entry if the model has none), and the prefix of the flow: keys and
    values before the image, and the positions and visibility of the whole sequences.
  """
  length = model.config.prefix_tokens
  slots, prefix = _start(model, params, request.inputs['text'][:, 0], keep=True)
  if not length:
    return {}, Prefix(prefix.cache, slots)
  if 'visual_prompt' in request.encoded:
    codes = request.encoded['visual_prompt']
    prefix = _feed(model, params, slots, model.embed_prefix(params, codes), prefix, 1)
    return {'visual_prompt': codes}, Prefix(prefix.cache, slots)

  def feed(prefix: Prefix, codes: Array, index: Array) -> Prefix:
    x = model.embed_prefix(params, codes[:, None])
    return _feed(model, params, slots, x, prefix, 1 + index)

  logits = lambda hidden: model.logits(params, hidden)[:, -1]
  keys = rng_lib.example_keys(rng, 'plan', request.example)
  choose = autoregressive.categorical(logits, settings, UNGUIDED, UNGUIDED.branches)
  codes, prefix = autoregressive.generate(feed, prefix, length, keys, choose)
  return {'visual_prompt': codes}, Prefix(prefix.cache, slots)


def plan_likelihood(model: Transfusion, params: Params, request: Batch) -> Array:
  """Mean log-probability [B] of the request's visual prompts given the classes, in nats."""
  codes = request.encoded['visual_prompt']
  before = model.embed_prefix(params, codes[:, :-1])
  x = jnp.concatenate([model.embed_classes(params, request.inputs['text'][:, 0]), before], axis=1)
  slots = model.slots(jnp.ones(request.example.shape, bool))
  hidden, _ = model.states(params, slots.stream(x))
  return autoregressive.log_likelihood(model.logits(params, hidden), codes)


def null_prefix(model: Transfusion, params: Params, count: int) -> Prefix:
  """The prefix with the null class alone, computed once and repeated for a batch of `count`."""
  classes = jnp.full((1,), model.config.classes - 1, jnp.int32)
  slots, prefix = _start(model, params, classes, keep=False)
  return Prefix(prefix.cache, slots).repeat(count)


def _start(model: Transfusion, params: Params, classes: Array, keep: bool) -> tuple[Slots, Prefix]:
  """Feeds the class token to an empty cache, which has a slot for each token of the sequence."""
  slots = model.slots(jnp.full(classes.shape, keep))
  cache = mot.empty_cache(model.layer, params['layers'], slots.visibility, model.dtype)
  x = model.embed_classes(params, classes)
  return slots, _feed(model, params, slots, x, Prefix(cache, x), 0)


def _feed(
  model: Transfusion, params: Params, slots: Slots, x: Array, prefix: Prefix, at: Array | int
) -> Prefix:
  """Runs tokens [B, L, D] whose keys and values go to slots from `at`.

  The state of the returned prefix is the hidden state [B, 1, D] of the last token.
  """
  hidden, cache = model.states(params, slots.stream(x, at), prefix.cache, at)
  return Prefix(cache, hidden[:, -1:])
