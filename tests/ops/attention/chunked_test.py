"""Features of the chunked implementation: a bias, any length, and linear memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.ops.attention import chunked, reference


@pytest.mark.parametrize('shape', [(2, 4, 60, 60), (4, 1, 60), (1, 1, 60, 1), (2, 1, 1, 1)])
def test_bias_and_its_gradient(masks, monkeypatch, shape):
  monkeypatch.setattr(chunked, 'ROWS', 32)
  monkeypatch.setattr(chunked, 'COLUMNS', 16)
  monkeypatch.setattr(chunked, '_MIN_QUERIES', 8)
  sequence = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), masks.transfusion(20, 35, 5)[0])
  case = masks.case((sequence, sequence))
  bias = jax.random.normal(jax.random.key(3), shape)

  def results(run):
    call = lambda q, k, v, bias: run(q, k, v, sequence, sequence, bias)
    out, pull = jax.vjp(call, *case.inputs, bias)
    return (*out, *pull(case.gradients))

  for ours, theirs in zip(
    jax.jit(lambda: results(chunked.attention))(),
    jax.jit(lambda: results(reference.attention))(),
    strict=True,
  ):
    scale = max(1.0, float(jnp.abs(theirs).max()))
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=2e-5)


@pytest.mark.parametrize('length, block', [(1, 256), (7, 8), (829, 256), (1856, 512), (8192, 256)])
def test_lengths_are_split_evenly(length, block):
  size = chunked.even(length, block)
  count = -(-length // size)
  assert size % 8 == 0 and size <= max(block, 8)
  assert count == -(-length // block) and count * size - length < 8 * count


def test_memory_is_linear_in_the_length(masks):
  def temporary(run, length):
    case = jax.eval_shape(lambda: masks.case(masks.causal(length), heads=(2, 1, 16)))
    compiled = masks.differentiated(run).lower(case).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  growth = temporary(chunked.attention, 4096) / temporary(chunked.attention, 2048)
  assert growth < 2.2
  assert temporary(reference.attention, 4096) > 8 * temporary(chunked.attention, 4096)
