"""SigLIP-VQ: X-Omni's semantic image tokenizer.

The features of the last layer of a SigLIP 2 tower (giant) are projected, and each is replaced by
the nearest entry of a codebook on the unit sphere. Decoding gives features, not pixels. X-Omni
(arXiv 2507.22058) trained the tokenizer; GLM-Image and LLaDA2.0-Uni publish copies without the
convolutional blocks at the end of the decoder, which only X-Omni's image generator uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.codecs import codebook, pixels
from vpe_jax.codecs.pyramid import Norm
from vpe_jax.config import base_section, check, check_sizes
from vpe_jax.contracts import Array, FrozenNetwork, Params, PretrainedWeights
from vpe_jax.models import shapes
from vpe_jax.models.dense import Dense
from vpe_jax.models.vit import Encoder, EncoderConfig, patches


@dataclasses.dataclass(frozen=True)
class SiglipVqConfig:
  """Sizes of the tokenizer; the defaults are the published ones.

  Attributes:
    encoder: the tower; the published one uses the exact GELU, not the tanh approximation of other
      SigLIPs.
    patch: side of a patch in pixels.
    table: side of the square table of position embeddings, in patches; it is resampled for other
      grids.
    codes: number V of codebook entries.
    width: width of a codebook entry.
    post_blocks: convolutional blocks at the end of the decoder.
  """

  encoder: EncoderConfig = EncoderConfig(1536, 40, 16, 6144, activation='gelu')
  patch: int = 16
  table: int = 128
  codes: int = 16_384
  width: int = 2048
  post_blocks: int = 0

  def __post_init__(self) -> None:
    check_sizes(self)


@dataclasses.dataclass(frozen=True)
class SiglipVqSection(SiglipVqConfig):
  """The config section of SiglipVqCodec; see protocol.FeatureCodeSection.

  Attributes:
    kind: `siglip_vq`.
    image_size: side of the tower's input image in pixels, a multiple of `patch`.
    weights: source of the weights: a folder, an import, or a hub id (`OWNER/NAME:FOLDER`).
    weights_dtype: dtype of the loaded weights: float32, or bfloat16 for a large network.
  """

  kind: str = 'siglip_vq'
  image_size: int = 384
  weights: str = ''
  weights_dtype: str = 'float32'

  def __post_init__(self) -> None:
    super().__post_init__()
    whole = self.image_size % self.patch == 0
    check(self, '', 'image_size', whole, f'a multiple of patch={self.patch}')

  @property
  def tokens(self) -> int:
    """Codes P per image."""
    return (self.image_size // self.patch) ** 2

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """The tokenizer."""
    published = PretrainedWeights(self.kind, self.weights, base_section(self, SiglipVqConfig))
    return {'siglip_vq': FrozenNetwork(self.weights, published, self.weights_dtype)}

  def codec(self, dtype: jnp.dtype) -> SiglipVqCodec:
    """The codec; `dtype` is its compute dtype."""
    return SiglipVqCodec(self, self.image_size, dtype=dtype)


class PostBlock(nn.Module):
  """x + conv(gelu(norm(conv(gelu(norm(x)))))) at constant width."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = x
    for i in (1, 2):
      y = jax.nn.gelu(Norm(32, 1e-5, name=f'norm_{i}')(y), approximate=False)
      y = nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name=f'conv_{i}')(y)
    return x + y


