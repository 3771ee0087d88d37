"""Published KL autoencoders: those of FLUX.1, Stable Diffusion, and Wan (for still images).

The encoder gives mean and log-variance of each latent; the decoder maps latents to images. The
network (latent diffusion, arXiv 2112.10752) agrees with diffusers' AutoencoderKL in float32, and,
with the config of `checkpoints/families/wan_vae.py`, with AutoencoderKLWan on a single frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.codecs import pixels
from vpe_jax.codecs.pyramid import Decoder, Encoder, PyramidConfig
from vpe_jax.config import base_section, check, check_positive
from vpe_jax.contracts import Array, FrozenNetwork, Params, PretrainedWeights
from vpe_jax.models import shapes


@dataclasses.dataclass(frozen=True)
class KlVaeConfig:
  """Sizes of an autoencoder and the moments of its latents.

  Attributes:
    body: sizes of encoder and decoder; the encoder's `outputs` (mean and log-variance) are twice
      the decoder's `inputs` (latents).
    quant: whether a 1x1 convolution follows the encoder.
    post_quant: whether a 1x1 convolution precedes the decoder.
    shift: mean of the latents: one value, or one per channel.
    scale: 1 / standard deviation of the latents: one value, or one per channel. Normalized latents
      are (latents - shift) * scale.
    raw_deviation: whether the noise of sampled latents is added to the normalized mean without
      `scale`, as in Show-o2's training. It affects sampled latents only.
  """

  body: PyramidConfig
  quant: bool
  post_quant: bool
  shift: tuple[float, ...] = (0.0,)
  scale: tuple[float, ...] = (1.0,)
  raw_deviation: bool = False

  def __post_init__(self) -> None:
    check_positive(self, '', 'scale')

  @property
  def channels(self) -> int:
    """Channels C of the latents."""
    return self.body.inputs


@dataclasses.dataclass(frozen=True)
class KlVaeSection(KlVaeConfig):
  """The config section of KlVaeCodec; see protocol.LatentSection.

  Attributes:
    kind: family of the published weights: `kl_vae` or `wan_vae`.
    weights: source of the weights: a folder, an import, or a hub id (`OWNER/NAME:FOLDER`).
    weights_dtype: dtype of the loaded weights: float32, or bfloat16 for a large network.
    sampled: whether latents for training are sampled from the posterior, anew at each step;
      otherwise they are its mean. Sampled latents are encoded online even if `data.encode` is
      `cached`.
  """

  kind: str = 'kl_vae'
  weights: str = ''
  weights_dtype: str = 'float32'
  sampled: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    # Not in KlVaeConfig: diffusers saves Wan's 16 moments with any number of channels.
    for name in ('shift', 'scale'):
      valid = len(getattr(self, name)) in (1, self.channels)
      check(self, '', name, valid, f'one value, or one per channel ({self.channels})')

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The autoencoder."""
    published = PretrainedWeights(self.kind, self.weights, base_section(self, KlVaeConfig))
    return {'image': FrozenNetwork(self.weights, published, self.weights_dtype)}

  def codec(self) -> KlVaeCodec:
    """The codec, in float32."""
    return KlVaeCodec(self, sampled=self.sampled)


class Posterior(NamedTuple):
  """Mean and log-variance of normally distributed raw latents, each [B, h, w, C] float32."""

  mean: Array
  log_variance: Array


class KlVae(nn.Module):
  """Encoder and decoder between images in [-1, 1] and raw latents."""

  config: KlVaeConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    c = self.config
    self.encoder = Encoder(c.body, self.dtype)
    self.decoder = Decoder(c.body, self.dtype)
    if c.quant:
      self.quant = nn.Conv(2 * c.channels, (1, 1), dtype=self.dtype)
    if c.post_quant:
      self.post_quant = nn.Conv(c.channels, (1, 1), dtype=self.dtype)

  def posterior(self, images: Array) -> Posterior:
    """The distribution of raw latents of images [B, H, W, 3] in [-1, 1]."""
    x = self.encoder(images)
    x = self.quant(x) if self.config.quant else x
    mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

  def decode(self, latents: Array) -> Array:
    """Images [B, H, W, 3] float32 in about [-1, 1] from raw latents [B, h, w, C]; not clipped."""
    latents = latents.astype(self.dtype)
    x = self.post_quant(latents) if self.config.post_quant else latents
    return self.decoder(x).astype(jnp.float32)

  def __call__(self, images: Array) -> Array:
    """The image decoded from the mean; uses every parameter."""
    return self.decode(self.posterior(images).mean)


class KlVaeCodec:
  """A protocol.LatentCodec over the network `image`."""

  network_names = ('image',)

  def __init__(self, config: KlVaeConfig, dtype: jnp.dtype = jnp.float32, sampled: bool = False):
    self.config = config
    self.sampled = sampled
    self.factor = config.body.factor
    self.channels = config.channels
    self.network = KlVae(config, dtype)

  def encode(self, params: Params, images: Array, keys: Array | None = None) -> Array:
    """Normalized latents [B, H / factor, W / factor, C] float32.

    Args:
      params: network name -> parameters.
      images: [B, H, W, 3], uint8 or float in [0, 1]; sides are multiples of `factor`.
      keys: keys [B] of the noise of sampled latents; None for the mean.
    """
    c = self.config
    signed = pixels.to_signed(pixels.to_unit(images))
    mean, log_variance = self._apply(params, signed, 'posterior')
    shift, scale = jnp.asarray(c.shift), jnp.asarray(c.scale)
    if keys is None:
      return (mean - shift) * scale
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    deviation = jnp.exp(0.5 * log_variance) * noise
    return (mean - shift) * scale + (deviation if c.raw_deviation else deviation * scale)

  def decode(self, params: Params, latents: Array, rng: Array | None = None) -> Array:
    """Images [B, H, W, 3] float32 in [0, 1] from normalized latents; see protocol.LatentCodec."""
    del rng
    raw = latents / jnp.asarray(self.config.scale) + jnp.asarray(self.config.shift)
    return jnp.clip(0.5 * (self._apply(params, raw, 'decode') + 1.0), 0.0, 1.0)

  def abstract_params(self) -> Params:
    """Shapes of the network's parameters; see protocol.LatentCodec."""
    images = shapes.images(4 * self.factor)
    return {'image': shapes.parameter_shapes(self.network, images)}

  def _apply(self, params: Params, inputs: Array, method: str):
    return self.network.apply({'params': params['image']}, inputs, method=method)
