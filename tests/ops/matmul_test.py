"""Products of dense layers: values and gradients as jax.lax.dot_general's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.ops.matmul import dot_general, matmul_transposed

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


def test_results_and_gradients_have_the_dtypes_of_lax():
  x = jax.random.normal(jax.random.key(0), (4, 64), jnp.bfloat16)
  kernel = jax.random.normal(jax.random.key(1), (64, 8), jnp.bfloat16)
  axes = (((1,), (0,)), ((), ()))
  wide = lambda product: product(x, kernel, axes, preferred_element_type=jnp.float32)
  # Rounded to bfloat16, sums of 64 products would be off by up to 0.03.
  np.testing.assert_allclose(wide(dot_general), wide(jax.lax.dot_general), atol=1e-4)
  for operands in ((x, kernel.astype(jnp.float32)), (x.astype(jnp.float32), kernel)):
    gradients = jax.grad(lambda *pair: jnp.sum(dot_general(*pair, axes)), (0, 1))(*operands)
    assert [g.dtype for g in gradients] == [operand.dtype for operand in operands]


def test_other_contractions_are_rejected():
  x, kernel = jnp.ones((2, 5, 8)), jnp.ones((6, 8))
  with pytest.raises(ValueError, match='dense layer'):
    dot_general(x, kernel, (((2,), (1,)), ((), ())))


@pytest.mark.parametrize('shape', [(1,), (2, 3), (129,)])
def test_a_transposed_product_and_its_gradients(shape):
  x = jax.random.normal(jax.random.key(0), (*shape, 8))
  kernel = jax.random.normal(jax.random.key(1), (6, 8))
  results = []
  for product in (matmul_transposed, lambda x, kernel: x @ kernel.T):
    loss = lambda x, kernel, product=product: jnp.sum(jnp.sin(product(x, kernel)))
    results.append((jax.jit(product)(x, kernel), *jax.jit(jax.grad(loss, (0, 1)))(x, kernel)))
  for ours, theirs in zip(*results, strict=True):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_few_vectors_are_multiplied_as_columns_only_on_a_cpu():
  def barriers(count, platform):
    traced = jax.jit(matmul_transposed).trace(jnp.ones((count, 8)), jnp.ones((6, 8)))
    return traced.lower(lowering_platforms=(platform,)).as_text().count('optimization_barrier')

  assert barriers(2, 'cpu') == barriers(128, 'cpu') == 2  # one on either side of the product
  assert barriers(129, 'cpu') == barriers(2, 'tpu') == 0
