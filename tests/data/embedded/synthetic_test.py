"""Synthetic records and codes: the right structure, fixed by the index."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.data.embedded.synthetic import Synthetic, SyntheticCodes
from vpe_jax.data.records import render


def test_records_depend_on_the_index_alone():
  first, second = Synthetic(10), Synthetic(20)
  assert first[3] == second[3] != first[4]
  np.testing.assert_array_equal(render(first[3], 64), render(second[3], 64))
  assert (render(first[3], 64) != render(first[4], 64)).any()
  assert first[3].caption
  with pytest.raises(IndexError):
    first[10]


def test_codes_have_shape_range_and_no_memory():
  codes = SyntheticCodes(count=5, patches=36, codebook=512, latent_shape=(16, 16, 4))
  ids, latents = codes[2]
  assert ids.shape == (36,) and ids.dtype == np.int32 and 0 <= ids.min() <= ids.max() < 512
  assert latents.shape == (16, 16, 4) and latents.dtype == np.float32
  again = codes[2]
  np.testing.assert_array_equal(ids, again[0])
  np.testing.assert_array_equal(latents, again[1])
  assert (codes[3][0] != ids).any()


def test_discrete_pictures_are_codes_too():
  codes = SyntheticCodes(5, patches=0, codebook=0, latent_shape=(4, 4), latent_codes=24)
  plan, latents = codes[1]
  assert plan.shape == (0,) and latents.shape == (4, 4) and latents.dtype == np.int32
  assert 0 <= latents.min() <= latents.max() < 24
