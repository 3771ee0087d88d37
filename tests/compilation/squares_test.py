"""No buffer of the compiled training step of both experts grows with the square of the row.

The paper's row, remat and strategy, in narrow layers: what a layer's attention makes has
the same two axes at any width, and these compile in a fraction of the time.
"""

from __future__ import annotations

import itertools

import pytest

from configs import t2i
from vpe_jax.compilation import examine, hlo
from vpe_jax.compilation.examine import Request

BLOCK = 512  # the largest of the attention kernels
TEXT = 549  # a caption's tokens: no width of the model is near the length of the row
ROW = 1136 + 1040  # tokens of both experts, padded


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
  """Shapes with two axes of the row's length, or of that rounded up to a block."""
  near = lambda size: ROW <= size <= -(-ROW // BLOCK) * BLOCK
  shapes = {
    shape.dims
    for computation in hlo.parse(text).computations.values()
    for instruction in computation.values()
    for shape in instruction.shapes
  }
  return {dims for dims in shapes if sum(map(near, dims)) > 1}


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x2'])
def test_nothing_is_as_large_as_the_row_squared(topology):
  built = examine.build(_narrow(), Request(topology, stage='joint'))
  assert built.text and not _squares(built.text)


@pytest.mark.slow
def test_dense_attention_is_as_large_as_the_row_squared():
  built = examine.build(_narrow(attention='reference'), Request('v5e:2x4', stage='joint'))
  assert _squares(built.text)


def test_no_width_is_near_the_rows_length():
  """Else squares that are found, or not, would mean nothing."""
  model = _narrow()['model']
  parts = (model['ar'], model['dit'], model['head'], model['dual_path']['encoder'])
  sizes = {size for part in parts for size in part.values() if isinstance(size, int)}
  rounded = -(-ROW // BLOCK) * BLOCK
  assert not [a for a, b in itertools.product(sizes, (1, 2)) if ROW <= a * b <= rounded]
