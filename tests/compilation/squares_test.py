"""Tests that no buffer of the compiled step is quadratic in the sequence length.

The model has the paper's sequence, remat and strategy but narrow layers, which compile faster. The
shapes of attention buffers have the same two sequence axes at any width.
"""

from __future__ import annotations

import itertools

import pytest

from configs import t2i
from vpe_jax.compilation import examine, hlo
from vpe_jax.compilation.examine import Request

TPUS = ('v5e:2x4', 'v5p:2x2x2')
BLOCK = 512  # largest block of the attention kernels
TEXT = 549  # caption tokens, chosen so that no width is close to the sequence length
SEQUENCE = 1136 + 1040  # tokens of both experts, padded


def _narrow(**changes) -> dict:
  config = t2i.get_config('paper')
  config.data.update(encode='cached', text_length=TEXT)
  config.batch_size = (8, 8)
  config.mesh.fsdp = 8
  model = config.model
  for part in (model.ar, model.dit):
    part.update(width=256, mlp=768, layers=2, heads=2, kv_heads=1)
  model.head.update(width=256, mlp=768, layers=2, heads=4, kv_heads=1)
  model.dual_path.encoder.update(width=144, mlp=384, layers=2, heads=2)
  config.update(changes)
  return config.to_dict()


def _squares(text: str) -> set[tuple[int, ...]]:
  """Shapes with two axes of the sequence length, or of the length rounded up to a block."""
  is_sequence = lambda size: SEQUENCE <= size <= -(-SEQUENCE // BLOCK) * BLOCK
  shapes = {
    shape.dims
    for computation in hlo.parse(text).computations.values()
    for instruction in computation.values()
    for shape in instruction.shapes
  }
  return {dims for dims in shapes if sum(map(is_sequence, dims)) > 1}


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology', ['cpu:8', *(pytest.param(name, marks=pytest.mark.exhaustive) for name in TPUS)]
)
def test_no_buffer_is_quadratic_in_the_sequence(topology):
  compiled = examine.build(_narrow(), Request(topology, stage='joint'))
  assert compiled.text and not _squares(compiled.text)


@pytest.mark.slow
def test_reference_attention_has_quadratic_buffers():
  compiled = examine.build(_narrow(attention='reference'), Request('cpu:8', stage='joint'))
  assert _squares(compiled.text)


def test_no_width_is_close_to_the_sequence_length():
  """Otherwise the shapes returned by `_squares` would be ambiguous."""
  model = _narrow()['model']
  parts = (model['ar'], model['dit'], model['head'], model['dual_path']['encoder'])
  sizes = {size for part in parts for size in part.values() if isinstance(size, int)}
  rounded = -(-SEQUENCE // BLOCK) * BLOCK
  assert not [a for a, b in itertools.product(sizes, (1, 2)) if SEQUENCE <= a * b <= rounded]
