"""Tests of the FLOPs that a traced function needs."""

import jax
import jax.numpy as jnp
import pytest

from vpe_jax.ops.flops import matrix_flops, window_positions

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
DOT = 2 * 8**3


def test_dots_in_scans_jits_and_branches():
  def run(x, w):
    once = jax.jit(lambda x: x @ w)
    x, _ = jax.lax.scan(lambda c, _: (once(c), None), x, None, length=5)
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)

  assert matrix_flops(run, SQUARE, SQUARE) == 7 * DOT


def test_what_nothing_reads_is_left_out():
  def run(x, w):
    unread = x @ w @ w
    return x @ w, unread

  assert matrix_flops(lambda x, w: run(x, w)[0], SQUARE, SQUARE) == DOT
  assert matrix_flops(run, SQUARE, SQUARE) == 3 * DOT  # x @ w is written twice


@pytest.mark.parametrize(
  'stride, pad, dilation',
  [(1, 1, (1, 1)), (2, 0, (1, 2)), (1, 2, (3, 1)), (2, 1, (4, 3)), (3, 2, (2, 1))],
)
def test_places_of_a_window(stride, pad, dilation):
  given, kernel = 5, 3
  span = (given - 1) * dilation[0] + 1 + 2 * pad - (kernel - 1) * dilation[1]
  out = (span - 1) // stride + 1
  line = jnp.zeros((1, given, 1))
  window = jnp.zeros((kernel, 1, 1))
  numbers = ('NHC', 'HIO', 'NHC')
  options = {'lhs_dilation': dilation[:1], 'rhs_dilation': dilation[1:]}
  real = jax.lax.conv_general_dilated(
    line + 1, window + 1, (stride,), [(pad, pad)], dimension_numbers=numbers, **options
  )
  assert window_positions(given, kernel, out, stride, pad, dilation) == int(real.sum())
  run = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (stride,), [(pad, pad)], dimension_numbers=numbers, **options
  )
  assert matrix_flops(run, line, window) == 2 * int(real.sum())


def test_a_batch_of_dots_written_as_one_window():
  """As TPU programs do: quick for any batch, and only the batch's own pairs count."""
  assert window_positions(65536, 65536, 65536, 65535, 0, (65536, 1)) == 65536
