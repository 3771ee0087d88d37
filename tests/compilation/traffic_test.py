"""Tests of traffic: groups of chips, bytes of collectives, and HBM bytes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vpe_jax import sharding
from vpe_jax.compilation import hlo, traffic
from vpe_jax.config import MeshConfig

ARRAY = jax.ShapeDtypeStruct((64, 32), jnp.float32)
BYTES = 64 * 32 * 4


def _work(body, into: P, out: P) -> traffic.Work:
  mesh = sharding.make_mesh(MeshConfig())
  run = functools.partial(jax.shard_map, mesh=mesh, in_specs=into, out_specs=out, check_vma=False)
  text = jax.jit(run(body)).lower(ARRAY).compile().as_text()
  return traffic.work_of(hlo.parse(text), [0] * 8)


@pytest.mark.parametrize(
  'kind, body, into, out, received',
  [
    ('all-gather', lambda x: jax.lax.all_gather(x, 'fsdp', tiled=True), P('fsdp'), P(), 7 / 8),
    ('all-reduce', lambda x: jax.lax.psum(x, 'fsdp'), P(), P(), 14 / 8),
    (
      'reduce-scatter',
      lambda x: jax.lax.psum_scatter(x, 'fsdp', tiled=True),
      P(),
      P('fsdp'),
      7 / 8,
    ),
    (
      'all-to-all',
      lambda x: jax.lax.all_to_all(x, 'fsdp', 1, 0, tiled=True),
      P('fsdp'),
      P(None, 'fsdp'),
      7 / 64,
    ),
    (
      'collective-permute',
      lambda x: jax.lax.ppermute(x, 'fsdp', [(i, (i + 1) % 8) for i in range(8)]),
      P('fsdp'),
      P('fsdp'),
      1 / 8,
    ),
  ],
)
def test_bytes_received_by_each_kind_of_collective(kind, body, into, out, received):
  assert _work(body, into, out).collective_bytes() == {kind: pytest.approx(BYTES * received)}


def test_collective_in_a_loop_counts_as_often_as_it_runs():
  def body(x):
    step = lambda carry, _: (jnp.tanh(jax.lax.psum(carry, 'fsdp')), None)
    return jax.lax.scan(step, x, None, length=5)[0]

  assert _work(body, P(), P()).collective_bytes() == {'all-reduce': 5 * BYTES * 14 / 8}


@pytest.mark.parametrize(
  'text, group',
  [
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}, x=1', (0, 4)),
    ('replica_groups=[2,4]<=[8], x=1', (0, 1, 2, 3)),
    ('replica_groups=[4,2]<=[2,4]T(1,0), x=1', (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x=1", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x=1", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x=1", tuple(range(8))),
    ('replica_groups={}, x=1', tuple(range(8))),
  ],
)
def test_group_formats_are_parsed(text, group):
  assert traffic.group_of(text, 8) == group


def test_dcn_bytes_are_those_from_other_slices():
  """Each slice receives the other slice's half of the array, shared by its 4 chips."""
  collective = functools.partial(traffic.Collective, 'all-gather', 'x', '', (), 1.0, 8)
  assert collective(2, bytes=800 * 7 / 8).dcn_bytes == pytest.approx(800 / 2 / 4)
  assert collective(1, bytes=800 * 7 / 8).dcn_bytes == 0


SLICES = """HloModule m

%scatter (input: f32[256,512], i: s32[]) -> f32[64,512] {
  %input = f32[256,512]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %all-reduce.3 = f32[256,512]{1,0} all-reduce(%input), channel_id=2, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.5 = f32[64,512]{1,0} dynamic-slice(%all-reduce.3, %i, %zero)
}

ENTRY %main (x: f32[256,512], at: s32[]) -> f32[64,512] {
  %x = f32[256,512]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %part = f32[64,512]{1,0} fusion(%x, %at), kind=kCustom, calls=%scatter
  %after-all = token[] after-all()
  %send = (f32[64,512]{1,0}, u32[], token[]) send(%part, %after-all), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64,512]{1,0}, u32[], token[]) recv(%after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %recv-done = (f32[64,512]{1,0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %sum = f32[64,512]{1,0} get-tuple-element(%recv-done), index=0
}
"""


