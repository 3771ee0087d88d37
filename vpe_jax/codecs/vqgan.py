"""Published VQGAN tokenizers: LlamaGen's VQ-16 and Emu3.5's IBQ.

A convolutional encoder, a codebook, and a convolutional decoder. LlamaGen (arXiv 2406.06525) uses
the nearest codebook entry on the unit sphere; IBQ (arXiv 2412.02692) uses the entry with the
largest dot product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.codecs import codebook, pixels
from vpe_jax.codecs.pyramid import Decoder, Encoder, PyramidConfig
from vpe_jax.config import base_section, check, check_sizes
from vpe_jax.contracts import Array, FrozenNetwork, Params, PretrainedWeights
from vpe_jax.models import shapes
from vpe_jax.models.siglip import unit


@dataclasses.dataclass(frozen=True)
class VqGanConfig:
  """Sizes of a tokenizer.

  Attributes:
    body: sizes of encoder and decoder.
    codes: number V of codebook entries.
    width: width of a codebook entry.
    normed: whether features and entries are normalized to length 1, for search and decoding.
  """

  body: PyramidConfig
  codes: int
  width: int
  normed: bool

  def __post_init__(self) -> None:
    check_sizes(self)


@dataclasses.dataclass(frozen=True)
class VqGanSection(VqGanConfig):
  """The config section of VqGanCodec; see protocol.ImageCodeSection.

  Attributes:
    kind: family of the published weights: `ibq` or `llamagen_vq`.
    image_size: side of the images in pixels, a multiple of `body.factor`.
    weights: source of the weights: a folder, an import, or a hub id (`OWNER/NAME:FOLDER`).
    weights_dtype: dtype of the loaded weights: float32, or bfloat16 for a large network.
  """

  kind: str = 'ibq'
  image_size: int = 512
  weights: str = ''
  weights_dtype: str = 'float32'

  def __post_init__(self) -> None:
    super().__post_init__()
    whole = self.image_size % self.body.factor == 0
    check(self, '', 'image_size', whole, f'a multiple of {self.body.factor}, pixels per code')

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The tokenizer."""
    published = PretrainedWeights(self.kind, self.weights, base_section(self, VqGanConfig))
    return {'vqgan': FrozenNetwork(self.weights, published, self.weights_dtype)}

  def codec(self, image_size: int) -> VqGanCodec:
    """The codec, in float32; it resizes images to the size in this section, not to the argument."""
    del image_size
    return VqGanCodec(self, self.image_size, 'vqgan')


class VqGan(nn.Module):
  """The network; images in [-1, 1].

  Features have full float32 precision on every device: less precision changes codes.
  """

  config: VqGanConfig

  def setup(self) -> None:
    c = self.config
    self.encoder = Encoder(c.body, jnp.float32)
    self.quant = nn.Conv(c.width, (1, 1))
    self.codebook = self.param('codebook', nn.initializers.normal(1.0), (c.codes, c.width))
    self.post_quant = nn.Conv(c.body.inputs, (1, 1))
    self.decoder = Decoder(c.body, jnp.float32)

  def features(self, images: Array) -> Array:
    """Features [B, h, w, width] before quantization, of images [B, H, W, 3]."""
    with jax.default_matmul_precision('highest'):
      return self.quant(self.encoder(images))

  def encode(self, images: Array) -> Array:
    """Codes [B, h, w] int32 of images [B, H, W, 3]."""
    return codebook.largest_product(self.features(images), self.codebook, self.config.normed)

  def lookup(self, codes: Array) -> Array:
    """Codebook entries [B, h, w, width] of codes [B, h, w]."""
    entries = jnp.take(self.codebook, codes, axis=0).astype(jnp.float32)
    return unit(entries) if self.config.normed else entries

  def decode(self, codes: Array) -> Array:
    """Images [B, H, W, 3] in about [-1, 1], not clipped, of codes [B, h, w]."""
    return self.decoder(self.post_quant(self.lookup(codes)))

  def __call__(self, images: Array) -> Array:
    """The image decoded from the codes; uses every parameter."""
    return self.decode(self.encode(images))


class VqGanCodec:
  """A protocol.ImageCodec over the network `name` of `params`."""

  sampled = False

  def __init__(self, config: VqGanConfig, image_size: int = 512, name: str = 'tokens'):
    self.config = config
    self.network_names = (name,)
    self.codes = config.codes
    self.image_size = image_size
    self.grid = image_size // config.body.factor
    self.network = VqGan(config)

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32, raster order; see protocol.TokenCodec."""
    signed = pixels.to_signed(pixels.view(images, self.image_size))
    codes = self.network.apply({'params': params[self.network_names[0]]}, signed, method='encode')
    return codes.reshape(codes.shape[0], -1)

  def decode(self, params: Params, codes: Array, rng: Array | None = None) -> Array:
    """Images [B, R, R, 3] float32 in [0, 1] of codes [B, P]; see protocol.ImageCodec."""
    del rng
    square = codes.reshape(-1, self.grid, self.grid)
    signed = self.network.apply({'params': params[self.network_names[0]]}, square, method='decode')
    return jnp.clip(0.5 * (signed + 1.0), 0.0, 1.0)

  def abstract_params(self) -> Params:
    """Shapes of the network's parameters; see protocol.TokenCodec."""
    images = shapes.images(self.config.body.factor)
    return {self.network_names[0]: shapes.parameter_shapes(self.network, images)}
