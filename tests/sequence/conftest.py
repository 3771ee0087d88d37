"""Masks parsed from docstrings and tests, and masks of regions."""

from __future__ import annotations

import re
import types

import numpy as np
import pytest

from vpe_jax.contracts import concatenate, visible


def parse(text: str) -> np.ndarray:
  """The mask in a text: lines of 0s and 1s, with or without a label in front."""
  lines = re.findall(r'^ *(?:[^\s\d] *)?((?:[01] )+[01])$', text, re.MULTILINE)
  return np.array([line.split() for line in lines], int)


def mask(regions) -> np.ndarray:
  """Mask [B, L (queries), L (keys)] of the regions, in the order in which they are stored."""
  sequence = concatenate([region.visibility for region in regions.values()])
  return np.asarray(visible(sequence, sequence)).astype(int)


@pytest.fixture(scope='session')
def masks() -> types.SimpleNamespace:
  """The functions `parse` and `mask` (as `of`)."""
  return types.SimpleNamespace(parse=parse, of=mask)
