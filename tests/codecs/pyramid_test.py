"""Sizes of image autoencoders and tokenizers out of range are errors."""

import dataclasses

import pytest

from vpe_jax.codecs.kl_vae import KlVaeSection
from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.codecs.siglip_vq import SiglipVqSection
from vpe_jax.codecs.vqgan import VqGanSection
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


def test_moments_of_latents_are_one_value_or_one_per_channel():
  for shift in ((0.5,), (0.5,) * SIZES.inputs):
    KlVaeSection(SIZES, True, True, shift=shift)
  for field, values, message in (
    ('shift', (0.0, 0.0), 'one per channel'),
    ('scale', (1.0,) * 3, 'one per channel'),
    ('scale', (1.0, 1.0, 1.0, 0.0), 'above 0'),
  ):
    with pytest.raises(UserError, match=f"'{field}' .*{message}"):
      KlVaeSection(SIZES, True, True, **{field: values})


def test_images_are_whole_codes():
  with pytest.raises(UserError, match="'image_size' .*multiple of patch=16"):
    SiglipVqSection(image_size=390)
  with pytest.raises(UserError, match="'image_size' .*multiple of 2"):
    VqGanSection(SIZES, codes=16, width=4, normed=True, image_size=65)


def test_rms_normalization_takes_any_width():
  assert dataclasses.replace(SIZES, widths=(5, 7), groups=0).factor == 2
