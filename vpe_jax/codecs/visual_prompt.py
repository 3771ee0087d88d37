"""The visual prompt: vector-quantised patch features, one code a patch.

A frozen SigLIP, or another tower (codecs/towers.py), sees a small view of the picture; its patch
features are projected to a few dimensions, and the nearest row of a codebook (both on the unit
sphere, as X-Omni's SigLIP-VQ) is the code. A decoder that sees all patches maps codes back to
features: it gives the training signal and shows what a prompt still says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.codecs import towers
from vpe_jax.contracts import Array, FrozenNetwork, Params
from vpe_jax.models.siglip import Siglip, unit
from vpe_jax.models.vit import Encoder, EncoderConfig, LayerNorm, forward_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualPromptConfig(towers.TowerConfig):
  """Sizes of the tokenizer; the defaults are the embedded one's.

  Attributes:
    codes: rows of the codebook.
    code_width: dimensions in which the nearest row is sought.
    temperature: of the soft choice that keeps every code in use while training.
    decoder: the network that maps codes back to features.
  """

  codes: int = 512
  code_width: int = 32
  temperature: float = 0.03
  decoder: EncoderConfig = EncoderConfig(width=128, layers=1, heads=4, mlp=256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerVqSection(VisualPromptConfig):
  """The config section of VisualPromptCodec; see protocol.VisualPromptSection.

  Attributes:
    kind: `tower_vq`.
    weights: source of the quantiser's weights: `assets:NAME`, a path or a hub id.
    tower_weights: source of the tower's; empty: the shipped SigLIP, or the release of a published
      tower (towers.SOURCES).
    weights_dtype: dtype of the loaded weights of both: float32, or bfloat16 for a large tower.
  """

  kind: str = 'tower_vq'
  weights: str = 'assets:visual_prompt'
  tower_weights: str = ''
  weights_dtype: str = 'float32'

  @property
  def tokens(self) -> int:
    """Codes P of a visual prompt."""
    return self.patches

  @property
  def frozen(self) -> Mapping[str, FrozenNetwork]:
    """Tower and quantiser."""
    tower = {self.encoder: towers.frozen(self, self.tower_weights, self.weights_dtype)}
    return {**tower, 'visual_prompt': FrozenNetwork(self.weights, dtype=self.weights_dtype)}

  def codec(self, dtype: jnp.dtype) -> VisualPromptCodec:
    """The codec, in float32: its tower is small or chosen for exact codes."""
    del dtype
    return VisualPromptCodec(self)


class Quantised(NamedTuple):
  """Quantised patch features [B, P, D]."""

  codes: Array  # [B, P] int32
  inputs: Array  # [B, P, W]: projected features, unit vectors
  chosen: Array  # [B, P, W]: the chosen rows, unit vectors
  probabilities: Array  # [B, P, V] float32: soft choice


class Quantiser(nn.Module):
  """Projection, codebook and decoder; features in, features out, all float32."""

  config: VisualPromptConfig

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

  def quantise(self, features: Array) -> Quantised:
    """The nearest code of each patch."""
    inputs = unit(self.project(jax.nn.gelu(self.hidden(self.norm(features)))))
    rows = unit(self.codebook)
    cosine = jnp.einsum('BPW,VW->BPV', inputs, rows)
    codes = jnp.argmax(cosine, -1).astype(jnp.int32)
    soft = jax.nn.softmax(cosine / self.config.temperature, -1)
    return Quantised(codes, inputs, jnp.take(rows, codes, axis=0), soft)

  def lookup(self, codes: Array) -> Array:
    """Unit rows [B, P, W] of codes [B, P]."""
    return unit(jnp.take(self.codebook, codes, axis=0))

  def decode(self, rows: Array) -> Array:
    """Patch features [B, P, D] from codebook rows [B, P, W]."""
    return self.features(self.decoder(self.expand(rows) + self.position))

  def __call__(self, features: Array) -> tuple[Quantised, Array]:
    """Quantises and decodes; the gradient passes the choice unchanged (straight through)."""
    quantised = self.quantise(features)
    step = jax.lax.stop_gradient(quantised.chosen - quantised.inputs)
    return quantised, self.decode(quantised.inputs + step)


class VisualPromptCodec:
  """A protocol.PlanCodec over two networks: the tower, called as `config.encoder`, and ours."""

  codebook = 'visual_prompt/codebook'

  def __init__(self, config: VisualPromptConfig):
    self.config = config
    self.weights = (config.encoder, 'visual_prompt')
    self.codes = config.codes
    self.grid = config.grid
    self.tower = towers.tower(config)
    self.quantiser = Quantiser(config)

  @property
  def siglip(self) -> Siglip:
    """The tower of encoder `siglip`, which has read our captions."""
    return self.tower.network

  def features(self, params: Params, images: Array) -> Array:
    """The tower's patch features [B, P, D] of pictures [B, R, R, 3]."""
    return self.tower.features(params[self.config.encoder], images)

  def encode(self, params: Params, images: Array) -> Array:
    """Codes [B, P] int32; see protocol.TokenCodec."""
    variables = {'params': params['visual_prompt']}
    features = self.features(params, images)
    return self.quantiser.apply(variables, features, method='quantise').codes

  def decode(self, params: Params, codes: Array) -> Array:
    """The patch features [B, P, D] that codes [B, P] stand for."""
    variables = {'params': params['visual_prompt']}
    rows = self.quantiser.apply(variables, codes, method='lookup')
    return self.quantiser.apply(variables, rows, method='decode')

  def embed_codes(self, params: Params, codes: Array) -> Array:
    """SigLIP's pooled vectors of codes [B, P]: unit vectors [B, D] float32.

    The codes' features take the place of the image tower's normed last output, which they were
    trained to rebuild: only where `config.compares`.
    """
    features = self.decode(params, codes)
    return self.siglip.apply({'params': params['siglip']}, features, method='pool')

  def embed_text(self, params: Params, text: Array, length: Array) -> Array:
    """SigLIP's unit vectors [B, D] float32 of captions [B, T] with `length` [B] real tokens.

    One that is longer than the text tower's positions counts by its beginning.
    """
    limit = self.config.siglip.text_length
    shown = jnp.minimum(length, limit)
    variables = {'params': params['siglip']}
    return self.siglip.apply(variables, text[:, :limit], shown, method='embed_text')

  def abstract_params(self) -> Params:
    """Both networks' parameters as shapes; see protocol.TokenCodec."""
    c = self.config

    def init() -> Params:
      key, features = jax.random.key(0), jnp.zeros((1, c.patches, c.body.width))
      return {
        c.encoder: self.tower.init(key),
        'visual_prompt': self.quantiser.init(key, features)['params'],
      }

    return jax.eval_shape(init)


def flops(config: VisualPromptConfig) -> float:
  """Matrix FLOPs of one forward pass of the quantiser and its decoder over one picture."""
  c, D, H = config, config.body.width, config.decoder.width
  dense = D * H + H * c.code_width + c.code_width * c.codes + c.code_width * H + H * D
  return 2.0 * c.patches * dense + forward_flops(c.decoder, c.patches)
