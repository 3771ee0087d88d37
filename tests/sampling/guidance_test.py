"""Guidance: weights of branches, schedules and renormalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.sampling import guidance
from vpe_jax.sampling.guidance import Branch, Guidance


def _combined(guided, outputs, branches=None, step=0, steps=1):
  """`combine` of named outputs, with and without jit."""
  branches = branches or guided.needed
  stacked = jnp.concatenate([outputs[branch.name] for branch in branches])
  run = lambda stacked, step: guidance.combine(guided, stacked, branches, step, steps)
  eager, jitted = run(stacked, step), jax.jit(run)(stacked, step)
  np.testing.assert_allclose(eager, jitted, rtol=1e-6, atol=1e-6)
  return jitted


def _outputs(*names, shape=(2, 5, 3)):
  numpy_rng = np.random.default_rng(3)
  return {name: jnp.asarray(numpy_rng.standard_normal(shape), jnp.float32) for name in names}


@pytest.mark.parametrize('scale', [0.0, 0.3, 1.0, 7.5])
def test_classifier_free_guidance_extrapolates_from_the_null_branch(scale):
  outputs, guided = _outputs('conditional', 'null'), Guidance.classifier_free(scale)
  conditional, null = outputs.values()
  combined = _combined(guided, outputs)
  np.testing.assert_allclose(combined, null + scale * (conditional - null), rtol=1e-4, atol=1e-5)
  if scale in (0.0, 1.0):
    name = 'conditional' if scale else 'null'
    assert [branch.name for branch in guided.needed] == [name]
    np.testing.assert_array_equal(combined, outputs[name])
    # Exact too where another block of tokens needs the other branch.
    both = Guidance.classifier_free(2.0).branches
    np.testing.assert_array_equal(_combined(guided, outputs, both), outputs[name])


@pytest.mark.parametrize(
  'text, image, names',
  [
    (2.5, 1.0, ('conditional', 'reference')),
    (2.5, 1.5, ('conditional', 'reference', 'null')),
    (1.5, 1.5, ('conditional', 'null')),
    (1.0, 1.0, ('conditional',)),
    (0.0, 1.0, ('reference',)),
    (0.0, 0.0, ('null',)),
  ],
)
def test_edits_compute_the_fewest_branches(text, image, names):
  guided = Guidance.edit(text, image, 'instruction', 'source')
  assert tuple(branch.name for branch in guided.needed) == names
  outputs = _outputs('conditional', 'reference', 'null')
  full, reference, null = outputs.values()
  expected = null + image * (reference - null) + text * (full - reference)
  combined = _combined(guided, outputs)
  np.testing.assert_allclose(combined, expected, rtol=1e-4, atol=1e-5)
  if len(names) == 1:
    np.testing.assert_array_equal(combined, outputs[names[0]])
  assert [set(branch.dropped) for branch in guided.branches] == [
    set(),
    {'instruction'},
    {'instruction', 'source'},
  ]


def test_combines_in_float32():
  outputs = {name: x.astype(jnp.bfloat16) for name, x in _outputs('conditional', 'null').items()}
  assert _combined(Guidance.classifier_free(2.0), outputs).dtype == jnp.float32


def test_a_linear_schedule_is_vgts():
  """reference: the scale at group g of G is 1 + (s - 1)(G - g) / G."""
  outputs, scale, groups = _outputs('conditional', 'null'), 4.5, 6
  for step in range(groups):
    guided = Guidance.classifier_free(scale, schedule='linear')
    constant = Guidance.classifier_free(1 + (scale - 1) * (groups - step) / groups)
    combined = _combined(guided, outputs, None, step, groups)
    np.testing.assert_allclose(combined, _combined(constant, outputs), rtol=1e-5, atol=1e-5)
  edit = Guidance.edit(2.0, 1.5, 'instruction', 'source', schedule='linear')
  assert abs(float(sum(edit.weights(3, 4).values())) - 1) < 1e-6


@pytest.mark.parametrize('kind, axes', [('global', (1, 2)), ('channel', (2,))])
@pytest.mark.parametrize('minimum', [0.0, 0.8])
def test_renormalization_is_bagels(kind, axes, minimum):
  """The guided velocity is scaled down to the norm of the conditional one, and never up."""
  outputs = _outputs('conditional', 'null')
  conditional, null = (np.asarray(x, np.float64) for x in outputs.values())
  settings = {'renormalize': kind, 'renormalize_min': minimum}
  guided = null + 3.0 * (conditional - null)
  norm = lambda x: np.sqrt((x**2).sum(axes, keepdims=True))
  factor = np.clip(norm(conditional) / (norm(guided) + 1e-8), minimum, 1.0)
  assert factor.min() < 1
  combined = _combined(Guidance.classifier_free(3.0, **settings), outputs)
  np.testing.assert_allclose(combined, guided * factor, rtol=1e-4, atol=1e-5)
  # Without guidance nothing is rescaled; the null branch needs the norm of the conditional one.
  unguided = Guidance.classifier_free(1.0, **settings)
  np.testing.assert_array_equal(_combined(unguided, outputs), outputs['conditional'])
  assert len(Guidance.classifier_free(0.0, **settings).needed) == 2


def test_guidance_acts_above_the_lowest_time_up_to_the_highest():
  times = np.asarray([1.0, 0.75, 0.5, 0.25], np.float32)
  active = Guidance.classifier_free(2.0, interval=(0.25, 0.75)).acts(times)
  assert active.tolist() == [False, True, True, False]
  assert Guidance.classifier_free(2.0).acts(times).all()


def test_a_decoder_stacks_the_branches_that_any_block_needs():
  off, on, null = (Guidance.classifier_free(scale) for scale in (1.0, 2.0, 0.0))
  names = lambda *guidances: [branch.name for branch in guidance.stacked(*guidances)]
  assert names(off) == names(off, off) == ['conditional']
  assert names(off, on) == names(on, off) == names(null) == ['conditional', 'null']


@pytest.mark.parametrize(
  'make',
  [
    lambda: Guidance.classifier_free(float('nan')),
    lambda: Guidance.classifier_free(float('inf')),
    lambda: Guidance.edit(float('inf'), 1.0, 'instruction', 'source'),
    lambda: Guidance.classifier_free(2.0, interval=(0.5, 0.2)),
    lambda: Guidance.classifier_free(2.0, interval=(-0.1, 0.2)),
    lambda: Guidance.classifier_free(2.0, schedule='cosine'),
    lambda: Guidance.classifier_free(2.0, renormalize='text_channel'),
    lambda: Guidance.classifier_free(2.0, renormalize_min=1.5),
  ],
)
def test_impossible_settings_are_refused(make):
  with pytest.raises(UserError):
    make()


@pytest.mark.parametrize(
  'branches',
  [
    (Branch('conditional', 2.0),),
    (Branch('a', 2.0), Branch('a', -1.0)),
    (Branch('null', 1.0, frozenset({'text'})),),
  ],
)
def test_invalid_branches_are_refused(branches):
  with pytest.raises(ValueError):
    Guidance(branches)


def test_guidance_is_static_under_jit():
  run = jax.jit(lambda guided, x: guidance.combine(guided, x, guided.needed), static_argnums=0)
  outputs = jnp.ones((4, 2))
  assert run(Guidance.classifier_free(2.0), outputs).shape == (2, 2)
