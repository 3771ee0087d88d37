"""Masks as drawn in docstrings and tests, and masks of regions."""

from __future__ import annotations

import re
import types

import numpy as np
import pytest

from vpe_jax.contracts import concatenate, visible


def drawn(text: str) -> np.ndarray:
  """The mask drawn in a text: the 0s and 1s of its lines, with or without a label in front."""
  lines = re.findall(r'^ *(?:[^\s\d] *)?((?:[01] )+[01])$', text, re.MULTILINE)
  return np.array([line.split() for line in lines], int)


def mask(regions) -> np.ndarray:
  """Who sees whom [B, L, L], in the order in which regions are stored."""
  sequence = concatenate([region.visibility for region in regions.values()])
  return np.asarray(visible(sequence, sequence)).astype(int)


@pytest.fixture(scope='session')
def masks() -> types.SimpleNamespace:
  """The functions above."""
  return types.SimpleNamespace(drawn=drawn, of=mask)
