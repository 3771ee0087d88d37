"""Frozen vision transformers whose patch features codecs/feature_vq.py quantizes.

`siglip` is trained by this library; `siglip2`, `dinov2` and `clip` are published. Each gives one
feature per patch, in raster order, without a class token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.codecs import pixels
from vpe_jax.config import base_section, check, check_sizes
from vpe_jax.contracts import Array, FrozenNetwork, Params, PretrainedWeights
from vpe_jax.models import clip, dinov2, shapes, siglip
from vpe_jax.models.vit import EncoderConfig

# Default weights of each tower: the shipped SigLIP, and published ones with the default sizes.
SOURCES = {
  'siglip': 'assets:siglip',
  'siglip2': 'google/siglip2-base-patch16-256',
  'dinov2': 'facebook/dinov2-base',
  'clip': 'openai/clip-vit-large-patch14',
}
ENCODERS = tuple(SOURCES)
_BASE = EncoderConfig(width=768, layers=12, heads=12, mlp=3072)


@dataclasses.dataclass(frozen=True)
class Siglip2Config(siglip.SiglipConfig):
  """Sizes of a published SigLIP 2; the defaults are those of the base model at 256 pixels."""

  image_size: int = 256
  patch: int = 16
  vocabulary: int = 256_000
  text_length: int = 64
  vision: EncoderConfig = _BASE
  text: EncoderConfig = _BASE


@dataclasses.dataclass(frozen=True)
class _View:
  """Size of a tower's input image, which may differ from `image_size`, the size in training.

  Attributes:
    view: side of the input image in pixels; if it differs, position embeddings are resampled.
  """

  view: int = 224


@dataclasses.dataclass(frozen=True)
class Dinov2View(_View, dinov2.Dinov2Config):
  """Sizes of a published DINOv2 and its input; the defaults are those of the base model."""

  image_size: int = 518
  patch: int = 14
  encoder: EncoderConfig = dataclasses.replace(_BASE, activation='gelu', layer_scale=True)


@dataclasses.dataclass(frozen=True)
class ClipView(_View, clip.ClipConfig):
  """Sizes of a published CLIP and its input; the defaults are those of OpenAI's L/14."""

  image_size: int = 224
  patch: int = 14
  vocabulary: int = 49_408
  text_length: int = 77
  end: int | None = None
  width: int = 768
  vision: EncoderConfig = EncoderConfig(1024, 24, 16, 4096, 1e-5, 'quick_gelu')
  text: EncoderConfig = EncoderConfig(768, 12, 12, 3072, 1e-5, 'quick_gelu')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
  """The tower, and the layer that gives the features.

  Attributes:
    encoder: one of ENCODERS.
    depth: n for the raw output of the first n layers, -1 for the usual features of a tower. Those
      of SigLIP and DINOv2 are the output of the last layer after the final norm (in SigLIP, the
      input of the pooling head). Those of CLIP are the raw output of the second-to-last layer,
      because the last one is trained for the class token only.
    siglip: sizes of the shipped SigLIP; used if `encoder` is `siglip`.
    siglip2: sizes of a published SigLIP 2; used if `encoder` is `siglip2`.
    dinov2: sizes of a published DINOv2; used if `encoder` is `dinov2`.
    clip: sizes of a published CLIP; used if `encoder` is `clip`.
  """

  encoder: str = 'siglip'
  depth: int = -1
  siglip: siglip.SiglipConfig = siglip.SiglipConfig()
  siglip2: Siglip2Config = Siglip2Config()
  dinov2: Dinov2View = Dinov2View()
  clip: ClipView = ClipView()

  def __post_init__(self) -> None:
    check_sizes(self)
    check(self, '', 'encoder', self.encoder in ENCODERS, f'one of {", ".join(ENCODERS)}')
    valid, layers = self.depth <= self.body.layers, self.body.layers
    check(self, '', 'depth', valid, f'at most the {layers} layers of encoder={self.encoder}')

  @property
  def sizes(self) -> Any:
    """The sizes of the selected tower."""
    return getattr(self, self.encoder)

  @property
  def body(self) -> EncoderConfig:
    """Sizes of the tower's transformer."""
    return self.sizes.encoder if self.encoder == 'dinov2' else self.sizes.vision

  @property
  def view_side(self) -> int:
    """Side of the tower's input image in pixels."""
    return self.sizes.view if self.encoder in ('dinov2', 'clip') else self.sizes.image_size

  @property
  def grid(self) -> int:
    """Features along each side of the image."""
    return self.view_side // self.sizes.patch

  @property
  def patches(self) -> int:
    """Features P per image."""
    return self.sizes.patches if self.encoder == 'siglip' else self.grid**2

  @property
  def has_text_tower(self) -> bool:
    """Whether captions, as this library's token ids, can be compared with the pooled features."""
    return self.encoder == 'siglip' and self.depth < 0

  @property
  def published(self) -> tuple[str, Any] | None:
    """Family (vpe_jax.checkpoints.families) and sizes of a published tower; None for `siglip`."""
    if self.encoder == 'siglip':
      return None
    base = {'siglip2': siglip.SiglipConfig, 'dinov2': dinov2.Dinov2Config, 'clip': clip.ClipConfig}
    family = 'siglip' if self.encoder == 'siglip2' else self.encoder
    return family, base_section(self.sizes, base[self.encoder])


