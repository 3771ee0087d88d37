"""Decoding, padding and cropping of images."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from vpe_jax.contracts import UserError
from vpe_jax.data import transforms
from vpe_jax.data.records import BadRecord


def test_pad_to_square_centres_with_the_odd_pixel_at_the_end():
  image = np.zeros((4, 8, 3), np.uint8)
  square = transforms.pad_to_square(image, 10)
  assert square.shape == (10, 10, 3)
  dark = (square < 128).all(-1)
  assert dark.any(1).tolist() == [False] * 2 + [True] * 5 + [False] * 3
  assert dark.any(0).all()
  tall = transforms.pad_to_square(image.transpose(1, 0, 2), 10)
  np.testing.assert_array_equal(tall, square.transpose(1, 0, 2))


def test_pad_to_square_scales_like_pil():
  image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
  square = transforms.pad_to_square(image, 15)
  expected = np.array(Image.fromarray(image).resize((10, 15), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(square[:, 2:12], expected)
  assert (square[:, :2] == 255).all() and (square[:, 12:] == 255).all()


def test_crop_to_square_takes_the_centre():
  image = np.zeros((20, 41, 3), np.uint8)
  image[:, 10:30] = 255
  square = transforms.to_square(image, 20, 'crop')
  assert square.shape == (20, 20, 3) and (square == 255).all()
  wide = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
  scaled = np.array(Image.fromarray(wide).resize((16, 10), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(transforms.crop_to_square(wide, 10), scaled[:, 3:13])
  tall = transforms.crop_to_square(image.transpose(1, 0, 2), 20)
  np.testing.assert_array_equal(tall, square.transpose(1, 0, 2))
  np.testing.assert_array_equal(
    transforms.to_square(wide, 10, 'pad'), transforms.pad_to_square(wide, 10)
  )


def test_transparency_is_white(tmp_path):
  Image.new('RGBA', (5, 4), (255, 0, 0, 0)).save(tmp_path / 'clear.png')
  image = transforms.read_image(tmp_path / 'clear.png')
  assert image.shape == (4, 5, 3) and (image == 255).all()


@pytest.mark.parametrize('ending', ['png', 'tiff'])
def test_16_bit_grey_is_scaled(tmp_path, ending):
  levels = np.asarray([[0, 255, 257, 32768, 65535]], np.uint16)
  path = tmp_path / f'grey.{ending}'
  Image.fromarray(levels).save(path)
  assert transforms.read_image(path)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_integer_and_floating_point_grey_is_scaled(tmp_path):
  path = tmp_path / 'grey.tiff'
  Image.fromarray(np.asarray([[0, 65535, 32768]], np.int32)).save(path)
  assert transforms.read_image(path)[0, :, 1].tolist() == [0, 255, 128]
  Image.fromarray(np.asarray([[0, 0.5, 1]], np.float32)).save(path)
  assert transforms.read_image(path)[0, :, 2].tolist() == [0, 128, 255]
  for bad in (1.5, -0.1, np.nan, np.inf):
    Image.fromarray(np.asarray([[0, bad]], np.float32)).save(path)
    with pytest.raises(UserError, match='grey.tiff'):
      transforms.read_image(path)


def test_decoders_of_other_formats_never_run(tmp_path):
  """Pillow would hand this one to Ghostscript."""
  path = tmp_path / 'fox.jpg'
  path.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n')
  for read in (transforms.read_image, transforms.read_size):
    with pytest.raises(UserError, match='fox.jpg .not one of PNG'):
      read(path)


def test_any_error_of_a_decoder_names_the_image(tmp_path, monkeypatch):
  Image.new('RGB', (8, 8)).save(path := tmp_path / 'fox.png')

  def fail(_):
    raise RuntimeError('failed to decode frame 0')

  monkeypatch.setattr(Image.Image, 'getexif', fail)
  for read in (transforms.read_image, transforms.read_size):
    with pytest.raises(UserError, match='fox.png .failed to decode frame 0'):
      read(path)


def test_unreadable_images_are_named(tmp_path):
  path = tmp_path / 'fox.png'
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(path)
  truncated = path.read_bytes()[:3000]
  path.unlink()
  for content in (None, b'', b'not an image', truncated):
    if content is not None:
      path.write_bytes(content)
    with pytest.raises(UserError, match='unreadable image .*fox.png'):
      transforms.read_image(path)


def test_open_files_are_read_too(tmp_path):
  path = tmp_path / 'fox.jpg'
  noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  Image.fromarray(noise).save(path)
  content = path.read_bytes()
  image = transforms.read_image(io.BytesIO(content), 'the fox')
  np.testing.assert_array_equal(image, transforms.read_image(path))
  assert transforms.read_size(io.BytesIO(content), 'the fox') == (30, 20)
  for read in (transforms.read_image, transforms.read_size):
    with pytest.raises(UserError, match='unreadable image the fox'):
      read(io.BytesIO(b'none'), 'the fox')


def _saved(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize('fit', ['pad', 'crop'])
def test_only_large_jpegs_are_decoded_at_a_reduced_size(fit, monkeypatch):
  """The reduced image differs by a few levels; one below the limit not at all."""
  rng = np.random.default_rng(0)
  small = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
  jpeg = _saved(small.resize((400, 300), Image.BICUBIC), 'JPEG', quality=95)
  decoding, reduced = transforms.Decoding(fit), []
  draft = JpegImagePlugin.JpegImageFile.draft
  monkeypatch.setattr(
    JpegImagePlugin.JpegImageFile,
    'draft',
    lambda self, *arguments: reduced.append(self.size) or draft(self, *arguments),
  )
  exact = lambda size: transforms.to_square(transforms.read_image(io.BytesIO(jpeg), 'x'), size, fit)
  side = {'pad': 400, 'crop': 300}[fit]
  largest = side // (2 * transforms.REDUCING_GAP)
  np.testing.assert_array_equal(decoding.render(jpeg, largest + 1, 'x'), exact(largest + 1))
  assert not reduced
  difference = decoding.render(jpeg, largest, 'x').astype(int) - exact(largest)
  assert reduced and 0 < np.abs(difference).max() <= 8 and np.abs(difference).mean() < 1.5
  png = _saved(small.resize((400, 300)), 'PNG')
  image = transforms.to_square(transforms.read_image(io.BytesIO(png), 'x'), 8, fit)
  np.testing.assert_array_equal(decoding.render(png, 8, 'x'), image)


def test_images_above_the_limits_are_refused_before_they_are_decoded():
  png = _saved(Image.new('1', (300, 200)), 'PNG')
  exact = transforms.Decoding(most_pixels=60_000, most_bytes=len(png))
  assert exact.render(png, 8, 'x').shape == (8, 8, 3)
  for decoding, message in (
    (dataclasses.replace(exact, most_pixels=59_999), '300 x 200 pixels.*most_pixels=59,999'),
    (dataclasses.replace(exact, most_bytes=len(png) - 1), f'{len(png)} bytes.*most_bytes'),
  ):
    for read in (decoding.check, lambda content, name: decoding.render(content, 8, name)):  # noqa: B023
      with pytest.raises(BadRecord, match=f'image fox.png has {message}'):
        read(png, 'fox.png')


def test_opaque_images_are_not_blended():
  """The shorter path for images without transparency gives the same pixels."""
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (9, 7, 4), np.uint8)
  for mode in ('RGB', 'L', 'P', 'CMYK', 'LA', 'RGBA'):
    content = _saved(Image.fromarray(pixels).convert(mode), 'TIFF')
    image = Image.open(io.BytesIO(content))
    blended = Image.alpha_composite(
      Image.new('RGBA', image.size, 'white'), image.convert('RGBA')
    ).convert('RGB')
    np.testing.assert_array_equal(transforms.read_image(io.BytesIO(content), 'x'), blended)
