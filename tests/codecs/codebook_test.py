"""The nearest row of a codebook, whole and part by part."""

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.codecs import codebook


def test_large_codebooks_are_compared_in_parts():
  draw = np.random.default_rng(0)
  features, rows = (draw.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (24, 5)))
  rows[20] = rows[3]  # a tie across parts: the first counts
  features[0] = 9 * rows[3]
  for normed in (False, True):
    whole = codebook.nearest(jnp.asarray(features), jnp.asarray(rows), normed)
    assert int(whole[0]) == 3
    for chunk in (8, 5):
      parts = codebook.nearest(jnp.asarray(features), jnp.asarray(rows), normed, chunk)
      np.testing.assert_array_equal(whole, parts)


def test_no_array_holds_all_scores_of_a_large_codebook():
  features, rows = jnp.zeros((2, 16, 4)), jnp.zeros((64, 4))
  for chunk, largest in ((64, 2 * 16 * 64), (8, 64 * 4)):
    choose = lambda f, r, chunk=chunk: codebook.nearest(f, r, False, chunk)
    sizes = [
      variable.aval.size
      for jaxpr in _jaxprs(jax.make_jaxpr(choose)(features, rows).jaxpr)
      for equation in jaxpr.eqns
      for variable in equation.outvars
    ]
    assert max(sizes) == largest


def _jaxprs(jaxpr):
  """A jaxpr and all inside it."""
  yield jaxpr
  for equation in jaxpr.eqns:
    for value in equation.params.values():
      if hasattr(value, 'jaxpr'):
        yield from _jaxprs(value.jaxpr)
