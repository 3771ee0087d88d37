"""Image files to square arrays: decoding, white padding, cropping."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vpe_jax.contracts import UserError

_BICUBIC = Image.Resampling.BICUBIC
# Decoders that may run, chosen by content and not by file name. Pillow's EPS decoder would start
# another program (Ghostscript); its other decoders are for formats that image data never has.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF')


def read_image(file: str | Path | BinaryIO, name: str = '') -> np.ndarray:
  """Decodes an image to uint8 [height, width, 3], upright, transparency shown as white.

  16-bit and floating-point grey levels are scaled to 8 bits.

  Args:
    file: path of the image, or an open file.
    name: name of the image in error messages; the default is its path.

  Raises:
    UserError: the file does not exist or is not a readable image.
  """
  try:
    with Image.open(file, formats=FORMATS) as image:
      upright = ImageOps.exif_transpose(_eight_bit(image)).convert('RGBA')
  except MemoryError:
    raise
  except Exception as error:  # Decoders raise errors of many types on broken files.
    raise _unreadable(name or file, error) from error
  background = Image.new('RGBA', upright.size, 'white')
  return np.array(Image.alpha_composite(background, upright).convert('RGB'))


def read_size(file: str | Path | BinaryIO, name: str = '') -> tuple[int, int]:
  """Width and height in pixels of the upright image; reads only the file header.

  Args:
    file: as in `read_image`.
    name: as in `read_image`.

  Raises:
    UserError: the file does not exist or is not a readable image.
  """
  try:
    with Image.open(file, formats=FORMATS) as image:
      is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
      width, height = image.size
  except MemoryError:
    raise
  except Exception as error:  # As in read_image.
    raise _unreadable(name or file, error) from error
  return (height, width) if is_rotated else (width, height)


def _unreadable(name: object, error: Exception) -> UserError:
  reason = error
  if isinstance(error, UnidentifiedImageError):
    reason = f'not one of {", ".join(FORMATS)}'
  return UserError(f'unreadable image {name} ({reason}); replace the file or leave it out')


def _eight_bit(image: Image.Image) -> Image.Image:
  """The image with 8 bits per channel; Pillow itself would clip levels above 255.

  Raises:
    ValueError: grey levels are outside the range of their type.
  """
  if image.mode != 'F' and not image.mode.startswith('I'):
    return image
  white = 1.0 if image.mode == 'F' else 65535.0
  levels = np.asarray(image, np.float64) / white
  if not (np.isfinite(levels).all() and 0 <= levels.min() and levels.max() <= 1):
    raise ValueError(f'its grey levels are outside 0 (black) to {white:g} (white)')
  grey = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
  grey.info = image.info  # holds the EXIF orientation
  return grey


def to_square(image: np.ndarray, size: int, fit: str) -> np.ndarray:
  """Applies `pad_to_square` or `crop_to_square`, by `fit` (`pad` or `crop`)."""
  return {'pad': pad_to_square, 'crop': crop_to_square}[fit](image, size)


def crop_to_square(image: np.ndarray, size: int) -> np.ndarray:
  """Scales the shorter side to `size` (bicubic) and crops the centre.

  If the number of excess pixels is odd, the right or bottom loses one more. Arguments and result as
  in `pad_to_square`.
  """
  height, width = image.shape[:2]
  shorter = min(height, width)
  shape = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
  scaled = np.array(Image.fromarray(image).resize(shape, _BICUBIC))
  left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
  return scaled[top : top + size, left : left + size]


def pad_to_square(image: np.ndarray, size: int) -> np.ndarray:
  """Scales the longer side to `size` (bicubic) and centres the image on a white square.

  If the number of padding pixels is odd, the right or bottom gets one more.

  Args:
    image: uint8 [height, width, 3].
    size: side of the square.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = image.shape[:2]
  longer = max(height, width)
  shape = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
  scaled = np.array(Image.fromarray(image).resize(shape, _BICUBIC))
  square = np.full((size, size, 3), 255, np.uint8)
  left, top = (size - shape[0]) // 2, (size - shape[1]) // 2
  square[top : top + shape[1], left : left + shape[0]] = scaled
  return square
