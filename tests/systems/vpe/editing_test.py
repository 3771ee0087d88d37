"""Editing: parameters, rows that lose conditions, losses, and what all flow steps share."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import edit as config_file
from tests.small_systems import encoded_examples, request_of, with_encoded
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
def _made(arch):
  return _system(arch)


def _batch(system):
  return encoded_examples(system, B)


@functools.cache
def _params(arch='internal'):
  """Drawn on the host, so that nothing is zero or the identity and nothing is compiled for it."""
  draw = np.random.default_rng(1)
  shapes = jax.eval_shape(_made(arch).init, KEY)
  normal = lambda leaf: jnp.asarray(0.15 * draw.standard_normal(leaf.shape), jnp.float32)
  one = lambda path: float('scale' in jax.tree_util.keystr(path))
  return jax.tree_util.tree_map_with_path(lambda path, leaf: one(path) + normal(leaf), shapes)


def test_parameters_are_the_papers_and_the_same_in_both_architectures():
  ours, theirs = (
    {path: leaf.shape for path, leaf in leaves_by_path(jax.eval_shape(made.init, KEY)).items()}
    for made in (_system(arch, 'paper') for arch in ('internal', 'external'))
  )
  assert ours == theirs
  assert abs(sum(np.prod(shape) for shape in ours.values()) - 4_570.0e6) < 0.1e6
  added = [path for path in ours if path.startswith('ar/dual_path/')]
  assert {path.replace('ar/', 'dit/', 1) for path in added} <= set(ours)
  assert abs(sum(np.prod(ours[path]) for path in added) - 403.74e6) < 0.01e6


@pytest.mark.parametrize('arch', ['internal', 'external'])
def test_conditions_are_dropped_as_often_as_in_appendix_d_and_by_one_draw(arch):
  system = _made(arch)
  many = dataclasses.replace(_batch(system), example=jnp.arange(8192))
  keep = system.dropping.keep(many, KEY, system.stages[0])
  told, reference = (np.asarray(keep[name]) for name in layouts.CONDITIONS)
  shares = [np.mean(x) for x in (~told & reference, told & ~reference, ~told & ~reference)]
  wanted = [0.05, 0.05, 0.05 if arch == 'internal' else 0.0]
  np.testing.assert_allclose(shares, wanted, atol=0.01)
  assert arch == 'internal' or shares[2] == 0


def _whole(system, params, batch, keep):
  """Hidden states and velocity of whole rows at CLOCK, compiled."""

  def run(params):
    regions = system.experts.regions(batch, batch.encoded['visual_prompt'], keep)
    return system.experts.forward(
      params, regions, (batch.encoded['latents'], CLOCK), batch.encoded['source_latents']
    )

  return jax.jit(run)(params)


def _flow_step(system, weights, prefix, latents):
  """The velocity of one cached flow step."""
  stream, condition = system.model.image_stream(weights, latents, CLOCK, prefix.state)
  at = prefix.cache.body.key.order.shape[1] - prefix.state.ids.shape[1]
  hidden, _ = system.model.backbone(weights, {'dit': stream}, prefix.cache.body, at)
  stream = dataclasses.replace(stream, x=hidden['dit'], condition=condition)
  rows, _ = system.model.head(weights, {'dit': stream}, prefix.cache.head, at)
  return system.model.velocity(weights, rows['dit'], condition)


def _close(ours, theirs, tolerance=1e-4):
  error = jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))
  assert float(error) < tolerance, f'relative error {float(error):.1e}'


def test_each_cached_branch_equals_its_whole_row():
  """Full, without instruction and plan, and null; and the first two aren't alike."""
  system, params = _made('internal'), _params()
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
    step = lambda branch: _flow_step(system, params, branch, batch.encoded['latents'])
    return {name: step(branch) for name, branch in branches.items()}

  found = cached(params)
  for name, told, reference in (
    ('conditional', ALL, ALL),
    ('reference', ~ALL, ALL),
    ('null', ~ALL, ~ALL),
  ):
    keep = {layouts.PROMPT: told, layouts.SOURCE: reference}
    _close(found[name], _whole(system, params, batch, keep)[1])
  assert float(jnp.abs(found['conditional'] - found['reference']).max()) > 1e-3
  assert float(jnp.abs(found['reference'] - found['null']).max()) > 1e-3


