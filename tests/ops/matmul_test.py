"""Products of dense layers: values and gradients as jax.lax.dot_general's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.ops.matmul import dot_general

CASES = {
  'dense': ((2, 5, 8), (8, 6), (((2,), (0,)), ((), ()))),
  'heads': ((2, 5, 8), (8, 3, 4), (((2,), (0,)), ((), ()))),
  'output': ((2, 5, 3, 4), (3, 4, 8), (((2, 3), (0, 1)), ((), ()))),
}


@pytest.mark.parametrize('case', CASES)
def test_equals_lax(case):
  x_shape, kernel_shape, axes = CASES[case]
  x = jax.random.normal(jax.random.key(0), x_shape)
  kernel = jax.random.normal(jax.random.key(1), kernel_shape)
  results = []
  for product in (dot_general, jax.lax.dot_general):
    loss = lambda x, kernel, product=product: jnp.sum(jnp.sin(product(x, kernel, axes)))
    results.append((product(x, kernel, axes), *jax.grad(loss, (0, 1))(x, kernel)))
  for ours, theirs in zip(*results, strict=True):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_refuses_other_products():
  x, kernel = jnp.ones((2, 5, 8)), jnp.ones((6, 8))
  with pytest.raises(ValueError, match='dense layer'):
    dot_general(x, kernel, (((2,), (1,)), ((), ())))
