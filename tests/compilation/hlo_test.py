"""Tests of parsing HLO and counting FLOPs, in programs of this backend and of TPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vpe_jax.compilation import hlo, traffic

SQUARE = jax.ShapeDtypeStruct((16, 16), jnp.float32)
DOT = 2 * 16**3


def _program(function, *arguments) -> hlo.Program:
  return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def _flops(function, *arguments) -> float:
  return traffic.work_of(_program(function, *arguments), [0]).flops


def _repeat(count: int):
  """Multiplies x by w `count` times in a scan."""

  def run(x, w):
    return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, None, length=count)[0]

  return run


def test_dot_counts_two_flops_per_multiply_add():
  left = jax.ShapeDtypeStruct((3, 8, 5), jnp.float32)
  right = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32)
  assert _flops(jnp.matmul, left, right) == 2 * 3 * 8 * 5 * 7


@pytest.mark.parametrize('count', [1, 5, 12])
def test_loop_body_counts_as_often_as_it_runs(count):
  assert _flops(_repeat(count), SQUARE, SQUARE) == count * DOT


def test_trip_counts_of_nested_loops_multiply():
  def run(x, w):
    return jax.lax.scan(lambda c, _: (_repeat(4)(c, w), None), x, None, length=3)[0]

  assert _flops(run, SQUARE, SQUARE) == 3 * 4 * DOT


def test_scan_counts_forward_and_backward_pass():
  loss = lambda w, x: jnp.sum(_repeat(6)(x, w))
  assert _flops(jax.grad(loss), SQUARE, SQUARE) == 6 * 3 * DOT


def test_data_dependent_loop_is_reported_and_counts_once():
  def run(x, w):
    return jax.lax.while_loop(lambda c: jnp.sum(c) < 1e3, lambda c: c @ w + 1, x)

  program = _program(run, SQUARE, SQUARE)
  work = traffic.work_of(program, [0])
  assert len(work.unknown_loops) == 1 and work.flops == DOT


def test_convolution_counts_positions_inside_the_image():
  image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

  def run(x, k):
    return jax.lax.conv_general_dilated(
      x, k, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  # Along each side, 4 positions of 3 taps, of which one tap is outside: 11.
  assert _flops(run, image, kernel) == 2 * 2 * 3 * 5 * 11 * 11


# Constructs of TPU programs, which this backend doesn't generate.
TPU = """HloModule jit_step, is_scheduled=true

%gather_piece.1 (param_0.1: bf16[16,4]) -> bf16[16,16] {
  %param_0.1 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true
}

%gather_piece.2 (param_0.2: bf16[16,4]) -> bf16[16,16] {
  %param_0.2 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,16]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true
}

%condition (param.1: (s32[], bf16[16,4])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(9)
  %param.1 = (s32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.9), direction=LT
}

%body (param.2: (s32[], bf16[16,4])) -> (s32[], bf16[16,4]) {
  %param.2 = (s32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  %get-tuple-element.3 = bf16[16,4]{1,0:T(8,128)(2,1)} get-tuple-element(%param.2), index=1
  %constant.2 = s32[]{:T(128)} constant(2)
  %add.1 = s32[]{:T(128)} add(%get-tuple-element.2, %constant.2)
  %fusion.1 = bf16[16,16]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.3), kind=kLoop, \
calls=%gather_piece.1
  %fusion.2 = bf16[16,16]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.3), kind=kLoop, \
calls=%gather_piece.2
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)}) tuple(%add.1, \
%get-tuple-element.3)
}

ENTRY %main (p: bf16[16,4], q: bf16[3,8,16], r: bf16[3,4,16]) -> bf16[16,4] {
  %p = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  %r = bf16[3,4,16]{2,1,0:T(8,128)(2,1)} parameter(2)
  %constant.1 = s32[]{:T(128)} constant(1)
  %tuple.1 = (s32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)}) tuple(%constant.1, %p)
  %while.1 = (s32[]{:T(128)}, bf16[16,4]{1,0:T(8,128)(2,1)}) while(%tuple.1), \
condition=%condition, body=%body
  %convolution.1 = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} convolution(%q, %r), window={size=3 stride=2 \
lhs_dilate=3}, dim_labels=0bf_0oi->0bf
  ROOT %get-tuple-element.9 = bf16[16,4]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""


def test_trip_count_uses_start_and_step_of_the_counter():
  program = hlo.parse(TPU)
  assert program.trips('main', program.computations['main']['while.1']) == 4
  assert program.unknown_loops() == []


def test_collective_split_over_two_fusions_counts_once():
  (gather,) = traffic.work_of(hlo.parse(TPU), [0] * 8).collectives
  assert (gather.kind, gather.times, gather.size) == ('all-gather', 4, 4)
  assert gather.bytes == 4 * 16 * 16 * 2 * 3 / 4


def test_dilated_convolution_counts_as_a_batched_dot():
  # Of the 9 pairs of kernel position and output, only the 3 that meet a batch element count.
  assert traffic.work_of(hlo.parse(TPU), [0] * 8).flops == 2 * 3 * 8 * 16 * 4


def test_text_other_than_hlo_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('not HLO')


COUNTDOWN = """HloModule m

%condition (s: (s32[])) -> pred[] {
  %s = (s32[]) parameter(0)
  %zero = s32[] constant(0)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %more = pred[] compare(%i, %zero), direction=GT
}

%body (t: (s32[])) -> (s32[]) {
  %t = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(-1)
  %next = s32[] add(%j, %one)
  ROOT %state = (s32[]) tuple(%next)
}

ENTRY %main () -> (s32[]) {
  %ten = s32[] constant(10)
  %start = (s32[]) tuple(%ten)
  ROOT %loop = (s32[]) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_that_counts_down_is_reported_as_unknown():
  program = hlo.parse(COUNTDOWN)
  assert program.unknown_loops() == ['loop']
  assert program.trips('main', program.computations['main']['loop']) == 1


BRANCHES = """HloModule m

%yes (a: f32[4,8]) -> f32[4,4] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %dot = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%no (b: f32[4,4]) -> f32[4,4] {
  ROOT %b = f32[4,4]{1,0} parameter(0)
}

ENTRY %main (p: pred[], x: f32[4,8], y: f32[4,4]) -> f32[4,4] {
  %p = pred[] parameter(0)
  %x = f32[4,8]{1,0} parameter(1)
  %y = f32[4,4]{1,0} parameter(2)
  ROOT %if = f32[4,4]{1,0} conditional(%p, %x, %y), true_computation=%yes, false_computation=%no
}
"""


def test_branches_of_a_boolean_conditional_count():
  assert [name for name, *_ in hlo.parse(BRANCHES).runs()] == ['main', 'yes', 'no']
  assert traffic.work_of(hlo.parse(BRANCHES), [0]).flops == 2 * 4 * 4 * 8