def test_two_branches_draw_what_three_do_where_the_image_scale_is_1():
  system, params = _made('internal'), _params()
  request = request_of(_batch(system), 'visual_prompt', 'source_latents')

  def drawn(count, image=1.0):
    """Each branch has its weight, and the last of three counts even at weight 0."""
    settings = Sampling(steps=2, shift=1.0, guidance=2.5, image_guidance=image)
    experts, every = system.experts, Guidance.edit(2.5, image, *layouts.CONDITIONS).branches
    weights = [branch.weight for branch in every[:count]]

    def run(params):
      _, whole = experts.prefix(params, request, KEY, settings)
      reference = experts.source_prefix(params, request, whole)
      null = experts.null_prefix(params, request)
      prefix = Prefix.stack([whole, reference, null][:count])
      step = lambda x, time: experts.renderer.velocity(params, x, time, prefix)
      noise = experts.renderer.noise(request, KEY)
      parts = lambda x, time: jnp.split(step(x, time), count)
      velocity = lambda x, time, i: sum(w * v for w, v in zip(weights, parts(x, time)))
      return flow.integrate(velocity, noise, flow.time_grid(2))

    return jax.jit(run)(params), settings

  two, settings = drawn(2)
  three, _ = drawn(3)
  _close(two, three, 1e-5)
  led, by_both = drawn(3, image=1.5)
  for wanted, asked in ((two, settings), (led, by_both)):
    _, latents = jax.jit(lambda p, asked=asked: system.sample(p, request, KEY, asked))(params)
    _close(latents, wanted, 1e-5)


def test_the_picture_before_is_seen_by_what_follows_and_dropped_by_its_keep():
  system, params = _made('internal'), _params()
  batch = _batch(system)
  other = with_encoded(batch, source_latents=-batch.encoded['source_latents'])
  keep = {layouts.PROMPT: ALL, layouts.SOURCE: jnp.array([True, False, True, False])}
  (hidden, flow), (changed, moved) = (_whole(system, params, b, keep) for b in (batch, other))
  at = system.layout.place('bot')[0]
  told = jnp.abs(hidden - changed)[:, at:].max((1, 2))
  drawn = jnp.abs(flow - moved).max((1, 2, 3))
  for difference in (told, drawn):
    assert (difference[::2] > 1e-3).all() and (difference[1::2] == 0).all()


@pytest.mark.parametrize('arch', ['internal', 'external'])
def test_what_trains_and_what_is_watched(arch):
  system, params = _made(arch), _params(arch)
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
  seen = gradients['ar']['dual_path']['encoder']['mlp']['up']['kernel']
  assert float(jnp.abs(seen).max()) > 0


def test_external_plans_from_the_picture_before_and_draws_from_its_plan_alone():
  """Its picture expert reads the token expert's states at the codes, and has no other rows."""
  system, params = _made('external'), _params('external')
  request = request_of(_batch(system), 'source_latents')
  other = with_encoded(request, source_latents=-request.encoded['source_latents'])
  settings = Sampling(steps=2, guidance=2.5, temperature=0.0)
  codes, latents = jax.jit(lambda p: system.sample(p, request, KEY, settings))(params)
  assert np.isfinite(latents).all() and float(jnp.abs(latents).max()) > 0
  plan = jax.jit(lambda p, r: system.draft(p, r, KEY, settings)['visual_prompt'])
  np.testing.assert_array_equal(plan(params, request), codes)
  assert (plan(params, other) != codes).any()
  names = [span.name for span in system.experts.layout.spans]
  assert names == ['codes', 'boi', 'time', 'latents']
  with pytest.raises(UserError, match='image_guidance is 1.5, .* set it to 1'):
    led = dataclasses.replace(settings, image_guidance=1.5)
    jax.eval_shape(lambda p: system.sample(p, request, KEY, led), params)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'start': ''}, 'continues a run that generates images'),
    ({'start': 'ar=a run'}, 'continues a run that generates images'),
    ({'stages': ('joint',)}, "this system has one stage, 'edit'"),
  ],
)
def test_mistakes(changes, message):
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
def test_mistakes_in_the_model(arch, model, message):
  config = config_file.get_config(f'debug,arch={arch}')
  config.model.update(model)
  with pytest.raises(UserError, match=message):
    systems.build(config.to_dict())


def test_the_second_dual_path_comes_from_show_o2_or_from_the_run():
  system = _system()
  (start,) = system.initialization.grown
  assert (start.family, start.paths) == ('run', (('dit/dual_path/', 'ar/dual_path/'),))
  system = _system(preset='paper')
  (start,) = system.initialization.grown
  assert start.family == 'showo2' and not start.sizes.references
  assert not system.initialization.pretrained
  assert start.source.startswith('showlab/show-o2')
