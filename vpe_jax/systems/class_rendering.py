"""Drawing with Transfusion: the plan code by code, then flow steps on what it left in the cache.

Class and plan are computed once; each flow step runs the picture's tokens alone. The null branch of
guidance is the null class without a plan: one row, shared by the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import Array, Batch, Params
from vpe_jax.models import mot
from vpe_jax.models.transfusion import Row, Transfusion
from vpe_jax.objectives.flow_matching import FlowConfig, implied_velocity
from vpe_jax.sampling import decoding, guidance, solver

State = tuple[mot.Cache, Array]  # what was fed, and the hidden state [B, 1, D] of the last of it
Branch = tuple[Row, mot.Cache]  # whole rows, and the keys and values before their pictures


def draw(
  model: Transfusion,
  settings: SampleConfig,
  params: Params,
  request: Batch,
  rng: Array,
  flow: FlowConfig,
) -> tuple[dict[str, Array], Array]:
  """The visual prompt [B, P] int32, where the model has one, and latents [B, h, w, C] float32.

  Args:
    model: the network.
    settings: static.
    params: of the network, layers stacked or apart.
    request: `text[:, 0]` is the class; an encoded `visual_prompt` is used instead of the model's.
    rng: the key of the call.
    flow: gives what the network predicts.
  """
  c, B = model.config, request.example.shape[0]
  plan, branch = conditional(model, settings, params, request, rng)
  normal = lambda key: jax.random.normal(key, (c.latent_size, c.latent_size, c.latent_channels))
  noise = rng_lib.per_example(normal, rng, 'noise', request.example)
  weights = guidance.branches(settings.guidance)
  made = {'conditional': lambda: branch, 'null': lambda: null(model, params, B)}
  branches = {name: made[name]() for name in weights}
  return plan, render(model, settings, params, branches, noise, flow)


def conditional(
  model: Transfusion, settings: SampleConfig, params: Params, request: Batch, rng: Array
) -> tuple[dict[str, Array], Branch]:
  """Writes the visual prompt, or reads the request's; empty where the model has none."""
  length = model.config.plan_tokens
  row, state = _start(model, params, request.inputs['text'][:, 0], keep=True)
  if not length:
    return {}, (row, state[0])
  if 'visual_prompt' in request.encoded:
    codes = request.encoded['visual_prompt']
    cache, _ = _feed(model, params, row, model.embed_plan(params, codes), state, 1)
    return {'visual_prompt': codes}, (row, cache)

  def logits_of(state: State) -> Array:
    return model.logits(params, state[1])[:, -1]

  def step(state: State, codes: Array, index: Array) -> tuple[Array, State]:
    x = model.embed_plan(params, codes[:, None])
    state = _feed(model, params, row, x, state, 1 + index)
    return logits_of(state), state

  keys = rng_lib.example_keys(rng, 'plan', request.example)
  plan, state = decoding.decode(step, state, logits_of(state), length, keys, settings)
  return {'visual_prompt': plan}, (row, state[0])


def plan_likelihood(model: Transfusion, params: Params, request: Batch) -> Array:
  """The mean log-probability [B] of the request's visual prompts given the classes, in nats."""
  codes = request.encoded['visual_prompt']
  before = model.embed_plan(params, codes[:, :-1])
  x = jnp.concatenate([model.embed_classes(params, request.inputs['text'][:, 0]), before], axis=1)
  row = model.row(jnp.ones(request.example.shape, bool))
  hidden, _ = model.states(params, row.stream(x))
  return decoding.log_likelihood(model.logits(params, hidden), codes)


def null(model: Transfusion, params: Params, count: int) -> Branch:
  """The null class without a plan, computed on one row for a batch of `count`."""
  classes = jnp.full((1,), model.config.classes - 1, jnp.int32)
  row, (cache, _) = _start(model, params, classes, keep=False)
  row = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, 0), row)
  return row, mot.repeat(cache, count)


def render(
  model: Transfusion,
  settings: SampleConfig,
  params: Params,
  branches: Mapping[str, Branch],
  noise: Array,
  flow: FlowConfig,
) -> Array:
  """Euler steps from `noise` [B, h, w, C] to latents; all branches of guidance in one batch."""
  weights = guidance.branches(settings.guidance)
  rows, caches = zip(*branches.values())
  row, cache = functools.reduce(guidance.stack, rows), functools.reduce(mot.join, caches)
  first = model.config.first

  def velocity(x: Array, time: Array) -> Array:
    # All branches see the same picture: it is embedded once.
    tokens = model.embed_picture(params, x, jnp.full(x.shape[:1], time))
    stream = row.stream(jnp.concatenate([tokens] * len(branches)), first)
    hidden, _ = model.states(params, stream, cache, first)
    prediction = guidance.weighted(
      model.velocity(params, hidden), [weights[name] for name in branches]
    )
    return implied_velocity(flow, prediction, x, time)

  return solver.euler(velocity, noise, solver.time_grid(settings.steps, settings.shift))


def _start(model: Transfusion, params: Params, classes: Array, keep: bool) -> tuple[Row, State]:
  """Feeds the class token to an empty cache, which has a slot for each token of the row."""
  row = model.row(jnp.full(classes.shape, keep))
  cache = mot.empty_cache(model.layer, params['layers'], row.visibility, model.dtype)
  x = model.embed_classes(params, classes)
  return row, _feed(model, params, row, x, (cache, x), 0)


def _feed(
  model: Transfusion, params: Params, row: Row, x: Array, state: State, at: Array | int
) -> State:
  """Runs tokens [B, L, D] whose keys and values go to slots from `at`."""
  hidden, cache = model.states(params, row.stream(x, at), state[0], at)
  return cache, hidden[:, -1:]
