"""Editing: parameters, dropped conditions, losses, and cached prefixes of the flow steps."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import edit as config_file
from tests.small_systems import (
  assert_close,
  encoded_examples,
  flow_step,
  host_params,
  request_of,
  with_encoded,
)
from vpe_jax import rng, systems
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import heldout
from vpe_jax.sampling import flow
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.prefix import Prefix
from vpe_jax.sharding import leaves_by_path
from vpe_jax.systems.vpe import layouts
from vpe_jax.systems.vpe.editing import Sampling
from vpe_jax.training.state import split_trainable

KEY = rng.run_key(0)
B = 4
ALL = jnp.ones(B, bool)
CLOCK = jnp.array([0.3, 0.5, 0.7, 0.9])


def _system(arch='internal', preset='debug', **changes):
  config = config_file.get_config(f'{preset},arch={arch}')
  config.data.update(source='synthetic', encode='cached')
  if preset == 'debug':
    config.data.text_length = 5
    config.model.dual_path.encoder.layers = config.model.head.layers = 1
  config.update(changes)
  return systems.build(config.to_dict())


@functools.cache
def _cached_system(arch):
  return _system(arch)


def _batch(system):
  return encoded_examples(system, B)


@functools.cache
def _params(arch='internal'):
  return host_params(_cached_system(arch))


def test_parameters_are_the_papers_and_the_same_in_both_architectures():
  ours, theirs = (
    {path: leaf.shape for path, leaf in leaves_by_path(jax.eval_shape(system.init, KEY)).items()}
    for system in (_system(arch, 'paper') for arch in ('internal', 'external'))
  )
  assert ours == theirs
  assert abs(sum(np.prod(shape) for shape in ours.values()) - 4_570.0e6) < 0.1e6
  added = [path for path in ours if path.startswith('ar/dual_path/')]
  assert {path.replace('ar/', 'dit/', 1) for path in added} <= set(ours)
  assert abs(sum(np.prod(ours[path]) for path in added) - 403.74e6) < 0.01e6


@pytest.mark.parametrize('arch', ['internal', 'external'])
def test_conditions_are_dropped_at_the_rates_of_appendix_d(arch):
  system = _cached_system(arch)
  many = dataclasses.replace(_batch(system), example=jnp.arange(8192))
  keep = system.dropping.keep(many, KEY, system.stages[0])
  prompt, reference = (np.asarray(keep[name]) for name in layouts.CONDITIONS)
  shares = [np.mean(x) for x in (~prompt & reference, prompt & ~reference, ~prompt & ~reference)]
  expected = [0.05, 0.05, 0.05 if arch == 'internal' else 0.0]
  np.testing.assert_allclose(shares, expected, atol=0.01)
  assert arch == 'internal' or shares[2] == 0


def _uncached(system, params, batch, keep):
  """Hidden states and velocity at CLOCK, compiled and uncached."""

  def run(params):
    regions = system.experts.regions(batch, batch.encoded['visual_prompt'], keep)
    return system.experts.forward(
      params, regions, (batch.encoded['latents'], CLOCK), batch.encoded['source_latents']
    )

  return jax.jit(run)(params)


def test_each_cached_branch_equals_its_whole_sequence():
  """All conditions, the source image alone, and none; the three differ."""
  system, params = _cached_system('internal'), _params()
  batch = _batch(system)
  experts, settings = system.experts, Sampling(steps=2)
  request = request_of(batch, 'visual_prompt', 'source_latents')

  @jax.jit
  def cached(params):
    _, prefix = experts.prefix(params, request, KEY, settings)
    branches = {
      'conditional': prefix,
      'reference': experts.source_prefix(params, request, prefix),
      'null': experts.null_prefix(params, request),
    }
    step = lambda branch: flow_step(system, params, branch, batch.encoded['latents'], CLOCK)
    return {name: step(branch) for name, branch in branches.items()}

  velocities = cached(params)
  for name, keep_prompt, keep_source in (
    ('conditional', ALL, ALL),
    ('reference', ~ALL, ALL),
    ('null', ~ALL, ~ALL),
  ):
    keep = {layouts.PROMPT: keep_prompt, layouts.SOURCE: keep_source}
    assert_close(velocities[name], _uncached(system, params, batch, keep)[1])
  assert float(jnp.abs(velocities['conditional'] - velocities['reference']).max()) > 1e-3
  assert float(jnp.abs(velocities['reference'] - velocities['null']).max()) > 1e-3


def test_two_branches_equal_three_where_the_image_scale_is_1():
  system, params = _cached_system('internal'), _params()
  request = request_of(_batch(system), 'visual_prompt', 'source_latents')

  def integrate(count, image=1.0):
    """Integrates the first `count` branches; the last of three is computed even at weight 0."""
    settings = Sampling(steps=2, shift=1.0, guidance=2.5, image_guidance=image)
    experts, every = system.experts, Guidance.edit(2.5, image, *layouts.CONDITIONS).branches
    weights = [branch.weight for branch in every[:count]]

    def run(params):
      _, conditional = experts.prefix(params, request, KEY, settings)
      reference = experts.source_prefix(params, request, conditional)
      unconditional = experts.null_prefix(params, request)
      prefix = Prefix.stack([conditional, reference, unconditional][:count])
      step = lambda x, time: experts.renderer.velocity(params, x, time, prefix)
      noise = experts.renderer.noise(request, KEY)
      parts = lambda x, time: jnp.split(step(x, time), count)
      velocity = lambda x, time, i: sum(w * v for w, v in zip(weights, parts(x, time)))
      return flow.integrate(velocity, noise, flow.time_grid(2))

    return jax.jit(run)(params), settings

  two, text_settings = integrate(2)
  three, _ = integrate(3)
  assert_close(two, three, 1e-5)
  both, both_settings = integrate(3, image=1.5)
  for expected, settings in ((two, text_settings), (both, both_settings)):
    _, latents = jax.jit(lambda p, s=settings: system.sample(p, request, KEY, s))(params)
    assert_close(latents, expected, 1e-5)


def test_the_source_image_is_seen_by_later_tokens_unless_it_is_dropped():
  system, params = _cached_system('internal'), _params()
  batch = _batch(system)
  changed = with_encoded(batch, source_latents=-batch.encoded['source_latents'])
  keep = {layouts.PROMPT: ALL, layouts.SOURCE: jnp.array([True, False, True, False])}
  (hidden, velocity), (changed_hidden, changed_velocity) = (
    _uncached(system, params, b, keep) for b in (batch, changed)
  )
  at = system.layout.place('bot')[0]
  hidden_difference = jnp.abs(hidden - changed_hidden)[:, at:].max((1, 2))
  velocity_difference = jnp.abs(velocity - changed_velocity).max((1, 2, 3))
  for difference in (hidden_difference, velocity_difference):
    assert (difference[::2] > 1e-3).all() and (difference[1::2] == 0).all()


@pytest.mark.parametrize('arch', ['internal', 'external'])
def test_trained_parameters_and_evaluated_losses(arch):
  system, params = _cached_system(arch), _params(arch)
  batch, (stage,) = _batch(system), system.stages
  internal = arch == 'internal'
  trainable, frozen = split_trainable(params, stage)
  assert set(frozen) == (set() if internal else {'dit'})
  assert ('flow' in stage.losses) == internal
  # As held-out evaluation runs it.
  every = heldout.with_all_losses(system.stages, 0)
  losses = lambda p: system.losses(p, {}, batch, KEY, jnp.int32(3), every)
  terms, gradients = jax.jit(
    lambda p: (losses(p), jax.grad(lambda p: losses(p)['next_token'].sum)(p))
  )(params)
  assert float(terms['flow'].weight) == float(internal)
  np.testing.assert_allclose(float(terms['next_token'].weight), 0.1 if internal else 1.0)
  counts = system.counts(batch, KEY, 3, every)
  assert {name: float(n) for name, n in counts.items()} == {
    name: float(term.count) for name, term in terms.items()
  }
  source_gradient = gradients['ar']['dual_path']['encoder']['mlp']['up']['kernel']
  assert float(jnp.abs(source_gradient).max()) > 0


def test_external_writes_from_the_source_image_and_renders_from_the_visual_prompt_alone():
  """The diffusion expert reads the AR expert's states at the codes, and no other sequence."""
  system, params = _cached_system('external'), _params('external')
  request = request_of(_batch(system), 'source_latents')
  changed = with_encoded(request, source_latents=-request.encoded['source_latents'])
  settings = Sampling(steps=2, guidance=2.5, temperature=0.0)
  codes, latents = jax.jit(lambda p: system.sample(p, request, KEY, settings))(params)
  assert np.isfinite(latents).all() and float(jnp.abs(latents).max()) > 0
  write = jax.jit(lambda p, r: system.draft(p, r, KEY, settings)['visual_prompt'])
  np.testing.assert_array_equal(write(params, request), codes)
  assert (write(params, changed) != codes).any()
  names = [span.name for span in system.experts.layout.spans]
  assert names == ['codes', 'boi', 'time', 'latents']
  with pytest.raises(UserError, match='image_guidance is 1.5, .* set it to 1'):
    guided = dataclasses.replace(settings, image_guidance=1.5)
    jax.eval_shape(lambda p: system.sample(p, request, KEY, guided), params)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'start': ''}, 'continues a run that generates images'),
    ({'start': 'ar=a run'}, 'continues a run that generates images'),
    ({'stages': ('joint',)}, "this system has one stage, 'edit'"),
  ],
)
def test_errors_in_stages_and_start(changes, message):
  with pytest.raises(UserError, match=message):
    _system(**changes)


@pytest.mark.parametrize(
  'arch, model, message',
  [
    ('external', {'drop': 0.05}, 'it must be 0 with arch=external'),
    ('internal', {'drop_reference': 0.95}, 'at most 1 together'),
    ('internal', {'references': False}, 'true in this system'),
    ('internal', {'eoi': 5000}, 'below text_vocab'),
  ],
)
def test_errors_in_the_model(arch, model, message):
  config = config_file.get_config(f'debug,arch={arch}')
  config.model.update(model)
  with pytest.raises(UserError, match=message):
    systems.build(config.to_dict())


def test_the_second_dual_path_comes_from_show_o2_or_from_the_parent_run():
  system = _system()
  (weights,) = system.initialization.grown
  assert (weights.family, weights.paths) == ('run', (('dit/dual_path/', 'ar/dual_path/'),))
  system = _system(preset='paper')
  (weights,) = system.initialization.grown
  assert weights.family == 'showo2' and not weights.sizes.references
  assert not system.initialization.pretrained
  assert weights.source.startswith('showlab/show-o2')