def frozen(config: TowerConfig, weights: str, dtype: str) -> FrozenNetwork:
  """The tower as a frozen network.

  Args:
    config: the tower and its sizes.
    weights: source of the weights: `assets:NAME`, a path or a hub id; empty: the default in
      SOURCES.
    dtype: dtype in which the weights are loaded.
  """
  source = weights or SOURCES[config.encoder]
  if config.published is None:
    return FrozenNetwork(source, dtype=dtype)
  family, sizes = config.published
  return FrozenNetwork(source, PretrainedWeights(family, source, sizes), dtype)


@dataclasses.dataclass(frozen=True)
class Tower:
  """A tower network, and how to call it.

  Attributes:
    network: the module.
    side: side of the input image in pixels.
    normalize: maps pixels in [0, 1] to the module's input.
    first: index of the first patch among the module's tokens.
    depth: argument `depth` of the module's `features`.
    inputs: shapes of the arguments of the module's `__call__` after the images.
  """

  network: nn.Module
  side: int
  normalize: Callable[[Array], Array]
  first: int
  depth: int | None
  inputs: tuple[jax.ShapeDtypeStruct, ...]

  def features(self, params: Params, images: Array) -> Array:
    """Patch features [B, P, D] of images [B, R, R, 3], uint8 or float in [0, 1]."""
    inputs = self.normalize(pixels.view(images, self.side))
    features = self.network.apply({'params': params}, inputs, self.depth, method='features')
    return features[:, self.first :]

  def abstract_params(self) -> Params:
    """Shapes of the module's parameters."""
    return shapes.parameter_shapes(self.network, shapes.images(self.side), *self.inputs)


def tower(config: TowerConfig) -> Tower:
  """The tower of a config, in float32."""
  c, depth = config.sizes, None if config.depth < 0 else config.depth
  side = config.view_side
  if config.encoder == 'dinov2':
    return Tower(dinov2.Dinov2(c), side, dinov2.normalised, 1, depth, ())
  text = jax.ShapeDtypeStruct((1, c.text_length), jnp.int32)
  if config.encoder == 'clip':
    last = c.vision.layers - 1 if depth is None else depth
    return Tower(clip.Clip(c), side, clip.normalised, 1, last, (text,))
  inputs = (text, jax.ShapeDtypeStruct((1,), jnp.int32))
  return Tower(siglip.Siglip(c), side, pixels.to_signed, 0, depth, inputs)
