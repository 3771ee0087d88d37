"""OpenMoji files by code."""

from __future__ import annotations

from vpe_jax.data.embedded import drawings


def test_codes_of_files():
  files = drawings.files()
  assert len(files) > 4400
  assert not any('FE0F' in code for code in files)
  assert '<svg' in drawings.svg('1F415')


def test_code_of_an_emoji():
  assert drawings.code_of('\u2600\ufe0f') == '2600'
  assert drawings.code_of('\U0001f469\U0001f3fd\u200d\U0001f33e') == '1F469-1F3FD-200D-1F33E'
