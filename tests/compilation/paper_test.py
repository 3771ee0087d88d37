"""The paper's training step, compiled for real TPU slices: it fits, and no buffer is L x L."""

from __future__ import annotations

import pytest

from configs import t2i
from vpe_jax.compilation import examine, hlo
from vpe_jax.compilation.examine import Request

# Captions so long that no width of the model lies between the tokens of a row and those that the
# kernels' blocks hold.
TEXT = 549
pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')


@pytest.fixture(autouse=True)
def described(monkeypatch):
  """Neither asks the cloud's metadata server who it is, nor minds other users of the library."""
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')


def _config(**changes):
  config = t2i.get_config('paper')
  config.data.text_length = TEXT
  config.update(changes)
  return config


def _squares(built: examine.Built) -> set[tuple[int, ...]]:
  """Shapes with two axes that each hold a row's tokens, or those and what fills the last block."""
  row = sum(span.length for span in built.job.system.spans)
  span = range(row, -(-row // 512) * 512 + 1)
  widths = {n for shape in built.lowered.trainable.values() for n in shape}
  assert not widths & set(span), 'a width would be taken for a row'
  computations = hlo.parse(built.text).computations.values()
  shapes = {shape.dims for one in computations for i in one.values() for shape in i.shapes}
  return {dims for dims in shapes if sum(size in span for size in dims) > 1}


def test_the_paper_fits_a_v5e_pod():
  built = examine.build(_config().to_dict(), Request('v5e:16x16', stage='joint'))
  assert not _squares(built)
  found = examine.report(built).as_dict()
  assert found['parameters'] == pytest.approx(4_166.3e6, rel=1e-4)
  assert found['fits'] and 0.1 < found['hbm_fraction'] < 0.9
  assert found['chips'] == 256 and found['images_per_step'] == 192
  assert found['hlo_flops_per_step'] > found['model_flops_per_step'] > 1e15


def _thin(**changes) -> dict:
  """Fewer layers, which one loop runs, so the buffers are those of all; no frozen networks."""
  config = _config(**changes)
  config.data.encode = 'cached'
  for part in (config.model.ar, config.model.dit, config.model.head):
    part.layers = 2
  config.model.dual_path.encoder.layers = 2
  return config.to_dict()


def test_no_buffer_of_a_v5p_step_is_square():
  assert not _squares(examine.build(_thin(), Request('v5p:4x4x4', stage='joint')))


def test_the_search_finds_what_dense_attention_makes():
  dense = _thin(attention='reference')
  assert _squares(examine.build(dense, Request('v5p:4x4x4', stage='joint')))
