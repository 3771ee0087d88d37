"""SigLIP: an image tower and a text tower whose embeddings agree for an image and its caption.

Sigmoid Loss for Language Image Pre-Training (arXiv 2303.15343), laid out as transformers'
SiglipModel, with which it agrees in float32.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vpe_jax.config import check, check_sizes
from vpe_jax.contracts import Array
from vpe_jax.models.dense import Dense
from vpe_jax.models.vit import AttentionPool, Encoder, EncoderConfig, patches


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
  """Sizes of both towers; the defaults are those of the shipped SigLIP.

  Attributes:
    image_size: side of the image tower's input in pixels, a multiple of `patch`.
    patch: side of a patch in pixels.
    vocabulary: entries of the token table.
    text_length: tokens of a caption, padding included.
    vision: the image tower.
    text: the text tower; its last dense layer maps to the width of the image tower.
  """

  image_size: int = 48
  patch: int = 8
  vocabulary: int = 1024
  text_length: int = 32
  vision: EncoderConfig = EncoderConfig(width=160, layers=4, heads=4, mlp=480)
  text: EncoderConfig = EncoderConfig(width=128, layers=3, heads=4, mlp=384)

  def __post_init__(self) -> None:
    check_sizes(self)
    divides = self.image_size % self.patch == 0
    check(self, '', 'image_size', divides, f'a multiple of patch={self.patch}')

  @property
  def patches(self) -> int:
    """Patches P of one image."""
    return (self.image_size // self.patch) ** 2


class VisionTower(nn.Module):
  """Images [B, H, W, 3] in [-1, 1] -> patch features [B, P, D] and image vectors [B, D]."""

  config: SiglipConfig
  dtype: jnp.dtype

  def setup(self) -> None:
    c = self.config
    self.embed = Dense(c.vision.width, dtype=self.dtype)
    near = nn.initializers.normal(c.vision.width**-0.5)
    self.position = self.param('position', near, (c.patches, c.vision.width))
    self.encoder = Encoder(c.vision, self.dtype)
    self.pooling = AttentionPool(c.vision, self.dtype)

  def features(self, images: Array, depth: int | None = None) -> Array:
    """Patch features [B, P, D] in raster order.

    Args:
      images: [B, H, W, 3] in [-1, 1].
      depth: None for the normed output that the pooling head reads (SigLIP's last hidden state);
        n for the raw output of the first n layers (X-Omni's tokenizer: of all layers).
    """
    x = self.embed(patches(images.astype(self.dtype), self.config.patch))
    return self.encoder(x + self.position.astype(self.dtype), depth=depth)

  def pool(self, features: Array) -> Array:
    """The image's vector [B, D] from the normed patch features [B, P, D]."""
    return self.pooling(features)

  def __call__(self, images: Array) -> Array:
    return self.pool(self.features(images))


class TextTower(nn.Module):
  """Caption tokens [B, T] -> token features [B, T, D] and caption vectors [B, vision width].

  Tokens from `length` on are padding: no token attends to them, and the vector is read at the last
  token before them. The published SigLIP attends to its padding: pass `length = T` for it.
  """

  config: SiglipConfig
  dtype: jnp.dtype

  def setup(self) -> None:
    c = self.config
    self.token = self.param('token', nn.initializers.normal(0.02), (c.vocabulary, c.text.width))
    near = nn.initializers.normal(0.02)
    self.position = self.param('position', near, (c.text_length, c.text.width))
    self.encoder = Encoder(c.text, self.dtype)
    self.head = Dense(c.vision.width, dtype=self.dtype)

  def features(self, text: Array, length: Array) -> Array:
    """Normed token features [B, T, D] of captions [B, T] with `length` [B] tokens."""
    T = text.shape[1]
    x = jnp.take(self.token, text, axis=0).astype(jnp.float32) + self.position[:T]
    return self.encoder(x.astype(self.dtype), jnp.arange(T) < length[:, None])

  def __call__(self, text: Array, length: Array) -> Array:
    features = self.features(text, length)
    last = jnp.maximum(length - 1, 0)[:, None, None]
    return self.head(jnp.take_along_axis(features, last, axis=1)[:, 0])


class Siglip(nn.Module):
  """Both towers, and the scale and bias that turn cosines into logits."""

  config: SiglipConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    self.vision = VisionTower(self.config, self.dtype)
    self.text = TextTower(self.config, self.dtype)
    # Initial values of the paper's section 3.2: most pairs of a batch are negatives.
    self.logit_scale = self.param('logit_scale', nn.initializers.constant(jnp.log(10.0)), ())
    self.logit_bias = self.param('logit_bias', nn.initializers.constant(-10.0), ())

  def features(self, images: Array, depth: int | None = None) -> Array:
    """Patch features [B, P, D]; see VisionTower.features."""
    return self.vision.features(images, depth)

  def pool(self, features: Array) -> Array:
    """Unit vectors [B, D] float32 from normed patch features [B, P, D]."""
    return unit(self.vision.pool(features))

  def embed_images(self, images: Array) -> Array:
    """Unit vectors [B, D] float32 of images [B, H, W, 3] in [-1, 1]."""
    return unit(self.vision(images))

  def embed_text(self, text: Array, length: Array) -> Array:
    """Unit vectors [B, D] float32 of captions [B, T] with `length` [B] tokens."""
    return unit(self.text(text, length))

  def logits(self, image: Array, text: Array) -> Array:
    """Logits [B, V] of every image [B, D] with every one of V captions [V, D]; unit vectors."""
    return self._scaled(jnp.einsum('BD,VD->BV', image, text))

  def own_logits(self, image: Array, text: Array) -> Array:
    """Logits [B, M] of each image [B, D] with M captions of its own [B, M, D]; unit vectors."""
    return self._scaled(jnp.einsum('BD,BMD->BM', image, text))

  def _scaled(self, cosine: Array) -> Array:
    return cosine * jnp.exp(self.logit_scale) + self.logit_bias

  def __call__(self, images: Array, text: Array, length: Array) -> Array:
    return self.logits(self.embed_images(images), self.embed_text(text, length))


def unit(x: Array) -> Array:
  """x / |x| over the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
