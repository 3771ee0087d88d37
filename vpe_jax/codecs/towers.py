"""The frozen image towers whose patch features a visual prompt quantises (VPE, Appendix F).

`siglip` is the one that this library trains; `siglip2`, `dinov2` and `clip` are published. Each
gives one feature a patch, in raster order, without a class token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vpe_jax.codecs import pixels
from vpe_jax.config import base_section, check, check_sizes
from vpe_jax.contracts import Array, FrozenNetwork, Params, PretrainedWeights
from vpe_jax.models import clip, dinov2, siglip
from vpe_jax.models.vit import EncoderConfig, forward_flops

# Default weights of each tower: the shipped SigLIP, and the releases that have the default sizes.
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
  """Size of a tower's input image, where it may differ from training.

  Attributes:
    view: side of the view in pixels; positions are resampled where it isn't `image_size`.
  """

  view: int = 224


@dataclasses.dataclass(frozen=True)
class Dinov2View(_View, dinov2.Dinov2Config):
  """Sizes of a published DINOv2 (the base model's), and of its view."""

  image_size: int = 518
  patch: int = 14
  encoder: EncoderConfig = dataclasses.replace(_BASE, activation='gelu', layer_scale=True)


@dataclasses.dataclass(frozen=True)
class ClipView(_View, clip.ClipConfig):
  """Sizes of a published CLIP (OpenAI's L/14), and of its view."""

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
  """Which tower, and which of its features.

  Attributes:
    encoder: one of ENCODERS.
    depth: layers of the tower whose raw output is quantised; -1 for the tower's own: the normed
      last output of SigLIP (which its pooling head reads) and DINOv2, and the last but one of CLIP,
      whose last layer serves the class token alone.
    siglip: sizes of the embedded SigLIP.
    siglip2: sizes of a published SigLIP 2; like those below, read if `encoder` says so.
    dinov2: sizes of a published DINOv2.
    clip: sizes of a published CLIP.
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
    good, layers = self.depth <= self.body.layers, self.body.layers
    check(self, '', 'depth', good, f'at most the {layers} layers of encoder={self.encoder}')

  @property
  def sizes(self) -> Any:
    """The section of the tower."""
    return getattr(self, self.encoder)

  @property
  def body(self) -> EncoderConfig:
    """The tower's layers."""
    return self.sizes.encoder if self.encoder == 'dinov2' else self.sizes.vision

  @property
  def grid(self) -> int:
    """Features along each side of the picture."""
    return getattr(self.sizes, 'view', self.sizes.image_size) // self.sizes.patch

  @property
  def patches(self) -> int:
    """Features P of a picture."""
    return self.sizes.patches if self.encoder == 'siglip' else self.grid**2

  @property
  def compares(self) -> bool:
    """Whether the features can be compared with our captions: the tower was trained on them."""
    return self.encoder == 'siglip' and self.depth < 0

  @property
  def published(self) -> tuple[str, Any] | None:
    """Family and sizes of a published tower (vpe_jax.checkpoints.families)."""
    if self.encoder == 'siglip':
      return None
    base = {'siglip2': siglip.SiglipConfig, 'dinov2': dinov2.Dinov2Config, 'clip': clip.ClipConfig}
    family = 'siglip' if self.encoder == 'siglip2' else self.encoder
    return family, base_section(self.sizes, base[self.encoder])


def frozen(config: TowerConfig, weights: str, dtype: str) -> FrozenNetwork:
  """The tower as a frozen network.

  Args:
    config: the tower and its sizes.
    weights: their source: `assets:NAME`, a path or a hub id; empty: that in SOURCES.
    dtype: of the loaded weights.
  """
  source = weights or SOURCES[config.encoder]
  if config.published is None:
    return FrozenNetwork(source, dtype=dtype)
  family, sizes = config.published
  return FrozenNetwork(source, PretrainedWeights(family, source, sizes), dtype)


@dataclasses.dataclass(frozen=True)
class Tower:
  """A tower, and how it is called.

  Attributes:
    network: its module.
    side: of the view in pixels.
    normalise: brings pixels in [0, 1] to what the module reads.
    first: where the patches begin among its tokens.
    depth: what the module's `features` is asked for.
    inputs: further arguments of the module's `init`, after pictures.
  """

  network: nn.Module
  side: int
  normalise: Callable[[Array], Array]
  first: int
  depth: int | None
  inputs: tuple[Array, ...]

  def features(self, params: Params, images: Array) -> Array:
    """Patch features [B, P, D] of pictures [B, R, R, 3], uint8 or float in [0, 1]."""
    seen = self.normalise(pixels.view(images, self.side))
    found = self.network.apply({'params': params}, seen, self.depth, method='features')
    return found[:, self.first :]

  def init(self, rng: Array) -> Params:
    """Fresh parameters."""
    images = jnp.zeros((1, self.side, self.side, 3))
    return self.network.init(rng, images, *self.inputs)['params']


def tower(config: TowerConfig) -> Tower:
  """The tower of a config, in float32."""
  c, depth = config.sizes, None if config.depth < 0 else config.depth
  side = getattr(c, 'view', c.image_size)
  if config.encoder == 'dinov2':
    return Tower(dinov2.Dinov2(c), side, dinov2.normalised, 1, depth, ())
  text = jnp.zeros((1, c.text_length), jnp.int32)
  if config.encoder == 'clip':
    last = c.vision.layers - 1 if depth is None else depth
    return Tower(clip.Clip(c), side, clip.normalised, 1, last, (text,))
  given = (text, jnp.ones((1,), jnp.int32))
  return Tower(siglip.Siglip(c), side, pixels.to_signed, 0, depth, given)


def flops(config: TowerConfig) -> float:
  """Matrix FLOPs of one picture's features; of `siglip`, whose pooling is read too, of all."""
  if config.encoder == 'siglip':
    return siglip.flops(config.siglip)
  body, patch = config.body, config.sizes.patch
  layers = body.layers if config.depth < 0 else config.depth
  if config.encoder == 'clip' and config.depth < 0:
    layers -= 1
  tokens = config.patches + (config.encoder != 'siglip2')
  embedding = 2.0 * config.patches * patch**2 * 3 * body.width
  return embedding + layers * forward_flops(dataclasses.replace(body, layers=1), tokens)
