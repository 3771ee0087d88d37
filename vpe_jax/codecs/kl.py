"""A small KL autoencoder: images <-> grids of latents, four times smaller per side.

It has the residual convolutional blocks of latent diffusion's autoencoder (arXiv 2112.10752), but
normalizes each position over its own channels, as Wan's autoencoder does. Each position depends on
nearby ones only, so the network can train on crops: with half the side, at a quarter of the cost.
The first and last layers work on patches of 2x2 pixels, which avoids convolutions at full
resolution. The encoder is smaller than the decoder, because generators may run it online during
training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.codecs import pixels
from vpe_jax.config import check, check_sizes
from vpe_jax.contracts import Array, FrozenNetwork, Params
from vpe_jax.models import shapes
from vpe_jax.ops import norms

FACTOR = 4  # pixels per latent along each side


@dataclasses.dataclass(frozen=True)
class KlConfig:
  """Sizes of the autoencoder; the defaults are those of the shipped weights.

  Attributes:
    channels: channels C of the latents.
    encoder: channels at half and at quarter resolution.
    decoder: channels at quarter and at half resolution.
    encoder_blocks: residual blocks at half and at quarter resolution.
    decoder_blocks: residual blocks at quarter and at half resolution.
  """

  channels: int = 4
  encoder: tuple[int, ...] = (48, 96)
  decoder: tuple[int, ...] = (128, 64)
  encoder_blocks: tuple[int, ...] = (1, 1)
  decoder_blocks: tuple[int, ...] = (2, 1)

  def __post_init__(self) -> None:
    check_sizes(self)
    for field in ('encoder', 'decoder', 'encoder_blocks', 'decoder_blocks'):
      check(self, '', field, len(getattr(self, field)) == 2, 'two numbers')


@dataclasses.dataclass(frozen=True)
class KlSection(KlConfig):
  """The config section of KlCodec; see protocol.LatentSection.

  Attributes:
    kind: `kl`.
    weights: source of the weights: `assets:NAME`, a path or the workdir of a run.
    weights_dtype: dtype of the loaded weights: float32, or bfloat16 for a large network.
  """

  kind: str = 'kl'
  weights: str = 'assets:image'
  weights_dtype: str = 'float32'

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The autoencoder."""
    return {'image': FrozenNetwork(self.weights, dtype=self.weights_dtype)}

  def codec(self) -> KlCodec:
    """The codec, in float32."""
    return KlCodec(self)


class NormSilu(nn.Module):
  """RMS norm of x [B, h, w, C] over channels, with a learned scale, then SiLU."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    return jax.nn.silu(norms.rms_norm(x, scale, 1e-6))


class Block(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))) at constant width; the identity when initialized."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    y = nn.Conv(width, (3, 3), name='conv_1')(NormSilu(name='norm_1')(x))
    last = nn.Conv(width, (3, 3), kernel_init=nn.initializers.zeros, name='conv_2')
    return x + last(NormSilu(name='norm_2')(y))


class Encoder(nn.Module):
  """Images [B, R, R, 3] in [-1, 1] -> mean and log-variance [B, R/4, R/4, C] of latents."""

  config: KlConfig

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, Array]:
    c = self.config
    x = einops.rearrange(images, 'B (h p) (w q) C -> B h w (p q C)', p=2, q=2)
    x = nn.Conv(c.encoder[0], (3, 3), name='start')(x)
    for i in range(c.encoder_blocks[0]):
      x = Block(name=f'half_{i}')(x)
    x = nn.Conv(c.encoder[1], (3, 3), strides=2, name='down')(x)
    for i in range(c.encoder_blocks[1]):
      x = Block(name=f'quarter_{i}')(x)
    x = nn.Conv(2 * c.channels, (3, 3), name='end')(NormSilu(name='norm')(x))
    mean, log_variance = jnp.split(x, 2, axis=-1)
    return mean, jnp.clip(log_variance, -20.0, 10.0)


class Decoder(nn.Module):
  """Latents [B, R/4, R/4, C] -> images [B, R, R, 3] in about [-1, 1], not clipped."""

  config: KlConfig

  @nn.compact
  def __call__(self, latents: Array) -> Array:
    c = self.config
    x = nn.Conv(c.decoder[0], (3, 3), name='start')(latents)
    for i in range(c.decoder_blocks[0]):
      x = Block(name=f'quarter_{i}')(x)
    x = _depth_to_space(nn.Conv(4 * c.decoder[1], (1, 1), name='up')(x))
    for i in range(c.decoder_blocks[1]):
      x = Block(name=f'half_{i}')(x)
    # 12 = 2 x 2 pixels of 3 colours.
    return _depth_to_space(nn.Conv(12, (3, 3), name='end')(NormSilu(name='norm')(x)))


class Autoencoder(nn.Module):
  """Encoder, decoder, and the mean and standard deviation that normalize latents.

  `shift` and `scale` [C] are not trained. Export sets them to the mean and the standard deviation
  of the raw latents, so that the latents of an exported network have mean 0 and variance 1 in each
  channel. Images are [B, R, R, 3], latents [B, R/4, R/4, C].
  """

  config: KlConfig

  def setup(self) -> None:
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)
    self.shift = self.param('shift', nn.initializers.zeros, (self.config.channels,))
    self.scale = self.param('scale', nn.initializers.ones, (self.config.channels,))

  def moments(self, images: Array) -> tuple[Array, Array]:
    """Mean and log-variance of the raw latents of images in [-1, 1]."""
    return self.encoder(images)

  def encode(self, images: Array) -> Array:
    """Normalized latents: the mean, without sampling."""
    return (self.encoder(images)[0] - self.shift) / self.scale

  def decode(self, latents: Array) -> Array:
    """Images in about [-1, 1] from normalized latents."""
    return self.decoder(latents * self.scale + self.shift)

  def __call__(self, images: Array, noise: Array) -> tuple[Array, Array, Array]:
    """A training pass: (images decoded from mean + std * noise, mean, log-variance).

    `noise` [B, R/4, R/4, C] is standard normal.
    """
    mean, log_variance = self.encoder(images)
    return self.decoder(mean + jnp.exp(0.5 * log_variance) * noise), mean, log_variance


class KlCodec:
  """A protocol.LatentCodec over the network `image`."""

  network_names = ('image',)
  factor = FACTOR
  sampled = False

  def __init__(self, config: KlConfig):
    self.config = config
    self.channels = config.channels
    self.network = Autoencoder(config)

  def encode(self, params: Params, images: Array, keys: Array | None = None) -> Array:
    """Latents [B, R/4, R/4, C]: the mean; see protocol.LatentCodec."""
    del keys
    signed = pixels.to_signed(pixels.to_unit(images))
    return self.network.apply({'params': params['image']}, signed, method='encode')

  def decode(self, params: Params, latents: Array, rng: Array | None = None) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1]; see protocol.LatentCodec."""
    del rng
    signed = self.network.apply({'params': params['image']}, latents, method='decode')
    return jnp.clip(0.5 * (signed + 1.0), 0.0, 1.0)

  def abstract_params(self) -> Params:
    """Shapes of the network's parameters; see protocol.LatentCodec."""
    noise = jax.ShapeDtypeStruct((1, 4, 4, self.channels), jnp.float32)
    return {'image': shapes.parameter_shapes(self.network, shapes.images(4 * FACTOR), noise)}


def _depth_to_space(x: Array) -> Array:
  """[B, h, w, 4 C] -> [B, 2h, 2w, C]."""
  return einops.rearrange(x, 'B h w (p q C) -> B (h p) (w q) C', p=2, q=2)
