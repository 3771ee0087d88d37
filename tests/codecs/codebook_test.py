"""The nearest codebook entry, searched at once and chunk by chunk."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.codecs import codebook, siglip_vq, vqgan
from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.models.vit import EncoderConfig

BODY = PyramidConfig((32, 32), blocks=1, outputs=8, inputs=8, attention=(1,))
TOWER = EncoderConfig(width=16, layers=1, heads=2, mlp=16, activation='gelu')


def test_large_codebooks_are_searched_in_chunks():
  rng = np.random.default_rng(0)
  features, entries = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (24, 5)))
  entries[20] = entries[3]  # a tie across chunks: the first counts
  features[0] = 9 * entries[3]
  for normed in (False, True):
    whole = codebook.largest_product(jnp.asarray(features), jnp.asarray(entries), normed)
    assert int(whole[0]) == 3
    for chunk in (8, 5):
      chunked = codebook.largest_product(jnp.asarray(features), jnp.asarray(entries), normed, chunk)
      np.testing.assert_array_equal(whole, chunked)


def test_no_array_holds_all_scores_of_a_large_codebook():
  features, entries = jnp.zeros((2, 16, 4)), jnp.zeros((64, 4))
  for chunk, largest in ((64, 2 * 16 * 64), (8, 64 * 4)):
    search = lambda f, e, chunk=chunk: codebook.largest_product(f, e, False, chunk)
    sizes = [
      variable.aval.size
      for jaxpr in _jaxprs(jax.make_jaxpr(search)(features, entries).jaxpr)
      for equation in jaxpr.eqns
      for variable in equation.outvars
    ]
    assert max(sizes) == largest


def _jaxprs(jaxpr):
  """A jaxpr and all nested ones."""
  yield jaxpr
  for equation in jaxpr.eqns:
    for value in equation.params.values():
      if hasattr(value, 'jaxpr'):
        yield from _jaxprs(value.jaxpr)


@pytest.mark.parametrize(
  'network',
  [
    vqgan.VqGan(vqgan.VqGanConfig(BODY, codes=16, width=4, normed=True)),
    siglip_vq.SiglipVq(siglip_vq.SiglipVqConfig(TOWER, patch=8, table=4, codes=16, width=4)),
  ],
  ids=['vqgan', 'siglip_vq'],
)
def test_codes_come_from_exact_products_at_any_default_precision(network):
  images = jnp.zeros((1, 16, 16, 3))
  params = jax.eval_shape(lambda key: network.init(key, images), jax.random.key(0))
  encode = lambda params: network.apply(params, images, method='encode')
  with jax.default_matmul_precision('bfloat16'):
    text = str(jax.make_jaxpr(encode)(params))
  precisions = re.findall(r'precision=(None|[\w.]+|\([^)]*\))', text)
  assert len(precisions) > 5 and {precision.count('HIGHEST') for precision in precisions} == {2}