class SiglipVq(nn.Module):
  """Tower, codebook and decoder; images in [-1, 1].

  With `dtype` float32, `encode` has full float32 precision on every device. The released code runs
  in bfloat16: if two entries are almost equally near to a feature, rounding may change its code.
  """

  config: SiglipVqConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    c, near = self.config, nn.initializers.normal(0.02)
    self.embed = Dense(c.encoder.width, dtype=self.dtype)
    self.position = self.param('position', near, (c.table**2, c.encoder.width))
    self.encoder = Encoder(c.encoder, self.dtype)
    self.quant = Dense(c.width, dtype=self.dtype)
    self.codebook = self.param('codebook', nn.initializers.normal(1.0), (c.codes, c.width))
    self.post_quant = Dense(c.encoder.width, dtype=self.dtype)
    self.post = [PostBlock(self.dtype) for _ in range(c.post_blocks)]

  def features(self, images: Array) -> Array:
    """Raw features [B, H / patch, W / patch, D] of the last layer for images [B, H, W, 3]."""
    c = self.config
    height, width = (side // c.patch for side in images.shape[1:3])
    x = self.embed(patches(images.astype(self.dtype), c.patch))
    x = x + resample(self.position, height, width).astype(self.dtype)
    x = self.encoder(x, depth=c.encoder.layers)
    return x.reshape(-1, height, width, c.encoder.width)

  def project(self, features: Array) -> Array:
    """Projects features [..., D] to the width of codebook entries: [..., width]."""
    return self.quant(features)

  def quantize(self, features: Array) -> Array:
    """Codes [...] int32 of features [..., D]."""
    return codebook.largest_product(self.project(features), self.codebook, normed=True)

  def encode(self, images: Array) -> Array:
    """Codes [B, h, w] int32 of images [B, H, W, 3]."""
    with jax.default_matmul_precision('highest'):
      return self.quantize(self.features(images))

  def decode(self, codes: Array) -> Array:
    """Features [B, h, w, D] of codes [B, h, w]; codebook entries are not normalized."""
    x = self.post_quant(jnp.take(self.codebook, codes, axis=0).astype(self.dtype))
    for block in self.post:
      x = block(x)
    return x

  def __call__(self, images: Array) -> Array:
    """The features decoded from the codes; uses every parameter."""
    return self.decode(self.encode(images))


class SiglipVqCodec:
  """A protocol.FeatureCodec over the network `name` of `params`; it can also decode features."""

  def __init__(
    self,
    config: SiglipVqConfig,
    image_size: int = 384,
    name: str = 'siglip_vq',
    dtype: jnp.dtype = jnp.float32,
  ):
    self.config = config
    self.network_names = (name,)
    self.codebook = f'{name}/codebook'
    self.codes = config.codes
    self.view_side = image_size
    self.grid = image_size // config.patch
    self.network = SiglipVq(config, dtype)

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32, raster order.

    Args:
      params: network name -> parameters.
      images: [B, H, W, 3] of any shape, uint8 or float in [0, 1]. They are resized and padded with
        white to squares of side `view_side`, as the pipeline does for `data.fit=pad`.
    """
    signed = pixels.to_signed(pixels.padded_view(images, self.view_side))
    codes = self.network.apply({'params': params[self.network_names[0]]}, signed, method='encode')
    return codes.reshape(codes.shape[0], -1)

  def decode(self, params: Params, codes: Array) -> Array:
    """Features [B, P, D] decoded from codes [B, P]."""
    variables = {'params': params[self.network_names[0]]}
    square = codes.reshape(-1, self.grid, self.grid)
    features = self.network.apply(variables, square, method='decode')
    return features.reshape(*codes.shape, -1)

  def abstract_params(self) -> Params:
    """Shapes of the network's parameters; see protocol.TokenCodec."""
    images = shapes.images(self.view_side)
    return {self.network_names[0]: shapes.parameter_shapes(self.network, images)}


def resample(table: Array, height: int, width: int) -> Array:
  """Resamples a square table of positions [side^2, D] bilinearly to [height * width, D].

  As X-Omni does with PyTorch: no antialiasing, `align_corners=False` (pixel centres at half
  integers), and constant values beyond the outermost centres.
  """
  side = round(table.shape[0] ** 0.5)
  square = table.astype(jnp.float32).reshape(side, side, -1)
  shape = (height, width, table.shape[-1])
  return jax.image.resize(square, shape, 'linear', antialias=False).reshape(height * width, -1)
