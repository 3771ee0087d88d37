"""DINOv2: an image encoder trained without captions.

DINOv2: Learning Robust Visual Features without Supervision (arXiv 2304.07193), laid out as
transformers' Dinov2Model, with which it agrees in float32 at any resolution.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vpe_jax.config import check_sizes
from vpe_jax.contracts import Array
from vpe_jax.models.vit import ClassTokens, Encoder, EncoderConfig

MEAN = (0.485, 0.456, 0.406)  # per channel, of ImageNet's pixels
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
  """Sizes of the encoder.

  Attributes:
    image_size: side in pixels of the images that the position table was trained on. The remainder
      of a division by `patch` is ignored.
    patch: side of a patch in pixels.
    encoder: the layers.
  """

  image_size: int
  patch: int
  encoder: EncoderConfig

  def __post_init__(self) -> None:
    check_sizes(self)


def normalised(images: Array) -> Array:
  """Normalizes images [..., 3] in [0, 1] with MEAN and STD, as input of the encoder."""
  return (images.astype(jnp.float32) - jnp.asarray(MEAN)) / jnp.asarray(STD)


class Dinov2(nn.Module):
  """Images [B, H, W, 3] from `normalised` -> tokens [B, 1 + P, D] and image vectors [B, D]."""

  config: Dinov2Config
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    c = self.config
    width, side = c.encoder.width, c.image_size // c.patch
    self.tokens = ClassTokens(width, c.patch, side, use_bias=True, dtype=self.dtype)
    self.encoder = Encoder(c.encoder, self.dtype)

  def features(self, images: Array, depth: int | None = None) -> Array:
    """The class token, then patches in raster order [B, 1 + P, D].

    `depth` None: after the final norm (transformers' last hidden state); else the raw output of the
    first `depth` layers. Sides of the images may differ from `image_size`.
    """
    return self.encoder(self.tokens(images), depth=depth)

  def __call__(self, images: Array) -> Array:
    """The class token [B, D] after the final norm."""
    return self.features(images)[:, 0]
