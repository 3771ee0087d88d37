"""The TPU kernels compile without a TPU; their outputs are tested in suite_test.py.

Interpret mode checks neither tiles nor scalar memory, so these tests compile, with libtpu, for a
topology of v5e, whose VMEM is the tightest.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from vpe_jax import sharding
from vpe_jax.config import MeshConfig
from vpe_jax.ops.attention import blockwise, chooser, pallas_tpu, reference, schedule

# A program for absent devices can't be read from the compilation cache.
pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')


@pytest.fixture(scope='module')
def mesh(libtpu):
  """A mesh of four v5e chips, of which only the topology exists."""
  with pytest.MonkeyPatch.context() as patch:
    # Don't query the cloud's metadata server, and allow several processes with libtpu.
    patch.setenv('TPU_SKIP_MDS_QUERY', '1')
    patch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
    yield sharding.make_mesh(MeshConfig(), topology.devices)


def _compiled(masks, mesh, run, lengths, heads, dtype):
  """The text of a compiled forward and backward pass with one sequence per chip."""
  L, S = lengths

  def arrays():
    sides = ((masks.causal(n)[0]) for n in (L, S))
    batch = tuple(jax.tree.map(lambda x: jnp.repeat(x, mesh.size, 0), side) for side in sides)
    return masks.case(batch, dtype, heads)

  batch_sharding = sharding.batch_sharding(mesh)
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding)
  case = jax.tree.map(put, jax.eval_shape(arrays))
  with jax.set_mesh(mesh):
    return masks.differentiated(run).lower(case).compile().as_text()


def _square(text, lengths, block=512):
  """Shapes in a program with one axis of length L and one of S, each exact or padded to blocks."""
  inside = lambda n, length: length <= n <= -(-length // block) * block
  shapes = set()
  for shape in re.findall(r'\w\[([\d,]+)\]', text):
    sizes = [int(n) for n in shape.split(',')]
    for i, size in enumerate(sizes):
      others = sizes[:i] + sizes[i + 1 :]
      if inside(size, lengths[0]) and any(inside(n, lengths[1]) for n in others):
        shapes.add(shape)
  return shapes


@pytest.mark.parametrize(
  'lengths, heads, dtype',
  [
    ((829, 829), (8, 2, 64), jnp.bfloat16),
    ((1040, 1040), (4, 4, 72), jnp.bfloat16),
    ((1025, 1856), (12, 2, 128), jnp.bfloat16),
    ((640, 640), (2, 1, 256), jnp.bfloat16),
    ((300, 300), (2, 1, 64), jnp.float32),
  ],
)
def test_compiles_for_v5e_without_a_square_buffer(masks, mesh, lengths, heads, dtype):
  def run(*inputs):
    assert chooser.device() == ('tpu', 'TPU v5 lite'), 'the platform is that of the mesh'
    return chooser.attention_and_lse(*inputs)

  text = _compiled(masks, mesh, run, lengths, heads, dtype)
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert not _square(text, lengths)


def test_the_search_detects_the_square_buffer_of_the_dense_definition(masks, mesh):
  text = _compiled(masks, mesh, reference.attention, (300, 300), (2, 1, 64), jnp.bfloat16)
  assert _square(text, (300, 300))


@pytest.mark.parametrize('rows, columns, size', [(32, 16, 16), (64, 64, 4)])
def test_a_schedule_beyond_scalar_memory_is_split_by_sequences(
  masks, monkeypatch, rows, columns, size
):
  batch = jax.tree.map(lambda x: jnp.repeat(x, 3, 0), masks.transfusion(20, 40, 4)[0])
  case = masks.case((batch, batch), heads=(2, 1, 8))
  kernel = pallas_tpu.Tpu(rows, columns, interpret=True)
  run = lambda: kernel.forward(blockwise.Operands(*case.inputs, batch, batch))
  whole = jax.jit(lambda: run())()
  # Two pairs are a word: 16 bytes hold the schedule of one sequence of 2 x 4 pairs, 4 bytes one of
  # a single pair.
  monkeypatch.setattr(pallas_tpu, '_SMEM', size)
  assert str(jax.make_jaxpr(run)()).count('name=attention_forward') == 3
  for ours, theirs in zip(jax.jit(lambda: run())(), whole, strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize('blocks', [3, 4])
def test_packed_entries_are_unpacked(blocks):
  status = jax.random.randint(jax.random.key(0), (2, 5, blocks), 0, 3)
  entries = schedule.visits(status)
  call = pallas_tpu._Call(pallas_tpu.Tpu(8, 8), (2, 1, 1, 8, 5, blocks), jnp.float32)
  table = pallas_tpu._pack(entries)
  for b, i, n in np.ndindex(2, 5, blocks):
    block, kind = call.entry(table, b, i, n)
    assert int(block) * 4 + int(kind) == int(entries[b, i, n])


@pytest.mark.tpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('mask', ['transfusion', 'packed_two', 'scattered', 'cached'])
def test_on_a_tpu(masks, mask, dtype):
  masks.near_reference(pallas_tpu.attention, masks.sized[mask], dtype)
