"""Guided flow steps with a prefix KV cache against steps that recompute the whole sequence.

  python -m tests.benchmarks.guided_sampling --json=guided_sampling.json

50 steps at the paper's lengths (829 tokens before 1,025 of the image; in editing 1,856, where text
tokens replace those of the source image), half its widths, float32. The prefill of both branches is
included. The baseline computes the same padded sequences with the same attention. `ratios` are
speeds relative to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import t2i
from tests.benchmarks import timing
from tests.small_systems import redrawn
from vpe_jax import rng, systems
from vpe_jax.contracts import Array, Batch, Params, System, concatenate
from vpe_jax.sampling import flow
from vpe_jax.sampling.guidance import Guidance, combine

REFERENCE = 1027  # tokens of a source image: begin, time, 1,024 of the image, end
TEXTS = {'generation': 249, 'editing': 249 + REFERENCE}
flags.DEFINE_list('cases', list(TEXTS), 'cases to measure')
flags.DEFINE_integer('flow_steps', 50, 'flow steps')
flags.DEFINE_integer('rounds', 3, 'timed rounds')


def build(text: int) -> System:
  """The system at the paper's lengths and a small width."""
  config = t2i.get_config('debug')
  config.data.update(source='synthetic', text_length=text)
  # Half the paper's widths, and fewer layers. In the head's last layer, the baseline also omits
  # outputs that are not read: a large share of the work if there are few layers.
  expert = {'width': 768, 'mlp': 4480, 'layers': 2, 'heads': 6, 'kv_heads': 1, 'head_width': 128}
  config.model.update(
    ar=expert, dit=dict(expert), latent_size=64, latent_channels=16, image={'channels': 16},
    head={'width': 1024, 'mlp': 4096, 'layers': 4, 'heads': 16, 'kv_heads': 4, 'head_width': 64},
    dual_path={'table': 27, 'encoder': {'width': 576, 'layers': 2, 'heads': 8, 'mlp': 2152}},
    visual_prompt={'siglip': {'image_size': 384, 'patch': 16}},
  )  # fmt: skip
  config.sample.update(steps=flags.FLAGS.flow_steps, guidance=5.0)
  return systems.build(config.to_dict())


def cached(system: System, params: Params, request: Batch, noise: Array) -> Array:
  """Latents as the system renders them: a prefix per branch once, then only the image's tokens."""
  experts, settings = system.experts, system.config.sample
  _, conditional = experts.prefix(params, request, rng.run_key(0), settings)
  null = lambda: experts.null_prefix(params, request)
  prefix = lambda dropped: null() if dropped else conditional
  guidance = Guidance.classifier_free(settings.guidance, system.experts.conditions)
  return experts.renderer.render(params, noise, settings, guidance, prefix)


def recomputed(system: System, params: Params, request: Batch, noise: Array) -> Array:
  """Latents with the whole sequences of both branches in every step."""
  settings, codes = system.config.sample, request.encoded['visual_prompt']
  guidance = Guidance.classifier_free(settings.guidance, system.experts.conditions)
  branches = guidance.needed
  build = lambda branch: system.experts.ar.request_regions(request, codes, branch.dropped)
  parts = [build(branch) for branch in branches]
  regions = concatenate(parts, 0)

  def velocity(x: Array, time: Array, step: Array) -> Array:
    stacked = jnp.concatenate([x] * len(branches))
    clock = jnp.full(stacked.shape[:1], 1.0 - time)
    return combine(guidance, -system.model(params, regions, stacked, clock)[1], branches)

  return flow.integrate(velocity, noise, flow.time_grid(settings.steps, settings.shift))


def _random_params(system: System) -> Params:
  """Random weights; layers initialized to zero get random weights too."""
  fresh = redrawn(jax.jit(system.init)(rng.run_key(0)), 0.02)
  return system.prepare(fresh, jax.default_backend())


def measure_case(name: str) -> dict[str, Any]:
  """Measures both sides of one case."""
  system, generator = build(TEXTS[name]), np.random.default_rng(0)
  c, length = system.config.model, TEXTS[name]
  text = jnp.asarray(generator.integers(8, 1024, (1, length)), jnp.int32)
  codes = jnp.asarray(generator.integers(0, c.codes, (1, c.visual_prompt_tokens)), jnp.int32)
  request = Batch(
    example=jnp.zeros((1,), jnp.int32),
    inputs={'text': text, 'text_length': jnp.full((1,), length, jnp.int32)},
    encoded={'visual_prompt': codes},
  )
  shape = (1, c.latent_size, c.latent_size, c.latent_channels)
  noise, params = jax.random.normal(jax.random.key(2), shape), _random_params(system)
  sides = {}
  for side, function in (('cached', cached), ('recomputed', recomputed)):
    run = jax.jit(lambda p, r, n, f=function: f(system, p, r, n))
    sides[side] = lambda run=run: np.asarray(run(params, request, noise))
  error = timing.check_equal(sides['cached'](), sides['recomputed'](), name)
  seconds = timing.alternate(sides, flags.FLAGS.rounds, warm=True)
  tokens = {span.name: span.length for span in system.layout.spans}
  return {
    'ratio': timing.ratio(seconds, 'cached', 'recomputed'),
    'milliseconds': timing.medians(seconds),
    'error': error,
    'tokens': {'before': sum(tokens.values()) - 1025, 'image': 1025},
    'sample': dataclasses.asdict(system.config.sample),
  }


def measure() -> dict[str, Any]:
  """Measures generation and editing."""
  cases = {name: measure_case(name) for name in flags.FLAGS.cases}
  return {'ratios': {name: case['ratio'] for name, case in cases.items()}, 'cases': cases}


if __name__ == '__main__':
  timing.main(measure)
