"""Transposed kernels for decoding: same outputs as the original ones, and which are transposed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.models import kernel_layout
from vpe_jax.models.dense import Dense, DenseGeneral

LAYERS = {
  'q': DenseGeneral((3, 4), name='q'),
  'o': DenseGeneral(5, axis=(-2, -1), use_bias=False, name='o'),
  'up': Dense(7, dtype=jnp.bfloat16, name='up'),
}


def _randomized(layer, x):
  params = layer.init(jax.random.key(0), x)['params']
  return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)


@pytest.mark.parametrize('batch', [(1, 1), (2, 3), (130,)])
@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_with_a_transposed_kernel_gives_the_same_output(name, batch):
  x = jax.random.normal(jax.random.key(2), (*batch, 3, 4) if name == 'o' else (*batch, 6))
  layer = LAYERS[name]
  params = _randomized(layer, x)
  (prepared,) = kernel_layout.for_decoding({'layers': ({name: params},)}, 'cpu')['layers']
  transposed = prepared[name][kernel_layout.TRANSPOSED]
  assert 'kernel' not in prepared[name] and transposed.size == params['kernel'].size
  expected, output = (layer.apply({'params': p}, x) for p in (params, prepared[name]))
  assert output.dtype == expected.dtype and output.shape == expected.shape
  tolerance = 2e-2 if output.dtype == jnp.bfloat16 else 1e-5
  np.testing.assert_allclose(
    output.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=tolerance
  )


def test_only_kernels_of_layers_and_heads_are_transposed_and_only_on_a_cpu():
  leaf = np.arange(6.0).reshape(2, 3)
  params = {
    'ar': {'layers': ({'up': {'kernel': leaf}, 'norm': {'scale': leaf}},) * 2, 'norm': leaf},
    'head': {'kernel': leaf},
    'time': {'hidden': {'kernel': leaf}},
    'dit': {'head': {'blocks': ({'in': {'kernel': leaf}},), 'entry': {'kernel': leaf}}},
  }
  prepared = kernel_layout.for_decoding(params, 'cpu')
  leaves = jax.tree.leaves_with_path(prepared)
  assert [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.shape == (3, 2)] == [
    "['ar']['layers'][0]['up']['transposed']",
    "['ar']['layers'][1]['up']['transposed']",
    "['dit']['head']['blocks'][0]['in']['transposed']",
    "['head']['transposed']",
  ]
  assert len(leaves) == len(jax.tree.leaves(params))
  assert kernel_layout.for_decoding(params, 'tpu') is params


@pytest.mark.parametrize('first, last', [(0, None), (2, 5)])
def test_columns_of_a_head(first, last):
  x, kernel = (
    jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(2, 3, 4), (4, 9)])
  )
  head = {'head': {'kernel': kernel}}
  for params in (head, kernel_layout.for_decoding(head, 'cpu')):
    output = kernel_layout.columns(params['head'], x, first, last)
    np.testing.assert_allclose(output, x @ kernel[:, first:last], atol=1e-5)
