"""CLIP: an image tower and a text tower whose embeddings agree for an image and its caption.

Learning Transferable Visual Models From Natural Language Supervision (arXiv 2103.00020), laid out
as transformers' CLIPModel, with which it agrees in float32.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vpe_jax.config import check_sizes
from vpe_jax.contracts import Array
from vpe_jax.models.dense import Dense
from vpe_jax.models.siglip import unit
from vpe_jax.models.vit import ClassTokens, Encoder, EncoderConfig, LayerNorm

MEAN = (0.48145466, 0.4578275, 0.40821073)  # per channel, of the pixels of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """Sizes of both towers.

  Attributes:
    image_size: side in pixels of the images that the position table was trained on. The remainder
      of a division by `patch` is ignored.
    patch: side of a patch in pixels.
    vocabulary: entries of the token table.
    text_length: maximum number of tokens of a caption.
    end: id of the token that ends a caption; None: the largest id in the caption
      (OpenAI's releases).
    width: width of the image and caption embeddings.
    vision: the image tower.
    text: the text tower.
  """

  image_size: int
  patch: int
  vocabulary: int
  text_length: int
  end: int | None
  width: int
  vision: EncoderConfig
  text: EncoderConfig

  def __post_init__(self) -> None:
    check_sizes(self, end=0)


def normalised(images: Array) -> Array:
  """Normalizes images [..., 3] in [0, 1] with MEAN and STD, as input of the image tower."""
  return (images.astype(jnp.float32) - jnp.asarray(MEAN)) / jnp.asarray(STD)


def at_end(text: Array, features: Array, end: int | None) -> Array:
  """Picks features [B, D] of the first end token of each caption; without one, of token 0.

  Args:
    text: captions [B, T].
    features: features of all tokens [B, T, D].
    end: id of the end token; None: the largest id in the caption.
  """
  last = jnp.argmax(text if end is None else text == end, axis=1)
  return jnp.take_along_axis(features, last[:, None, None], axis=1)[:, 0]


class VisionTower(nn.Module):
  """Images [B, H, W, 3] from `normalised` -> tokens [B, 1 + P, D] and embeddings [B, width]."""

  config: ClipConfig
  dtype: jnp.dtype

  def setup(self) -> None:
    c = self.config
    side = c.image_size // c.patch
    self.tokens = ClassTokens(c.vision.width, c.patch, side, use_bias=False, dtype=self.dtype)
    self.entry_norm = LayerNorm(c.vision.eps)
    self.encoder = Encoder(c.vision, self.dtype)
    self.projection = Dense(c.width, use_bias=False, dtype=self.dtype)

  def features(self, images: Array, depth: int | None = None) -> Array:
    """The class token, then patches in raster order [B, 1 + P, D]: raw output of `depth` layers.

    `depth` None: all layers, as transformers' last hidden state, which has no final norm.
    """
    x = self.entry_norm(self.tokens(images))
    return self.encoder(x, depth=self.config.vision.layers if depth is None else depth)

  def pool(self, features: Array) -> Array:
    """The class token [B, D] after the final norm, from the last layer's features [B, 1 + P, D]."""
    return self.encoder.norm(features[:, 0])

  def __call__(self, images: Array) -> Array:
    return self.projection(self.pool(self.features(images)))


class TextTower(nn.Module):
  """Captions [B, T] -> token features [B, T, D] and embeddings [B, width].

  Padding has no effect: attention is causal, and the embedding is read at the first end token.
  """

  config: ClipConfig
  dtype: jnp.dtype

  def setup(self) -> None:
    c = self.config
    normal = nn.initializers.normal(0.02)
    self.token = self.param('token', normal, (c.vocabulary, c.text.width))
    self.position = self.param('position', normal, (c.text_length, c.text.width))
    self.encoder = Encoder(c.text, self.dtype)
    self.projection = Dense(c.width, use_bias=False, dtype=self.dtype)

  def features(self, text: Array, depth: int | None = None) -> Array:
    """Normed token features [B, T, D] of captions [B, T], or raw ones after `depth` layers."""
    T = text.shape[1]
    x = jnp.take(self.token, text, axis=0).astype(jnp.float32) + self.position[:T]
    return self.encoder(x.astype(self.dtype), jnp.tri(T, dtype=bool)[None], depth)

  def __call__(self, text: Array) -> Array:
    return self.projection(at_end(text, self.features(text), self.config.end))


class Clip(nn.Module):
  """Both towers, and the scale that turns cosines into logits."""

  config: ClipConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    self.vision = VisionTower(self.config, self.dtype)
    self.text = TextTower(self.config, self.dtype)
    # Section 2.5 of the paper: a temperature of 0.07.
    self.logit_scale = self.param('logit_scale', nn.initializers.constant(jnp.log(1 / 0.07)), ())

  def features(self, images: Array, depth: int | None = None) -> Array:
    """The class token and patches [B, 1 + P, D]; see VisionTower.features."""
    return self.vision.features(images, depth)

  def text_features(self, text: Array, depth: int | None = None) -> Array:
    """Token features [B, T, D]; see TextTower.features."""
    return self.text.features(text, depth)

  def embed_images(self, images: Array) -> Array:
    """Unit vectors [B, width] float32 of images [B, H, W, 3] from `normalised`."""
    return unit(self.vision(images))

  def embed_text(self, text: Array) -> Array:
    """Unit vectors [B, width] float32 of captions [B, T]."""
    return unit(self.text(text))

  def __call__(self, images: Array, text: Array) -> Array:
    """Logits [B, V] of B images [B, H, W, 3] from `normalised` with V captions [V, T]."""
    cosine = jnp.einsum('BD,VD->BV', self.embed_images(images), self.embed_text(text))
    return cosine * jnp.exp(self.logit_scale)
