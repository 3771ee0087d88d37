"""Tests of the FLOPs that a traced function needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.ops.attention import chooser, cudnn
from vpe_jax.ops.flops import matrix_flops, training_flops, window_positions
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import causal_text

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
DOT = 2 * 8**3


def test_dots_in_scans_jits_and_branches():
  def run(x, w):
    once = jax.jit(lambda x: x @ w)
    x, _ = jax.lax.scan(lambda c, _: (once(c), None), x, None, length=5)
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)

  assert matrix_flops(run, SQUARE, SQUARE) == 7 * DOT


def test_unused_results_do_not_count():
  def run(x, w):
    unread = x @ w @ w
    return x @ w, unread

  assert matrix_flops(lambda x, w: run(x, w)[0], SQUARE, SQUARE) == DOT
  assert matrix_flops(run, SQUARE, SQUARE) == 3 * DOT  # x @ w is written twice


@pytest.mark.parametrize(
  'stride, pad, dilation',
  [(1, 1, (1, 1)), (2, 0, (1, 2)), (1, 2, (3, 1)), (2, 1, (4, 3)), (3, 2, (2, 1))],
)
def test_window_positions_equal_those_of_a_convolution(stride, pad, dilation):
  length, kernel = 5, 3
  span = (length - 1) * dilation[0] + 1 + 2 * pad - (kernel - 1) * dilation[1]
  out = (span - 1) // stride + 1
  line = jnp.zeros((1, length, 1))
  window = jnp.zeros((kernel, 1, 1))
  numbers = ('NHC', 'HIO', 'NHC')
  options = {'lhs_dilation': dilation[:1], 'rhs_dilation': dilation[1:]}
  pairs = jax.lax.conv_general_dilated(
    line + 1, window + 1, (stride,), [(pad, pad)], dimension_numbers=numbers, **options
  )
  assert window_positions(length, kernel, out, stride, pad, dilation) == int(pairs.sum())
  run = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (stride,), [(pad, pad)], dimension_numbers=numbers, **options
  )
  assert matrix_flops(run, line, window) == 2 * int(pairs.sum())


def test_a_batch_of_dots_written_as_one_window():
  """The form of TPU programs: counted quickly for any batch, with pairs of equal index only."""
  assert window_positions(65536, 65536, 65536, 65535, 0, (65536, 1)) == 65536


def _loss(function):
  return lambda *arguments: jnp.sum(function(*arguments))


def test_a_product_costs_one_more_for_each_operand_with_a_gradient():
  both = training_flops(_loss(lambda w, x: (x @ w) @ w), SQUARE, SQUARE)
  assert (both.forward, both.backward) == (2 * DOT, 3 * DOT)  # x needs no gradient
  assert both.total == 5 * DOT


def test_flops_match_those_of_the_traced_gradient():
  loss = _loss(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w.T) @ w)
  executed = matrix_flops(jax.grad(loss), SQUARE, SQUARE)
  # The gradient of a sum doesn't need the last forward product.
  assert training_flops(loss, SQUARE, SQUARE).total == executed + DOT


def test_stopped_gradients_cost_nothing_backward():
  stop = jax.lax.stop_gradient
  assert training_flops(_loss(lambda w, x: stop(x @ w) @ w), SQUARE, SQUARE).backward == DOT
  assert training_flops(_loss(lambda w, x: stop(x @ w)), SQUARE, SQUARE).backward == 0
  rounded = training_flops(_loss(lambda w, x: jnp.round(x @ w) @ x), SQUARE, SQUARE)
  assert (rounded.forward, rounded.backward) == (2 * DOT, 0)
  indexed = training_flops(_loss(lambda w, x: x[jnp.argmax(x @ w, 1)] @ x), SQUARE, SQUARE)
  assert (indexed.forward, indexed.backward) == (2 * DOT, 0)


def test_steps_of_scans_count_only_products_whose_results_are_used():
  def run(w, x):
    def step(carry, _):
      return (carry[0] @ w, carry[0] @ w @ w), None

    return jax.lax.scan(step, (x, x), None, length=5)[0]

  # Every step's first product but the last one's, and the last step's second result.
  last = training_flops(_loss(lambda w, x: run(w, x)[1]), SQUARE, SQUARE)
  assert last.forward == (4 + 2) * DOT
  assert last.backward == 2 * last.forward  # the carry has a gradient in every step
  first = training_flops(_loss(lambda w, x: run(w, x)[0]), SQUARE, SQUARE)
  assert first.forward == 5 * DOT


def test_the_first_step_of_a_scan_is_active_if_a_later_one_is():
  def run(w, x):
    return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0]

  assert training_flops(_loss(run), SQUARE, SQUARE).total == 3 * 5 * DOT


def test_recomputation_does_not_count():
  def run(w, x):
    return jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x)

  flops = training_flops(_loss(run), SQUARE, SQUARE)
  assert (flops.forward, flops.backward) == (2 * DOT, 3 * DOT)
  executed = matrix_flops(jax.value_and_grad(_loss(run)), SQUARE, SQUARE)
  assert executed == flops.total + 2 * DOT


def test_the_most_expensive_branch_and_gradients_through_it():
  def run(w, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)

  flops = training_flops(_loss(run), SQUARE, SQUARE)
  assert (flops.forward, flops.backward) == (2 * DOT, 3 * DOT)


def test_custom_gradients_do_not_change_the_count():
  @jax.custom_vjp
  def product(x, w):
    return x @ w

  product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
  flops = training_flops(_loss(lambda w, x: product(x, w)), SQUARE, SQUARE)
  assert (flops.forward, flops.backward) == (DOT, DOT)


def test_convolutions():
  image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
  numbers = ('NHWC', 'HWIO', 'NHWC')
  run = lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), 'SAME', dimension_numbers=numbers)
  flops = training_flops(_loss(run), kernel, image)
  assert flops.forward == flops.backward == 2 * 3 * 5 * 22**2  # 22 = 8 * 3 - 2 for both ends


def test_products_in_primitives_without_a_rule_are_an_error():
  mesh = jax.make_mesh((1,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec()
  run = jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=spec, out_specs=spec)
  with pytest.raises(ValueError, match='shard_map'):
    matrix_flops(run, SQUARE)


B, L, N, K, H = 2, 32, 4, 2, 8
PRODUCT = 2 * B * N * H * L * L


def _attention_arguments(lengths):
  """Queries, keys, values as shapes, and the lengths of the captions."""
  shape = lambda heads: jax.ShapeDtypeStruct((B, L, heads, H), jnp.float32)
  return shape(N), shape(K), shape(K), lengths


def _attend(name):
  def run(q, k, v, lengths):
    layout = causal_text(L)
    visibility = build(layout, lengths={'text': lengths})['text'].visibility
    return chooser.attention(q, k, v, visibility, visibility, name)

  return run


@pytest.mark.parametrize('name', ['reference', 'chunked', 'pallas_tpu'])
def test_attention_counts_all_pairs_with_any_implementation(name, monkeypatch):
  monkeypatch.setattr(chooser, 'device', lambda: ('tpu', 'TPU v5p'))
  q, k, v, lengths = _attention_arguments(jax.ShapeDtypeStruct((B,), jnp.int32))
  flops = training_flops(_loss(_attend(name)), q, k, v, lengths)
  assert (flops.forward, flops.backward) == (2 * PRODUCT, 2 * PRODUCT)  # of q and weights
  joined = lambda qkv, lengths: _attend(name)(*qkv, lengths)
  all_trained = training_flops(_loss(joined), (q, k, v), lengths)
  assert all_trained.backward == 4 * PRODUCT
  assert matrix_flops(_attend(name), q, k, v, lengths) == 2 * PRODUCT


@pytest.mark.parametrize('loop', [False, True])
def test_kernels_count_visible_pairs_if_the_mask_is_known(loop, monkeypatch):
  monkeypatch.setattr(chooser, 'device', lambda: ('tpu', 'TPU v5p'))
  q, k, v, _ = _attention_arguments(None)
  attend = _attend('pallas_tpu')

  def repeated(q, k, v, lengths):
    if not loop:
      return attend(q, k, v, lengths)
    return jax.lax.scan(lambda q, _: (attend(q, k, v, lengths), None), q, None, length=3)[0]

  lengths = np.array([5, 20], np.int32)  # the example with the most visible pairs counts
  (kernel,) = training_flops(_loss(repeated), q, k, v, lengths).kernels
  assert kernel.pairs() == 20 * 21 / 2
  assert kernel.calls == kernel.trained == (3 if loop else 1)
  assert kernel.flops() == 4 * B * N * H * kernel.pairs()
  unknown = jax.ShapeDtypeStruct((B,), jnp.int32)
  (kernel,) = training_flops(_loss(repeated), q, k, v, unknown).kernels
  assert kernel.pairs() == L * L


def test_kernels_without_a_gradient(monkeypatch):
  monkeypatch.setattr(chooser, 'device', lambda: ('tpu', 'TPU v5p'))
  q, k, v, lengths = _attention_arguments(np.full(B, L, np.int32))
  stopped = lambda *arguments: jax.lax.stop_gradient(_attend('pallas_tpu')(*arguments))
  flops = training_flops(_loss(stopped), q, k, v, lengths)
  (kernel,) = flops.kernels
  assert (kernel.calls, kernel.trained, flops.backward) == (1, 0, 0)


@pytest.mark.parametrize('hint', ['causal', 'padding'])
def test_cudnn_counts_all_pairs(hint, monkeypatch):
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, k, v, **_: q + k + v)
  q = jax.ShapeDtypeStruct((B, L, N, H), jnp.bfloat16)
  mask = build(causal_text(L), keep=jnp.ones(B, bool))['text'].visibility
  flops = training_flops(_loss(lambda q, k, v: cudnn.attention(q, k, v, mask, mask, hint)), q, q, q)
  assert (flops.forward, flops.backward) == (2 * PRODUCT, 2 * PRODUCT)
