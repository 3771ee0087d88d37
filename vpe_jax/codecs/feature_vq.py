"""A codebook over the patch features of a frozen vision transformer: one code per patch.

Patch features of a SigLIP or another tower (codecs/towers.py) are projected to a few dimensions,
and the nearest codebook entry on the unit sphere gives the code, as in X-Omni's SigLIP-VQ. A
transformer decoder reconstructs the features from all codes of an image. The reconstruction error
trains the decoder and, straight through the quantization, the projection; a VQ-VAE loss and an
entropy loss train the codebook (systems/tokenizers/codec.py). VPE (arXiv 2606.04457, Appendix F)
compares the towers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.codecs import towers
from vpe_jax.config import check_positive
from vpe_jax.contracts import Array, FrozenNetwork, Params
from vpe_jax.models import shapes
from vpe_jax.models.siglip import Siglip, unit
from vpe_jax.models.vit import Encoder, EncoderConfig, LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureVqConfig(towers.TowerConfig):
  """Sizes of the tokenizer; the defaults are those of the shipped weights.

  Attributes:
    codes: number V of codebook entries.
    code_width: width W of a codebook entry.
    temperature: temperature of the soft assignment, whose entropy loss keeps all codes in use.
    decoder: sizes of the decoder from codes to features.
  """

  codes: int = 512
  code_width: int = 32
  temperature: float = 0.03
  decoder: EncoderConfig = EncoderConfig(width=128, layers=1, heads=4, mlp=256)

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive(self, '', 'temperature')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureVqSection(FeatureVqConfig):
  """The config section of FeatureVqCodec; see protocol.FeatureCodeSection.

  Attributes:
    kind: `feature_vq`.
    weights: source of the quantizer's weights: `assets:NAME`, a file or the workdir of a run.
    tower_weights: source of the tower's weights; empty: the default in towers.SOURCES.
    weights_dtype: dtype in which tower and quantizer are loaded: float32, or bfloat16 for a large
      tower.
  """

  kind: str = 'feature_vq'
  weights: str = 'assets:feature_vq'
  tower_weights: str = ''
  weights_dtype: str = 'float32'

  @property
  def tokens(self) -> int:
    """Codes P per image."""
    return self.patches

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """Tower and quantizer."""
    tower = {self.encoder: towers.frozen(self, self.tower_weights, self.weights_dtype)}
    return {**tower, 'feature_vq': FrozenNetwork(self.weights, dtype=self.weights_dtype)}

  def codec(self, dtype: jnp.dtype) -> FeatureVqCodec:
    """The codec; it computes in float32 whatever `dtype` is, for exact codes."""
    del dtype
    return FeatureVqCodec(self)


class Quantization(NamedTuple):
  """Result of quantizing patch features [B, P, D], where D is the width of the tower."""

  codes: Array  # [B, P] int32
  projected: Array  # [B, P, W]: projected features, unit vectors
  entries: Array  # [B, P, W]: the nearest codebook entries, unit vectors
  probabilities: Array  # [B, P, V] float32: soft assignment


class Quantizer(nn.Module):
  """Projection, codebook and decoder of features, in float32."""

  config: FeatureVqConfig

  def setup(self) -> None:
    c = self.config
    self.norm = LayerNorm(c.decoder.eps)
    self.hidden = nn.Dense(c.decoder.width)
    self.project = nn.Dense(c.code_width)
    self.codebook = self.param('codebook', nn.initializers.normal(1.0), (c.codes, c.code_width))
    near = nn.initializers.normal(0.02)
    self.position = self.param('position', near, (c.patches, c.decoder.width))
    self.expand = nn.Dense(c.decoder.width)
    self.decoder = Encoder(c.decoder, jnp.float32)
    self.features = nn.Dense(c.body.width)

  def quantize(self, features: Array) -> Quantization:
    """Replaces each patch feature [B, P, D] by the nearest codebook entry."""
    projected = unit(self.project(jax.nn.gelu(self.hidden(self.norm(features)))))
    entries = unit(self.codebook)
    cosine = jnp.einsum('BPW,VW->BPV', projected, entries)
    codes = jnp.argmax(cosine, -1).astype(jnp.int32)
    probabilities = jax.nn.softmax(cosine / self.config.temperature, -1)
    return Quantization(codes, projected, jnp.take(entries, codes, axis=0), probabilities)

  def lookup(self, codes: Array) -> Array:
    """Codebook entries [B, P, W] of codes [B, P], as unit vectors."""
    return unit(jnp.take(self.codebook, codes, axis=0))

  def decode(self, entries: Array) -> Array:
    """Patch features [B, P, D] from codebook entries [B, P, W]."""
    return self.features(self.decoder(self.expand(entries) + self.position))

  def __call__(self, features: Array) -> tuple[Quantization, Array]:
    """Quantizes and decodes features [B, P, D], with the straight-through gradient."""
    quantized = self.quantize(features)
    difference = jax.lax.stop_gradient(quantized.entries - quantized.projected)
    return quantized, self.decode(quantized.projected + difference)


class FeatureVqCodec:
  """A protocol.FeatureCodec over two networks: the tower `config.encoder`, and `feature_vq`."""

  codebook = 'feature_vq/codebook'

  def __init__(self, config: FeatureVqConfig):
    self.config = config
    self.network_names = (config.encoder, 'feature_vq')
    self.codes = config.codes
    self.grid = config.grid
    # The embedded SigLIP was trained on resized images of the system.
    self.view_side = 0 if config.published is None else config.view_side
    self.tower = towers.tower(config)
    self.quantizer = Quantizer(config)

  @property
  def siglip(self) -> Siglip:
    """The SigLIP; only if `config.encoder` is `siglip`."""
    return self.tower.network

  def features(self, params: Params, images: Array) -> Array:
    """The tower's patch features [B, P, D] of images [B, R, R, 3]."""
    return self.tower.features(params[self.config.encoder], images)

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32; see protocol.TokenCodec."""
    variables = {'params': params['feature_vq']}
    with jax.default_matmul_precision('highest'):  # Less precision changes codes.
      features = self.features(params, images)
      return self.quantizer.apply(variables, features, method='quantize').codes

  def decode(self, params: Params, codes: Array) -> Array:
    """Patch features [B, P, D] decoded from codes [B, P]."""
    variables = {'params': params['feature_vq']}
    entries = self.quantizer.apply(variables, codes, method='lookup')
    return self.quantizer.apply(variables, entries, method='decode')

  def embed_codes(self, params: Params, codes: Array) -> Array:
    """SigLIP's image embedding of codes [B, P]: unit vectors [B, D] float32.

    The pooling head reads the decoded features in place of the image tower's normalized last
    output. Requires `config.has_text_tower`.
    """
    features = self.decode(params, codes)
    return self.siglip.apply({'params': params['siglip']}, features, method='pool')

  def embed_text(self, params: Params, text: Array, length: Array) -> Array:
    """SigLIP's text embedding of captions [B, T] with `length` [B] tokens: unit vectors [B, D].

    Captions longer than the text tower's input are truncated. Requires `config.has_text_tower`.
    """
    limit = self.config.siglip.text_length
    length = jnp.minimum(length, limit)
    variables = {'params': params['siglip']}
    return self.siglip.apply(variables, text[:, :limit], length, method='embed_text')

  def abstract_params(self) -> Params:
    """Shapes of both networks' parameters; see protocol.TokenCodec."""
    c = self.config
    features = jax.ShapeDtypeStruct((1, c.patches, c.body.width), jnp.float32)
    quantizer = shapes.parameter_shapes(self.quantizer, features)
    return {c.encoder: self.tower.abstract_params(), 'feature_vq': quantizer}
