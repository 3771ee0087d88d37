"""A picture as a grid of discrete codes: the embedded autoencoder's latents, vector-quantised.

Squares of `patch` x `patch` latents take the number of the nearest row of a codebook, and decoding
puts the rows in their place. The codebook is found by k-means, which the gradient of the distance
to the nearest row is a step of (vpe_jax.systems.tokenizers.codec).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp

from vpe_jax.codecs import codebook, kl
from vpe_jax.config import check_sizes
from vpe_jax.contracts import Array, FrozenNetwork, Params


@dataclasses.dataclass(frozen=True)
class ImageCodesConfig:
  """Sizes of the quantiser; the defaults are the embedded one's.

  Attributes:
    codes: rows V of the codebook.
    patch: side of the square of latents that one code stands for.
    temperature: of the soft choice that keeps every row in use while training.
  """

  codes: int = 1024
  patch: int = 1
  temperature: float = 0.1

  def __post_init__(self) -> None:
    check_sizes(self)


@dataclasses.dataclass(frozen=True)
class ImageCodesSection(ImageCodesConfig):
  """The config section of ImageCodesCodec; see protocol.ImageCodeSection.

  Attributes:
    kind: `image_codes`.
    weights: source of the codebook: `assets:NAME`, a path or the workdir of a run.
    autoencoder: sizes of the autoencoder whose latents are quantised.
    autoencoder_weights: source of its weights.
    weights_dtype: dtype of the loaded weights of both: float32 or bfloat16.
  """

  kind: str = 'image_codes'
  weights: str = 'assets:image_codes'
  autoencoder: kl.KlConfig = kl.KlConfig()
  autoencoder_weights: str = 'assets:image'
  weights_dtype: str = 'float32'

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """Autoencoder and codebook."""
    return {
      'image': FrozenNetwork(self.autoencoder_weights, dtype=self.weights_dtype),
      'image_codes': FrozenNetwork(self.weights, dtype=self.weights_dtype),
    }

  def codec(self, image_size: int) -> ImageCodesCodec:
    """The codec, in float32, for images of so many pixels a side."""
    return ImageCodesCodec(self, self.autoencoder, image_size)


class Quantised(NamedTuple):
  """Quantised squares of latents [B, P, W]."""

  codes: Array  # [B, P] int32
  chosen: Array  # [B, P, W]: the nearest rows
  probabilities: Array  # [B, P, V] float32: soft choice


class ImageCodesCodec:
  """A protocol.PictureCodec over the networks `image` and `image_codes`."""

  weights = ('image', 'image_codes')

  def __init__(self, config: ImageCodesConfig, image: kl.KlConfig, image_size: int):
    """Takes the sizes of the quantiser and of the autoencoder, and the picture's side in pixels."""
    self.config = config
    self.codes = config.codes
    self.grid = image_size // (kl.FACTOR * config.patch)
    self.width = config.patch**2 * image.channels
    self.latents = kl.KlCodec(image)

  def init(self, rng: Array) -> Params:
    """A fresh codebook: rows like the latents, which have mean 0 and variance 1."""
    return {'codebook': jax.random.normal(rng, (self.codes, self.width))}

  def squares(self, params: Params, images: Array) -> Array:
    """Squares of latents to quantise [B, P, W] of images [B, R, R, 3]; raster order."""
    latents = self.latents.encode(params, images)
    p = self.config.patch
    return einops.rearrange(latents, 'B (h p) (w q) C -> B (h w) (p q C)', p=p, q=p)

  def quantise(self, rows: Array, squares: Array) -> Quantised:
    """The nearest row of each square [B, P, W] among the rows [V, W]."""
    codes = codebook.closest(jax.lax.stop_gradient(squares), jax.lax.stop_gradient(rows))
    distance = jnp.sum(jnp.square(rows), -1) - 2 * jnp.einsum('BPW,VW->BPV', squares, rows)
    soft = jax.nn.softmax(-distance / self.config.temperature, -1)
    return Quantised(codes, jnp.take(rows, codes, axis=0), soft)

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32, raster order; see protocol.TokenCodec."""
    return codebook.closest(self.squares(params, images), params['image_codes']['codebook'])

  def decode(self, params: Params, codes: Array, rng: Array | None = None) -> Array:
    """Pictures [B, R, R, 3] float32 in [0, 1] of codes [B, P]; see protocol.PictureCodec."""
    rows = jnp.take(params['image_codes']['codebook'], codes, axis=0).astype(jnp.float32)
    p, side = self.config.patch, self.grid
    latents = einops.rearrange(rows, 'B (h w) (p q C) -> B (h p) (w q) C', h=side, w=side, p=p, q=p)
    return self.latents.decode(params, latents, rng)

  def abstract_params(self) -> Params:
    """Both networks' parameters as shapes; see protocol.TokenCodec."""
    own = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
    return {**self.latents.abstract_params(), 'image_codes': own}


def flops(config: ImageCodesConfig, image: kl.KlConfig, image_size: int) -> float:
  """Matrix FLOPs of the soft choice for one picture of a side in pixels."""
  squares = (image_size // (kl.FACTOR * config.patch)) ** 2
  return 2.0 * squares * config.patch**2 * image.channels * config.codes
