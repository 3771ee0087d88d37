"""Pictures into arrays: reading, and squares by white padding or by cropping."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vpe_jax.contracts import UserError

_BICUBIC = Image.Resampling.BICUBIC
# What is read, by content and whatever a file is called. Of Pillow's other readers one starts a
# program of its own (EPS), and the rest are for no pictures that data comes in.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF')


def read_image(file: str | Path | BinaryIO, name: str = '') -> np.ndarray:
  """Reads a picture as uint8 [height, width, 3], upright, transparency shown as white.

  Grey levels of 16 bits, or as fractions, are scaled to 8 bits.

  Args:
    file: path of the picture, or an open file.
    name: what an error calls it, if not by its path.

  Raises:
    UserError: there is no such file or it can't be read as a picture.
  """
  try:
    with Image.open(file, formats=FORMATS) as image:
      upright = ImageOps.exif_transpose(_eight_bit(image)).convert('RGBA')
  except MemoryError:
    raise
  except Exception as error:  # Decoders of broken files raise whatever they stumble over.
    raise _unreadable(name or file, error) from error
  ground = Image.new('RGBA', upright.size, 'white')
  return np.array(Image.alpha_composite(ground, upright).convert('RGB'))


def read_size(file: str | Path | BinaryIO, name: str = '') -> tuple[int, int]:
  """Width and height in pixels of a picture as it is seen, upright; reads no more than its head.

  Arguments as `read_image`.

  Raises:
    UserError: there is no such file or it can't be read as a picture.
  """
  try:
    with Image.open(file, formats=FORMATS) as image:
      turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
      width, height = image.size
  except MemoryError:
    raise
  except Exception as error:  # As above.
    raise _unreadable(name or file, error) from error
  return (height, width) if turned else (width, height)


def _unreadable(name: object, error: Exception) -> UserError:
  reason = error
  if isinstance(error, UnidentifiedImageError):
    reason = f'not one of {", ".join(FORMATS)}'
  return UserError(f'unreadable image {name} ({reason}); replace the file or leave it out')


def _eight_bit(image: Image.Image) -> Image.Image:
  """The picture with 8 bits a channel: Pillow itself cuts off what is above 255.

  Raises:
    ValueError: its numbers don't say which of them is white.
  """
  if image.mode != 'F' and not image.mode.startswith('I'):
    return image
  white = 1.0 if image.mode == 'F' else 65535.0
  levels = np.asarray(image, np.float64) / white
  if not (np.isfinite(levels).all() and 0 <= levels.min() and levels.max() <= 1):
    raise ValueError(f'its numbers go beyond 0 (black) to {white:g} (white)')
  grey = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
  grey.info = image.info  # says how it was held
  return grey


def to_square(image: np.ndarray, size: int, fit: str) -> np.ndarray:
  """A picture as a square, by `data.fit`: `pad_to_square` or `crop_to_square`."""
  return {'pad': pad_to_square, 'crop': crop_to_square}[fit](image, size)


def crop_to_square(image: np.ndarray, size: int) -> np.ndarray:
  """Scales the shorter side to `size` (bicubic) and takes the middle of the picture.

  An odd pixel more is left out at the right and the bottom. Arguments as `pad_to_square`.
  """
  height, width = image.shape[:2]
  shorter = min(height, width)
  shape = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
  scaled = np.array(Image.fromarray(image).resize(shape, _BICUBIC))
  left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
  return scaled[top : top + size, left : left + size]


def pad_to_square(image: np.ndarray, size: int) -> np.ndarray:
  """Scales the longer side to `size` (bicubic) and centres the picture on a white square.

  An odd pixel left over goes to the right and the bottom.

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
