"""Pixels on the device: value ranges, and the smaller view that an encoder sees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax import rng
from vpe_jax.contracts import Array


@dataclasses.dataclass(frozen=True)
class Jitter:
  """How far a view may stray from the picture while an encoder trains.

  Attributes:
    shift: largest move along each axis, as a share of the side.
    zoom: largest relative change of size, up or down.
  """

  shift: float = 0.06
  zoom: float = 0.1


def to_unit(images: Array) -> Array:
  """Float32 pictures in [0, 1] from uint8 ones, or from floats that are in [0, 1] already."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255.0
  return images.astype(jnp.float32)


def to_signed(images: Array) -> Array:
  """[0, 1] -> [-1, 1], the range that networks see; white is 1."""
  return 2.0 * images - 1.0


def view(images: Array, size: int) -> Array:
  """The whole picture at another size: antialiased cubic, as Pillow's BICUBIC, in [0, 1].

  Args:
    images: [B, R, R, 3], uint8 or float in [0, 1]. The pipeline has padded them to squares with
      white, so the view has the same geometry and grids of picture and view stay aligned.
    size: side of the view in pixels.
  """
  images = to_unit(images)
  if images.shape[1:3] == (size, size):
    return images
  shape = (images.shape[0], size, size, images.shape[3])
  return jnp.clip(jax.image.resize(images, shape, 'cubic', antialias=True), 0.0, 1.0)


def padded_view(images: Array, size: int) -> Array:
  """The whole picture of any shape, centred on a white square of side `size`, in [0, 1].

  The geometry of data/transforms.pad_to_square: the longer side becomes `size`, an odd pixel left
  over goes to the right and the bottom.

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
  around = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
  return jnp.pad(images, around, constant_values=1.0)


def jittered_view(images: Array, size: int, jitter: Jitter, key: Array, example: Array) -> Array:
  """A view that is moved and zoomed at random on white ground, by one draw per example.

  Mirroring is left out on purpose: captions say left and right.

  Args:
    images: [B, R, R, 3], uint8 or float in [0, 1].
    size: side of the view in pixels.
    jitter: how far.
    key: the run's key.
    example: [B] int32, places in the data stream.
  """
  draw = lambda k: jax.random.uniform(k, (3,), minval=-1.0, maxval=1.0)
  draws = rng.per_example(draw, key, 'view', example)

  def one(picture: Array, amount: Array) -> Array:
    zoom = 1.0 + jitter.zoom * amount[0]
    offset = size * (0.5 * (1.0 - zoom) + jitter.shift * amount[1:])
    shape, ratio = (size, size, picture.shape[-1]), size / picture.shape[0]
    scale = jnp.full((2,), ratio * zoom)
    return jax.image.scale_and_translate(picture, shape, (0, 1), scale, offset, 'cubic')

  # Outside of the picture the resampler reads 0: inverted colours make that white.
  return jnp.clip(1.0 - jax.vmap(one)(1.0 - to_unit(images), draws), 0.0, 1.0)


def moved(images: Array, down: int, right: int) -> Array:
  """Pictures [B, R, R, C] moved by whole pixels; what comes into view repeats the border."""
  reach = max(abs(down), abs(right))
  padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode='edge')
  top, left, side = reach - down, reach - right, images.shape[1]
  return padded[:, top : top + side, left : left + side]


def exchanged_channels(images: Array, key: Array, example: Array) -> Array:
  """Pictures [B, H, W, 3] whose red, green and blue change places, one order per example."""
  orders = jnp.asarray([[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
  draw = lambda k: jax.random.randint(k, (), 0, len(orders))
  chosen = orders[rng.per_example(draw, key, 'channels', example)]
  return jnp.take_along_axis(images, chosen[:, None, None], axis=-1)


def random_crops(images: Array, size: int, key: Array, example: Array) -> Array:
  """A square of side `size` from each picture [B, R, R, C], at a place drawn per example."""
  room = images.shape[1] - size + 1
  draw = lambda k: jax.random.randint(k, (2,), 0, room)
  corners = rng.per_example(draw, key, 'crop', example)
  shape = (size, size, images.shape[3])
  cut = lambda picture, at: jax.lax.dynamic_slice(picture, (at[0], at[1], 0), shape)
  return jax.vmap(cut)(images, corners)