def test_gradient_reduction_over_two_slices_is_hierarchical():
  """As in TPU programs: a reduce-scatter within a slice, then an all-reduce over the network."""
  work = traffic.work_of(hlo.parse(SLICES), [0, 0, 0, 0, 1, 1, 1, 1])
  whole = 256 * 512 * 4
  assert work.collective_bytes() == {'reduce-scatter': whole * 3 / 4, 'all-reduce': whole / 4}
  assert sorted(collective.dcn_bytes for collective in work.collectives) == [0, whole / 4]


MEMORY = """HloModule m

%sliced (a: f32[100,8], i: s32[]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,8}
}

%updated (b: f32[100,8], u: f32[1,8], j: s32[]) -> f32[100,8] {
  %b = f32[100,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %update = f32[100,8]{1,0} dynamic-update-slice(%b, %u, %j, %none)
}

ENTRY %main (x: f32[100,8], at: s32[]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %fast = f32[100,8]{1,0:S(1)} negate(%x)
  %one = f32[1,8]{1,0} fusion(%x, %at), kind=kLoop, calls=%sliced
  ROOT %all = f32[100,8]{1,0} fusion(%x, %one, %at), kind=kLoop, calls=%updated
}
"""


def test_hbm_bytes_exclude_on_chip_memory_and_unused_slices():
  whole, part, index = 3200, 32, 4
  expected = whole + (part + index + part) + (2 * part + part + index)
  assert traffic.work_of(hlo.parse(MEMORY), [0]).hbm_bytes == expected


# An all-gather that starts before a loop and continues in every iteration, overlapped with work.
CONTINUED = """HloModule m

%begun (p: f32[8,16], w: f32[64,16], s: s32[2]) -> (f32[8,16], f32[64,16], s32[2]) {
  %p = f32[8,16]{1,0} parameter(0)
  %w = f32[64,16]{1,0} parameter(1)
  %s = s32[2]{0:S(4)} parameter(2)
  %all-gather.1 = f32[64,16]{1,0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], \
dimensions={0}
  ROOT %t = (f32[8,16]{1,0}, f32[64,16]{1,0}, s32[2]{0:S(4)}) tuple(%p, %all-gather.1, %s)
}

%carried (q: f32[8,16], v: f32[64,16], x: f32[4,4]) -> (f32[4,4], f32[8,16], f32[64,16]) {
  %q = f32[8,16]{1,0} parameter(0)
  %v = f32[64,16]{1,0} parameter(1)
  %x = f32[4,4]{1,0} parameter(2)
  %work = f32[4,4]{1,0} negate(%x)
  %all-gather.2 = f32[64,16]{1,0} all-gather(%q), channel_id=3, replica_groups=[1,8]<=[8], \
dimensions={0}
  ROOT %u = (f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) tuple(%work, %q, %all-gather.2)
}

%condition (c: (s32[], f32[4,4], f32[8,16], f32[64,16])) -> pred[] {
  %c = (s32[], f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%c), index=0
  %turns = s32[] constant(5)
  ROOT %less = pred[] compare(%turn, %turns), direction=LT
}

%body (b: (s32[], f32[4,4], f32[8,16], f32[64,16])) -> (s32[], f32[4,4], f32[8,16], f32[64,16]) {
  %b = (s32[], f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) parameter(0)
  %i = s32[]{:S(2)} get-tuple-element(%b), index=0
  %y = f32[4,4]{1,0} get-tuple-element(%b), index=1
  %part = f32[8,16]{1,0} get-tuple-element(%b), index=2
  %whole = f32[64,16]{1,0} get-tuple-element(%b), index=3
  %fusion.2 = (f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) fusion(%part, %whole, %y), \
kind=kOutput, calls=%carried
  %y.2 = f32[4,4]{1,0} get-tuple-element(%fusion.2), index=0
  %one = s32[]{:S(2)} constant(1)
  %next = s32[]{:S(2)} add(%i, %one)
  ROOT %r = (s32[], f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) \
tuple(%next, %y.2, %part, %whole)
}

ENTRY %main (a: f32[8,16], d: f32[64,16], e: s32[2], f: f32[4,4]) -> f32[4,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %d = f32[64,16]{1,0} parameter(1)
  %e = s32[2]{0:S(4)} parameter(2)
  %f = f32[4,4]{1,0} parameter(3)
  %fusion.1 = (f32[8,16]{1,0}, f32[64,16]{1,0}, s32[2]{0:S(4)}) fusion(%a, %d, %e), \
kind=kCustom, calls=%begun
  %part.1 = f32[8,16]{1,0} get-tuple-element(%fusion.1), index=0
  %whole.1 = f32[64,16]{1,0} get-tuple-element(%fusion.1), index=1
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) \
tuple(%zero, %f, %part.1, %whole.1)
  %loop = (s32[], f32[4,4]{1,0}, f32[8,16]{1,0}, f32[64,16]{1,0}) while(%start), \
condition=%condition, body=%body
  ROOT %out = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_collective_continued_in_a_loop_counts_once():
  work = traffic.work_of(hlo.parse(CONTINUED), [0] * 8)
  part, whole, square = 8 * 16 * 4, 64 * 16 * 4, 4 * 4 * 4
  assert work.collective_bytes() == {'all-gather': whole * 7 / 8}
  assert work.hbm_bytes == (part + whole) + 5 * 2 * square
  assert sum(count for _, count in work.largest_traffic) == work.hbm_bytes


BITCAST = """HloModule m

