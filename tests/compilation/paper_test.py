"""Paper-size training steps, compiled for TPU pods that aren't here."""

from __future__ import annotations

import itertools

import pytest

from configs import t2i
from vpe_jax.compilation import examine, hlo
from vpe_jax.compilation.examine import Request

pytestmark = pytest.mark.slow
BLOCK = 512  # the largest of the attention kernels
TEXT = 549  # a caption's tokens: no width of the model is near the length of the row
ROW = 1136 + 1040  # tokens of both experts, padded


def _config(**changes) -> dict:
  config = t2i.get_config('paper')
  config.data.encode = 'cached'
  config.update(changes)
  return config.to_dict()


def _thin(**changes) -> dict:
  """All widths of the paper and two layers of each stack: what a layer makes, others make too."""
  config = t2i.get_config('paper')
  config.data.update(encode='cached', text_length=TEXT)
  for part in (
    config.model.ar,
    config.model.dit,
    config.model.head,
    config.model.dual_path.encoder,
  ):
    part.layers = 2
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


def test_a_paper_step_fits_its_pod():
  """Stage `plan` of the whole model."""
  found = examine.examine(_config(), Request('v5p:4x4x4', stage='plan')).as_dict()
  assert round(found['parameters'] / 1e6, 1) == 4166.3
  assert (found['chips'], found['images_per_step']) == (64, 480)
  assert found['fits'] and found['hbm_fraction'] < 0.9
  assert 1.0 < found['hlo_flops_per_step'] / found['model_flops_per_step'] < 2.0
  assert found['bound_by'] in ('compute', 'hbm', 'ici') and found['mfu_bound'] > 0.4


@pytest.mark.parametrize('topology', ['v5e:8x8', 'v5p:4x4x4'])
def test_nothing_is_as_large_as_the_row_squared(topology):
  built = examine.build(_thin(), Request(topology, stage='joint'))
  assert built.text and not _squares(built.text)


def test_dense_attention_is_as_large_as_the_row_squared():
  built = examine.build(_thin(attention='reference'), Request('v5e:8x8', stage='joint'))
  assert _squares(built.text)


def test_no_width_is_near_the_rows_length():
  """Else squares that are found, or not, would mean nothing."""
  model = _thin()['model']
  parts = (model['ar'], model['dit'], model['head'], model['dual_path']['encoder'])
  sizes = {size for part in parts for size in part.values() if isinstance(size, int)}
  rounded = -(-ROW // BLOCK) * BLOCK
  assert not [a for a, b in itertools.product(sizes, (1, 2)) if ROW <= a * b <= rounded]
