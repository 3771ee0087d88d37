"""The picture before an edit, as a generator's requests carry it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from vpe_jax.checkpoints import weights
from vpe_jax.contracts import Params, UserError
from vpe_jax.data.transforms import to_square


@dataclasses.dataclass(frozen=True)
class Before:
  """Its latents [1, h, w, C], and a name for them."""

  latents: np.ndarray
  name: str


def read(system: Any, frozen: Params, image: np.ndarray) -> Before:
  """Makes a picture uint8 [H, W, 3] what the system's model sees, as in training.

  Raises:
    UserError: the system doesn't edit.
  """
  if not hasattr(system, 'encode_reference'):
    raise UserError(
      'this model draws from words alone, and an image to edit was given: leave it out, or name a '
      'run of configs/edit.py'
    )
  data = system.config.data
  square = to_square(image, data.image_size, data.fit)
  latents = jax.device_get(jax.jit(system.encode_reference)(frozen, square[None]))
  return Before(latents, weights.fingerprint({'before': latents}))


def for_rows(system: Any, before: Before | None, count: int) -> np.ndarray | None:
  """Its latents for a request of so many rows; None for a system that doesn't edit.

  Raises:
    UserError: the system edits, and there is no picture.
  """
  if not hasattr(system, 'encode_reference'):
    return None
  if before is None:
    raise UserError(
      'this model edits, and the picture to edit is missing: give --image=FILE (in Python: '
      'generator.editing(image))'
    )
  return np.repeat(before.latents, count, axis=0)
