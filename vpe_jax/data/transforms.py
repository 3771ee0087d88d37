"""Image files to square arrays: limits, decoding, white padding, cropping."""

from __future__ import annotations

import dataclasses
import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vpe_jax.config import DataConfig
from vpe_jax.data.records import BadRecord

_BICUBIC = Image.Resampling.BICUBIC
# Decoders that may run, chosen by content and not by file name. Pillow's EPS decoder would start
# another program (Ghostscript); its other decoders are for formats that image data never has.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF')
# A JPEG whose side is at least twice this multiple of the requested one is decoded at 1/2, 1/4 or
# 1/8 of its size, which remains at least this multiple. Pillow's documentation calls the result of
# a gap of 3 nearly indistinguishable.
REDUCING_GAP = 3

# Pillow warns of sizes that it takes for attacks; `Decoding` has a limit.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How the image files of a data set become arrays; fields of the data section of a config.

  Attributes:
    fit: `pad` or `crop`; see data.fit.
    most_pixels: see data.most_pixels.
    most_bytes: see data.most_bytes.
  """

  fit: str = DataConfig.fit
  most_pixels: int = DataConfig.most_pixels
  most_bytes: int = DataConfig.most_bytes

  @classmethod
  def of(cls, config: DataConfig) -> Decoding:
    """The decoding that a config names."""
    return cls(config.fit, config.most_pixels, config.most_bytes)

  def render(self, content: bytes, size: int, name: str) -> np.ndarray:
    """Decodes an image file to a square.

    Args:
      content: bytes of the file.
      size: side of the square, in pixels.
      name: name of the image in error messages.

    Returns:
      uint8 [size, size, 3]; see `to_square`.

    Raises:
      BadRecord: the content is not a readable image, or exceeds a limit.
    """
    self.check_bytes(len(content), name)
    image = _decode(io.BytesIO(content), name, self.most_pixels, (size, self.fit))
    return to_square(image, size, self.fit)

  def check(self, content: bytes, name: str) -> None:
    """Raises BadRecord where `render` would, at any size; large JPEGs are decoded reduced."""
    self.check_bytes(len(content), name)
    _decode(io.BytesIO(content), name, self.most_pixels, (1, self.fit))

  def check_bytes(self, count: int, name: str) -> None:
    """Raises BadRecord if an image file has more bytes than `most_bytes`."""
    if count > self.most_bytes:
      raise BadRecord(
        f'image {name} has {count:,} bytes, more than most_bytes={self.most_bytes:,}: '
        'make it smaller, or raise the limit'
      )


DECODING = Decoding()  # the defaults of a config


def read_image(file: str | Path | BinaryIO, name: str = '') -> np.ndarray:
  """Decodes an image to uint8 [height, width, 3], upright, transparency shown as white.

  16-bit and floating-point grey levels are scaled to 8 bits.

  Args:
    file: path of the image, or an open file.
    name: name of the image in error messages; the default is its path.

  Raises:
    BadRecord: the file does not exist, is not a readable image, or has too many pixels.
  """
  return _decode(file, name or str(file), DataConfig.most_pixels)


def _decode(
  file: str | Path | BinaryIO, name: str, most_pixels: int, target: tuple[int, str] | None = None
) -> np.ndarray:
  """As `read_image`; large JPEGs are reduced if `target` is the (side, fit) of the square."""
  try:
    with Image.open(file, formats=FORMATS) as image:
      if image.width * image.height > most_pixels:
        raise _TooLarge(
          f'image {name} has {image.width:,} x {image.height:,} pixels, more than '
          f'most_pixels={most_pixels:,}: make it smaller, or raise the limit'
        )
      if target is not None:
        _reduce(image, *target)
      upright = ImageOps.exif_transpose(_eight_bit(image))
      if not upright.has_transparency_data:
        return np.array(upright.convert('RGB'))
      upright = upright.convert('RGBA')
  except (MemoryError, _TooLarge):
    raise
  except Exception as error:  # Decoders raise errors of many types on broken files.
    raise _unreadable(name, error) from error
  background = Image.new('RGBA', upright.size, 'white')
  return np.array(Image.alpha_composite(background, upright).convert('RGB'))


class _TooLarge(BadRecord):
  """An image has too many pixels."""


def _reduce(image: Image.Image, size: int, fit: str) -> None:
  """Lets a JPEG decode at a fraction of its size; other formats ignore it."""
  side = (max if fit == 'pad' else min)(image.size)
  scale = side // (REDUCING_GAP * size)
  if scale >= 2:
    image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def read_size(file: str | Path | BinaryIO, name: str = '') -> tuple[int, int]:
  """Width and height in pixels of the upright image; reads only the file header.

  Args:
    file: as in `read_image`.
    name: as in `read_image`.

  Raises:
    BadRecord: the file does not exist or is not a readable image.
  """
  try:
    with Image.open(file, formats=FORMATS) as image:
      is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
      width, height = image.size
  except MemoryError:
    raise
  except Exception as error:  # As in read_image.
    raise _unreadable(name or str(file), error) from error
  return (height, width) if is_rotated else (width, height)


def _unreadable(name: str, error: Exception) -> BadRecord:
  reason = error
  if isinstance(error, UnidentifiedImageError):
    reason = f'not one of {", ".join(FORMATS)}'
  return BadRecord(f'unreadable image {name} ({reason}); replace the file or leave it out')


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
