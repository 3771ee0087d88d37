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
