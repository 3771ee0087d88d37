"""Tests of this folder compile with libtpu."""

from __future__ import annotations

import pytest


@pytest.fixture(scope='module', autouse=True)
def _libtpu(libtpu: None) -> None:
  """See tests/conftest.py."""
