"""A cache folder for these tests, instead of the user's."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope='session', autouse=True)
def _own_cache(tmp_path_factory):
  before = os.environ.get('VPE_JAX_CACHE')
  os.environ['VPE_JAX_CACHE'] = str(tmp_path_factory.mktemp('cache'))
  yield
  if before is None:
    del os.environ['VPE_JAX_CACHE']
  else:
    os.environ['VPE_JAX_CACHE'] = before
