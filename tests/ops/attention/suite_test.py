"""Every implementation on every mask: output, log-sum-exp and gradients equal `reference`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention.masks import BUILDERS
from vpe_jax.ops.attention import blockwise, reference, schedule
from vpe_jax.ops.attention.chunked import Chunked
from vpe_jax.ops.attention.pallas_gpu import Gpu
from vpe_jax.ops.attention.pallas_tpu import Tpu

# Blocks of two sizes, so that queries and keys have different numbers of blocks.
KERNELS = {
  'chunked': Chunked(32, 16),
  'pallas_tpu': Tpu(32, 16, interpret=True),
  'pallas_gpu': Gpu(32, 16, interpret=True),
}
TOLERANCE = {'float32': 2e-5, 'bfloat16': 3e-2}


def _batch(masks, name):
  """The mask, padded to the common length, so that each implementation compiles once."""
  pad = lambda side: schedule.padded(side, masks.length)
  sides = masks.sized[name] if name == 'cached' else tuple(pad(x) for x in masks.sized[name])
  # One dtype for all: weakly typed integers would compile again.
  both = lambda x: jnp.broadcast_to(x, (2, x.shape[1])).astype(jnp.int32)
  return tuple(jax.tree.map(both, side) for side in sides)


@pytest.fixture(scope='module')
def run(masks):
  """run(name of an implementation, case) -> output, log-sum-exp, dq, dk, dv; jitted once."""

  @functools.cache
  def compiled(name):
    if name == 'reference':
      return masks.differentiated(reference.attention)
    kernel = KERNELS[name]
    call = lambda q, k, v, query, key: blockwise.attend(
      kernel, blockwise.Operands(q, k, v, query, key)
    )
    return masks.differentiated(call)

  return lambda name, case: compiled(name)(case)


@pytest.fixture(scope='module')
def expected_results(masks, run):
  """The case and the results of `reference` for a mask and a dtype, computed once."""

  @functools.cache
  def results(mask, dtype):
    case = masks.case(_batch(masks, mask), jnp.dtype(dtype))
    return case, run('reference', case)

  return results


@pytest.mark.parametrize('mask', BUILDERS)
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('name', KERNELS)
def test_equals_the_definition(run, expected_results, name, dtype, mask):
  case, expected = expected_results(mask, dtype)
  actual = run(name, case)
  unseen = np.isneginf(expected[1])
  np.testing.assert_array_equal(np.isneginf(actual[1]), unseen)
  assert not np.asarray(actual[0], np.float32)[unseen].any(), 'a query that sees no key gets zeros'
  assert not np.asarray(actual[2], np.float32)[unseen].any(), 'and has no gradient'
  for label, ours, theirs in zip(('mixed', 'lse', 'dq', 'dk', 'dv'), actual, expected, strict=True):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, label
    ours, theirs = (np.where(np.isneginf(x), 0, np.asarray(x, np.float32)) for x in (ours, theirs))
    assert np.isfinite(ours).all(), label
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=TOLERANCE[dtype], err_msg=label)


@pytest.mark.parametrize('name', KERNELS)
def test_a_loss_of_unseen_queries_has_no_nan(masks, name):
  case = masks.case(_batch(masks, 'scattered'))
  kernel = KERNELS[name]

  def loss(q, k, v):
    mixed, lse = blockwise.attend(kernel, blockwise.Operands(q, k, v, *case.mask))
    # The log-sum-exp of a query that sees no key gets a NaN gradient.
    return jnp.sum(mixed) + jnp.sum(jnp.where(jnp.isneginf(lse), lse * 0.0, lse))

  for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(*case.inputs):
    assert np.isfinite(gradient).all()
