"""An image as a grid of discrete codes: vector-quantized latents of the autoencoder in kl.py.

Each patch of `patch` x `patch` latents is replaced by the nearest entry of a codebook. The codebook
is trained as in k-means: gradient steps on the distance move each entry towards the mean of its
patches (vpe_jax.systems.tokenizers.codec).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp

from vpe_jax.codecs import codebook, kl
from vpe_jax.config import check_positive, check_sizes
from vpe_jax.contracts import Array, FrozenNetwork, Params, UserError


@dataclasses.dataclass(frozen=True)
class ImageCodesConfig:
  """Sizes of the quantizer; the defaults are those of the shipped weights.

  Attributes:
    codes: number V of codebook entries.
    patch: side of the square of latents that one code represents.
    temperature: temperature of the soft assignment, whose entropy loss keeps all codes in use.
  """

  codes: int = 1024
  patch: int = 1
  temperature: float = 0.1

  def __post_init__(self) -> None:
    check_sizes(self)
    check_positive(self, '', 'temperature')


@dataclasses.dataclass(frozen=True)
class ImageCodesSection(ImageCodesConfig):
  """The config section of ImageCodesCodec; see protocol.ImageCodeSection.

  Attributes:
    kind: `image_codes`.
    weights: source of the codebook: `assets:NAME`, a path or the workdir of a run.
    autoencoder: sizes of the autoencoder whose latents are quantized.
    autoencoder_weights: source of the autoencoder's weights.
    weights_dtype: dtype in which codebook and autoencoder are loaded: float32 or bfloat16.
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
    """The codec, in float32, for images with a side of `image_size` pixels.

    Raises:
      UserError: codes don't cover the side.
    """
    check_side(image_size, kl.FACTOR * self.patch)
    return ImageCodesCodec(self, self.autoencoder, image_size)


def check_side(image_size: int, unit: int) -> None:
  """Checks the side of images, which must be a multiple of `unit` pixels.

  Raises:
    UserError: it isn't.
  """
  if image_size % unit:
    raise UserError(f'config.data.image_size is {image_size}: it must be a multiple of {unit}')


class Quantization(NamedTuple):
  """Quantized latent patches [B, P, W]; W = patch * patch * C values per patch."""

  codes: Array  # [B, P] int32
  entries: Array  # [B, P, W]: the nearest codebook entries
  probabilities: Array  # [B, P, V] float32: soft assignment


class ImageCodesCodec:
  """A protocol.ImageCodec over the networks `image` and `image_codes`."""

  network_names = ('image', 'image_codes')
  sampled = False

  def __init__(self, config: ImageCodesConfig, autoencoder: kl.KlConfig, image_size: int):
    """Builds the codec.

    Args:
      config: sizes of the quantizer.
      autoencoder: sizes of the autoencoder.
      image_size: side of the images in pixels.
    """
    self.config = config
    self.codes = config.codes
    self.grid = image_size // (kl.FACTOR * config.patch)
    self.width = config.patch**2 * autoencoder.channels
    self.latents = kl.KlCodec(autoencoder)

  def init(self, rng: Array) -> Params:
    """A random codebook [V, W] with mean 0 and variance 1, as latents have."""
    return {'codebook': jax.random.normal(rng, (self.codes, self.width))}

  def latent_patches(self, params: Params, images: Array) -> Array:
    """Patches of latents [B, P, W] of images [B, R, R, 3], in raster order."""
    with jax.default_matmul_precision('highest'):  # Rounded latents select other codes.
      latents = self.latents.encode(params, images)
    p = self.config.patch
    return einops.rearrange(latents, 'B (h p) (w q) C -> B (h w) (p q C)', p=p, q=p)

  def quantize(self, codebook_entries: Array, patches: Array) -> Quantization:
    """Quantizes latent patches [B, P, W] by codebook entries [V, W]."""
    stop = jax.lax.stop_gradient
    codes = codebook.nearest(stop(patches), stop(codebook_entries))
    products = jnp.einsum('BPW,VW->BPV', patches, codebook_entries)
    # |patch|^2 is omitted; softmax ignores it.
    distance = jnp.sum(jnp.square(codebook_entries), -1) - 2 * products
    probabilities = jax.nn.softmax(-distance / self.config.temperature, -1)
    return Quantization(codes, jnp.take(codebook_entries, codes, axis=0), probabilities)

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32, raster order; see protocol.TokenCodec."""
    return codebook.nearest(self.latent_patches(params, images), params['image_codes']['codebook'])

  def decode(self, params: Params, codes: Array, rng: Array | None = None) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of codes [B, P]; see protocol.ImageCodec."""
    patches = jnp.take(params['image_codes']['codebook'], codes, axis=0).astype(jnp.float32)
    h = w = self.grid
    p = q = self.config.patch
    latents = einops.rearrange(patches, 'B (h w) (p q C) -> B (h p) (w q) C', h=h, w=w, p=p, q=q)
    return self.latents.decode(params, latents, rng)

  def abstract_params(self) -> Params:
    """Shapes of both networks' parameters; see protocol.TokenCodec."""
    codebook_shape = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
    return {**self.latents.abstract_params(), 'image_codes': codebook_shape}
