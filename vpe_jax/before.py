"""The pictures before an edit, as a generator's requests carry them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from vpe_jax.contracts import Edits, System, UserError, supports
from vpe_jax.data.transforms import to_square


@dataclasses.dataclass(frozen=True)
class Before:
  """Encoded entries of source images, and their name.

  Each entry is [N, ...], with N of 1 (one image for all requests) or the number of requests.
  """

  encoded: Mapping[str, np.ndarray]
  name: str


def squares(system: System, images: np.ndarray) -> np.ndarray:
  """Pictures before as the system's encoder takes them: uint8 [N, R, R, 3].

  Args:
    system: what draws.
    images: a picture uint8 [H, W, 3], or a stack of them [N, H, W, 3]; or one of PIL's in RGB.

  Raises:
    UserError: the system doesn't edit, or these are no pictures.
  """
  if not supports(system, Edits):
    raise UserError(
      'this model draws from words alone, and an image to edit was given: leave it out, or name a '
      'run of configs/edit.py'
    )
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise UserError(
      f'an image to edit has numbers of type {images.dtype}: uint8 from 0 to 255 is needed (of a '
      'picture that was drawn, its .image)'
    )
  if images.ndim not in (3, 4) or images.shape[-1] != 3 or not images.size:
    raise UserError(
      f'an image to edit has shape {images.shape}: [H, W, 3] is needed, or [N, H, W, 3] for N'
    )
  data = system.config.data
  stack = images if images.ndim == 4 else images[None]
  return np.stack([to_square(image, data.image_size, data.fit) for image in stack])


def for_rows(system: System, before: Before | None, count: int) -> dict[str, np.ndarray]:
  """Encoded entries for a request of so many rows; none for a system that doesn't edit.

  Raises:
    UserError: the system edits, and there is no picture, or another number of them than 1 and
      `count`.
  """
  if not supports(system, Edits):
    return {}
  if before is None:
    raise UserError(
      'this model edits, and the picture to edit is missing: give --image=FILE (in Python: '
      'generator.editing(image))'
    )
  given = len(next(iter(before.encoded.values())))
  if given not in (1, count):
    raise UserError(
      f'{given} pictures to edit and {count} to draw: give one for all, or one for each'
    )
  return {n: np.broadcast_to(leaf, (count, *leaf.shape[1:])) for n, leaf in before.encoded.items()}