%sliced (a: f32[100,8], i: s32[]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %same = f32[100,8]{1,0} bitcast(%a)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%same, %i, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (x: f32[100,8], at: s32[]) -> f32[1,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %one = f32[1,8]{1,0} fusion(%x, %at), kind=kLoop, calls=%sliced
}
"""


def test_slice_of_a_bitcast_counts_as_a_slice():
  assert traffic.work_of(hlo.parse(BITCAST), [0]).hbm_bytes == 32 + 4 + 32


STARTED = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

ENTRY %main (x: f32[32,32]) -> f32[1,32] {
  %x = f32[32,32]{1,0} parameter(0)
  %begin = f32[32,32]{1,0} all-reduce-start(%x), channel_id=1, replica_groups=[1,2]<=[2], \
to_apply=%sum
  %end = f32[32,32]{1,0} all-reduce-done(%begin)
  ROOT %row = f32[1,32]{1,0:S(1)} slice(%end), slice={[0:1], [0:32]}
}
"""


def test_started_all_reduces_write_and_slices_into_on_chip_memory_read():
  whole, row = 4096, 128
  assert traffic.work_of(hlo.parse(STARTED), [0, 0]).hbm_bytes == 2 * whole + row


UPDATED = """HloModule m

ENTRY %main (x: f32[32,32], u: f32[1,32], i: s32[]) -> f32[32,32] {{
  %x = f32[32,32]{{1,0{array}}} parameter(0)
  %u = f32[1,32]{{1,0{update}}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = f32[32,32]{{1,0{array}}} dynamic-update-slice(%x, %u, %i, %i)
}}
"""


@pytest.mark.parametrize(
  'array, update, rows', [('', '', 2), ('', ':S(1)', 1), (':S(1)', '', 1), (':S(1)', ':S(1)', 0)]
)
def test_an_update_counts_where_it_is_read_and_where_it_is_written(array, update, rows):
  text = UPDATED.format(array=array, update=update)
  assert traffic.work_of(hlo.parse(text), [0]).hbm_bytes == rows * 32 * 4
