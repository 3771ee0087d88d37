"""Classifier-free guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.sampling import guidance


def _branches():
  return jax.random.normal(jax.random.key(1), (2, 5, 7)) * jnp.asarray([1e-3, 1e3])[:, None, None]


def test_scale_one_is_exactly_the_conditional_and_zero_exactly_the_null():
  conditional, null = _branches()
  for run in (guidance.classifier_free, jax.jit(guidance.classifier_free)):
    np.testing.assert_array_equal(run(conditional, null, 1.0), conditional)
    np.testing.assert_array_equal(run(conditional, null, 0.0), null)


def test_scale_extrapolates_from_the_null():
  conditional, null = np.asarray(_branches(), np.float64)
  guided = guidance.classifier_free(jnp.asarray(conditional), jnp.asarray(null), 3.0)
  np.testing.assert_allclose(guided, null + 3 * (conditional - null), rtol=1e-5)


@pytest.mark.parametrize('scale', [float('nan'), float('inf')])
def test_a_scale_is_finite(scale):
  with pytest.raises(UserError, match=f'guidance is {scale}'):
    guidance.classifier_free(*_branches(), scale)


def test_guides_in_float32():
  conditional, null = _branches().astype(jnp.bfloat16)
  assert guidance.classifier_free(conditional, null, 2.0).dtype == jnp.float32


def test_split_undoes_stack():
  conditional = {'x': jnp.arange(6.0).reshape(3, 2), 'n': jnp.arange(3)}
  null = jax.tree.map(lambda leaf: leaf + 10, conditional)
  stacked = guidance.stack(conditional, null)
  assert stacked['x'].shape == (6, 2) and stacked['n'].shape == (6,)
  for ours, theirs in zip(guidance.split(stacked), (conditional, null)):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  twice = guidance.both(conditional)
  jax.tree.map(np.testing.assert_array_equal, *guidance.split(twice))


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
def test_edits_need_the_fewest_branches_that_are_exact(text, image, names):
  draw = np.random.default_rng(0)
  made = {n: draw.standard_normal((3, 4)) for n in ('conditional', 'reference', 'null')}
  weights = guidance.edit_branches(text, image)
  assert tuple(weights) == names
  stacked = jnp.asarray(np.concatenate([made[name] for name in names]), jnp.float32)
  full, reference, null = made.values()
  wanted = null + image * (reference - null) + text * (full - reference)
  found = guidance.weighted(stacked, list(weights.values()))
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  if len(names) == 1:
    np.testing.assert_array_equal(found, stacked)


@pytest.mark.parametrize('scale', [0.0, 0.3, 1.0, 7.5])
def test_branches_are_those_of_classifier_free_guidance(scale):
  draw = np.random.default_rng(1)
  made = {
    n: jnp.asarray(draw.standard_normal((2, 5)), jnp.float32) for n in ('conditional', 'null')
  }
  weights = guidance.branches(scale)
  stacked = jnp.concatenate([made[name] for name in weights])
  found = guidance.weighted(stacked, list(weights.values()))
  np.testing.assert_array_equal(found, guidance.classifier_free(*made.values(), scale))
