"""Pre-norm bidirectional transformer (ViT): the encoder body of both SigLIP towers."""

from __future__ import annotations

import dataclasses

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.config import nearest
from vpe_jax.contracts import Array, UserError
from vpe_jax.models.dense import Dense, DenseGeneral
from vpe_jax.ops import norms

ACTIVATIONS = {
  'gelu_tanh': jax.nn.gelu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Sizes of an encoder.

  Attributes:
    width: model width D, a multiple of `heads`.
    layers: number of layers.
    heads: attention heads N.
    mlp: hidden width of the MLP.
    eps: of the layer norms.
    activation: of the MLP, a key of ACTIVATIONS.
  """

  width: int
  layers: int
  heads: int
  mlp: int
  eps: float = 1e-6
  activation: str = 'gelu_tanh'

  def __post_init__(self) -> None:
    if self.activation not in ACTIVATIONS:
      hint = nearest(self.activation, ACTIVATIONS)
      raise UserError(f"no activation '{self.activation}'{hint}")


class LayerNorm(nn.Module):
  """Layer normalisation with learned scale and bias."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return norms.layer_norm(x, scale, bias, self.eps)


class Attention(nn.Module):
  """Multi-head attention of queries [B, L, D] over tokens [B, S, D], with biases; no positions."""

  config: EncoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, queries: Array, tokens: Array, mask: Array | None = None) -> Array:
    """Mixed tokens [B, L, D]; `mask` [B, S] says which tokens exist (None: all)."""
    c = self.config
    heads = lambda name: DenseGeneral((c.heads, c.width // c.heads), dtype=self.dtype, name=name)
    q, k, v = heads('q')(queries), heads('k')(tokens), heads('v')(tokens)
    shown = None if mask is None else mask[:, None, None, :]
    mixed = jax.nn.dot_product_attention(q, k, v, mask=shown)
    return DenseGeneral(c.width, axis=(-2, -1), dtype=self.dtype, name='o')(mixed)


class Mlp(nn.Module):
  """Two dense layers around an activation."""

  config: EncoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    x = ACTIVATIONS[c.activation](Dense(c.mlp, dtype=self.dtype, name='up')(x))
    return Dense(c.width, dtype=self.dtype, name='down')(x)


class Layer(nn.Module):
  """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  config: EncoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    c = self.config
    y = LayerNorm(c.eps, name='attention_norm')(x)
    x = x + Attention(c, self.dtype, name='attention')(y, y, mask)
    y = LayerNorm(c.eps, name='mlp_norm')(x)
    return x + Mlp(c, self.dtype, name='mlp')(y)


class Encoder(nn.Module):
  """A stack of layers and its closing norm.

  Layers are separate subtrees (`layers_0`, ...) and run in a Python loop: a caller that stops
  early pays for no more layers than it asks for.
  """

  config: EncoderConfig
  dtype: jnp.dtype

  def setup(self) -> None:
    self.layers = [Layer(self.config, self.dtype) for _ in range(self.config.layers)]
    self.norm = LayerNorm(self.config.eps)

  def __call__(self, x: Array, mask: Array | None = None, depth: int | None = None) -> Array:
    """Tokens [B, L, D] after the closing norm, or raw after the first `depth` layers."""
    for layer in self.layers[:depth]:
      x = layer(x, mask)
    return self.norm(x) if depth is None else x


class AttentionPool(nn.Module):
  """One learned query over all tokens, then an MLP (SigLIP's MAP head): [B, L, D] -> [B, D]."""

  config: EncoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    c = self.config
    probe = self.param('probe', nn.initializers.xavier_uniform(), (1, c.width))
    probe = jnp.broadcast_to(probe.astype(self.dtype), (tokens.shape[0], 1, c.width))
    x = Attention(c, self.dtype, name='attention')(probe, tokens)
    x = x + Mlp(c, self.dtype, name='mlp')(LayerNorm(c.eps, name='norm')(x))
    return x[:, 0]


def patches(images: Array, patch: int) -> Array:
  """Squares of `patch` pixels in raster order: [B, H, W, C] -> [B, P, patch * patch * C]."""
  return einops.rearrange(images, 'B (h p) (w q) C -> B (h w) (p q C)', p=patch, q=patch)


def forward_flops(config: EncoderConfig, tokens: int) -> float:
  """Matrix FLOPs of one forward pass over one row of `tokens` tokens."""
  c = config
  dense = 4 * c.width * c.width + 2 * c.width * c.mlp
  return 2.0 * tokens * c.layers * (dense + 2 * tokens * c.width)


def pool_flops(config: EncoderConfig, tokens: int) -> float:
  """Matrix FLOPs of one forward pass of AttentionPool over one row of `tokens` tokens."""
  c = config
  once = 2 * c.width * c.width + 2 * c.width * c.mlp
  return 2.0 * (once + tokens * (2 * c.width * c.width + 2 * c.width))
