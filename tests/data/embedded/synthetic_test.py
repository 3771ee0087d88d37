"""Synthetic records and encoded entries: structure, and dependence on the index."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.data.embedded.synthetic import Synthetic, SyntheticEncoded
from vpe_jax.data.records import render


def test_records_depend_only_on_the_index():
  first, second = Synthetic(10), Synthetic(20)
  assert first[3] == second[3] != first[4]
  np.testing.assert_array_equal(render(first[3], 64), render(second[3], 64))
  assert (render(first[3], 64) != render(first[4], 64)).any()
  assert first[3].caption
  with pytest.raises(IndexError):
    first[10]


def test_encoded_entries_are_functions_of_the_index():
  entries = (('codes', (36,), 512), ('latents', (16, 16, 4), 0))
  synthetic = SyntheticEncoded(5, entries)
  codes, latents = synthetic[2]['codes'], synthetic[2]['latents']
  assert codes.shape == (36,) and codes.dtype == np.int32 and 0 <= codes.min() < codes.max() < 512
  assert latents.shape == (16, 16, 4) and latents.dtype == np.float32
  for name, leaf in synthetic[2].items():
    np.testing.assert_array_equal(leaf, SyntheticEncoded(5, entries)[2][name])
    assert (synthetic[3][name] != leaf).any()
