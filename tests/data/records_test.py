"""Records: rendering, edit masks, and indices of procedural sources."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vpe_jax.data.embedded.synthetic import Noise
from vpe_jax.data.records import ProceduralSource, Record, edit_mask, render

_RECORD = Record('x', 'x', 'x', 'train', Noise(3))


class _Numbers(ProceduralSource):
  def compose(self, index):
    return dataclasses.replace(_RECORD, id=f'{self.split}/{index}')


def test_render_and_edit_mask():
  np.testing.assert_array_equal(render(_RECORD, 16), Noise(3).render(16))
  assert not edit_mask(dataclasses.replace(_RECORD, reference=Noise(3)), 16).any()
  mask = edit_mask(dataclasses.replace(_RECORD, reference=Noise(4)), 16)
  np.testing.assert_array_equal(mask, (Noise(3).render(16) != Noise(4).render(16)).any(-1))


def test_procedural_sources_have_no_records_beyond_their_count():
  source = _Numbers(2, 'concept')
  assert [record.id for record in source] == ['concept/0', 'concept/1'] and len(source) == 2
  for index in (-1, 2):
    with pytest.raises(IndexError):
      source[index]
