"""Pixel operations on the device: value ranges, resizing, and augmentation of encoder inputs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax import rng
from vpe_jax.config import check
from vpe_jax.contracts import Array


@dataclasses.dataclass(frozen=True)
class Jitter:
  """Random shift and zoom of images in training.

  Attributes:
    shift: maximum shift along each axis, as a fraction of the side.
    zoom: maximum relative change of size, up or down.
  """

  shift: float = 0.06
  zoom: float = 0.1

  def __post_init__(self) -> None:
    for name in ('shift', 'zoom'):
      check(self, '', name, 0 <= getattr(self, name) < 1, 'at least 0 and below 1')


def to_unit(images: Array) -> Array:
  """Converts uint8 images, or float images in [0, 1], to float32 in [0, 1]."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255.0
  return images.astype(jnp.float32)


def to_signed(images: Array) -> Array:
  """Maps [0, 1] to [-1, 1], the input range of most networks; white is 1."""
  return 2.0 * images - 1.0


def view(images: Array, size: int) -> Array:
  """Resizes square images to [B, size, size, 3] float32 in [0, 1].

  The resampling is antialiased and cubic, as Pillow's BICUBIC.

  Args:
    images: [B, R, R, 3], uint8 or float in [0, 1]; the pipeline has padded or cropped them to
      squares.
    size: side of the result in pixels.
  """
  images = to_unit(images)
  if images.shape[1:3] == (size, size):
    return images
  shape = (images.shape[0], size, size, images.shape[3])
  return jnp.clip(jax.image.resize(images, shape, 'cubic', antialias=True), 0.0, 1.0)


def padded_view(images: Array, size: int) -> Array:
  """Resizes images of any shape and centres them on white: [B, size, size, 3] float32 in [0, 1].

  The geometry is that of data/transforms.pad_to_square: the longer side becomes `size`. If the
  number of padding pixels is odd, the right or bottom gets one more.

  Args:
    images: [B, H, W, 3], uint8 or float in [0, 1].
    size: side of the square in pixels.
  """
  images = to_unit(images)
  batch, height, width, colours = images.shape
  longer = max(height, width)
  height, width = (max(1, round(side * size / longer)) for side in (height, width))
  if images.shape[1:3] != (height, width):
    shape = (batch, height, width, colours)
    images = jnp.clip(jax.image.resize(images, shape, 'cubic', antialias=True), 0.0, 1.0)
  top, left = (size - height) // 2, (size - width) // 2
  padding = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
  return jnp.pad(images, padding, constant_values=1.0)


def jittered_view(images: Array, size: int, jitter: Jitter, key: Array, example: Array) -> Array:
  """Resizes, shifts and zooms each image at random: [B, size, size, 3] float32 in [0, 1].

  The background is white. Images are never mirrored, because captions say left and right.

  Args:
    images: [B, R, R, 3], uint8 or float in [0, 1].
    size: side of the result in pixels.
    jitter: maximum shift and zoom.
    key: the run's key.
    example: example indices [B] int32.
  """
  sample = lambda k: jax.random.uniform(k, (3,), minval=-1.0, maxval=1.0)
  amounts = rng.per_example(sample, key, 'view', example)

  def transform(image: Array, amount: Array) -> Array:
    zoom = 1.0 + jitter.zoom * amount[0]
    offset = size * (0.5 * (1.0 - zoom) + jitter.shift * amount[1:])
    shape, ratio = (size, size, image.shape[-1]), size / image.shape[0]
    scale = jnp.full((2,), ratio * zoom)
    return jax.image.scale_and_translate(image, shape, (0, 1), scale, offset, 'cubic')

  # scale_and_translate pads with 0, which is white in inverted colours.
  return jnp.clip(1.0 - jax.vmap(transform)(1.0 - to_unit(images), amounts), 0.0, 1.0)


def translate(images: Array, down: int, right: int) -> Array:
  """Translates images [B, R, R, C] by whole pixels; pixels of the border are repeated."""
  reach = max(abs(down), abs(right))
  padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode='edge')
  top, left, side = reach - down, reach - right, images.shape[1]
  return padded[:, top : top + side, left : left + side]


def permute_channels(images: Array, key: Array, example: Array) -> Array:
  """Permutes the channels of each image [B, H, W, 3] at random; the order always changes."""
  permutations = jnp.asarray([[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
  sample = lambda k: jax.random.randint(k, (), 0, len(permutations))
  order = permutations[rng.per_example(sample, key, 'channels', example)]
  return jnp.take_along_axis(images, order[:, None, None], axis=-1)


def random_crops(images: Array, size: int, key: Array, example: Array) -> Array:
  """Crops a square of side `size` from each image [B, R, R, C], at a random position."""
  positions = images.shape[1] - size + 1
  sample = lambda k: jax.random.randint(k, (2,), 0, positions)
  corners = rng.per_example(sample, key, 'crop', example)
  shape = (size, size, images.shape[3])
  crop = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)
  return jax.vmap(crop)(images, corners)
