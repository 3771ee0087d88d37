"""Dense layers whose kernels lie output by output: the same numbers from the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.models import dense
from vpe_jax.models.dense import Dense, DenseGeneral

LAYERS = {
  'q': DenseGeneral((3, 4), name='q'),
  'o': DenseGeneral(5, axis=(-2, -1), use_bias=False, name='o'),
  'up': Dense(7, dtype=jnp.bfloat16, name='up'),
}


def _drawn(layer, x):
  params = layer.init(jax.random.key(0), x)['params']
  return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)


@pytest.mark.parametrize('rows', [(1, 1), (2, 3), (130,)])
@pytest.mark.parametrize('name', LAYERS)
def test_a_turned_kernel_gives_what_the_kernel_gives(name, rows):
  x = jax.random.normal(jax.random.key(2), (*rows, 3, 4) if name == 'o' else (*rows, 6))
  layer = LAYERS[name]
  params = _drawn(layer, x)
  (other,) = dense.turned({'layers': ({name: params},)})['layers']
  assert 'kernel' not in other[name] and other[name][dense.TURNED].size == params['kernel'].size
  wanted, found = (layer.apply({'params': p}, x) for p in (params, other[name]))
  assert found.dtype == wanted.dtype and found.shape == wanted.shape
  tolerance = 2e-2 if found.dtype == jnp.bfloat16 else 1e-5
  np.testing.assert_allclose(
    found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=tolerance, atol=tolerance
  )


def test_kernels_of_layers_and_of_the_head_are_turned_and_no_others():
  leaf = np.arange(6.0).reshape(2, 3)
  params = {
    'ar': {'layers': ({'up': {'kernel': leaf}, 'norm': {'scale': leaf}},) * 2, 'norm': leaf},
    'head': {'kernel': leaf},
    'time': {'hidden': {'kernel': leaf}},
    'dit': {'head': {'blocks': ({'in': {'kernel': leaf}},), 'entry': {'kernel': leaf}}},
  }
  found = dense.turned(params)
  turned = [
    jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(found) if x.shape == (3, 2)
  ]
  assert turned == [
    "['ar']['layers'][0]['up']['turned']",
    "['ar']['layers'][1]['up']['turned']",
    "['dit']['head']['blocks'][0]['in']['turned']",
    "['head']['turned']",
  ]
  assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(params))


@pytest.mark.parametrize('first, last', [(0, None), (2, 5)])
def test_columns_of_a_head(first, last):
  x, kernel = (
    jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(2, 3, 4), (4, 9)])
  )
  head = {'head': {'kernel': kernel}}
  found = dense.columns(dense.turned(head)['head'], x, first, last)
  np.testing.assert_allclose(found, x @ kernel[:, first:last], atol=1e-5)
  np.testing.assert_allclose(dense.columns(head['head'], x, first, last), found, atol=1e-5)
