"""Sizes of the convolutional encoder and decoder that image autoencoders share."""

import dataclasses

import pytest

from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.contracts import UserError

SIZES = PyramidConfig((32, 64), blocks=1, outputs=8, inputs=4, attention=(0, 1))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'attention': (2,)}, "'attention' .*levels below 2"),
    ({'attention': (-1,)}, "'attention' .*at least 0"),
    ({'widths': (32, 48)}, "'widths' .*multiples of groups=32"),
  ],
)
def test_sizes_out_of_range_are_errors(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SIZES, **changes)


def test_rms_normalization_takes_any_width():
  assert dataclasses.replace(SIZES, widths=(5, 7), groups=0).factor == 2
