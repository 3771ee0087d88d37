"""Pre-norm transformer (ViT): the encoder body of SigLIP, CLIP and DINOv2."""

from __future__ import annotations

import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.config import check, check_positive, check_sizes
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.dense import Dense, DenseGeneral
from vpe_jax.models.taps import Tapped, Taps
from vpe_jax.ops import norms
from vpe_jax.ops.attention import chooser
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import cross_attention

ACTIVATIONS = {
  'gelu_tanh': jax.nn.gelu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Sizes of an encoder.

  Attributes:
    width: model width D, a multiple of `heads`.
    layers: number of layers.
    heads: attention heads N.
    mlp: hidden width of the MLP.
    eps: epsilon of the layer norms.
    activation: activation of the MLP, a key of ACTIVATIONS; `swiglu`: a gated MLP.
    layer_scale: whether learned vectors scale the outputs of attention and MLP (DINOv2).
  """

  width: int
  layers: int
  heads: int
  mlp: int
  eps: float = 1e-6
  activation: str = 'gelu_tanh'
  layer_scale: bool = False

  def __post_init__(self) -> None:
    check_sizes(self)
    check_positive(self, '', 'eps')
    whole = self.width % self.heads == 0
    check(self, '', 'width', whole, f'a multiple of heads={self.heads}')
    known = (*ACTIVATIONS, 'swiglu')
    check(self, '', 'activation', self.activation in known, f'one of {", ".join(known)}')


class LayerNorm(nn.Module):
  """Layer normalisation with learned scale and bias."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return norms.layer_norm(x, scale, bias, self.eps)


class Attention(nn.Module):
  """Multi-head attention of queries [B, L, D] over tokens [B, S, D]; no position embeddings."""

  config: EncoderConfig
  dtype: jnp.dtype
  attention: str = ''  # implementation, a name of `config.ATTENTIONS`; '' chooses

  @nn.compact
  def __call__(self, queries: Array, tokens: Array, mask: Array | None = None) -> Array:
    """Attention output [B, L, D].

    A mask [B, S] is True for tokens and False for padding, which is stored last. A mask
    [B or 1, L, S] is True for the tokens that each query sees; attention is then dense, for short
    sequences. Without a mask, all queries see all tokens.
    """
    c = self.config
    heads = lambda name: DenseGeneral((c.heads, c.width // c.heads), dtype=self.dtype, name=name)
    q, k, v = heads('q')(queries), heads('k')(tokens), heads('v')(tokens)
    if mask is not None and mask.ndim == 3:
      mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    else:
      layout = cross_attention(q.shape[1], k.shape[1])
      regions = build(layout, keep=jnp.ones(q.shape[:1], bool))
      query, key = regions['queries'].visibility, regions['keys'].visibility
      if mask is not None:
        key = jax.tree.map(lambda leaf: jnp.where(mask, leaf, 0), key)
      mixed = chooser.attention(q, k, v, query, key, self.attention, hint='padding')
    return DenseGeneral(c.width, axis=(-2, -1), dtype=self.dtype, name='o')(mixed)


class Mlp(nn.Module):
  """Two dense layers around an activation."""

  config: EncoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = Dense(self.config.mlp, dtype=self.dtype, name='up')(x)
    x = ACTIVATIONS[self.config.activation](x)
    return Dense(self.config.width, dtype=self.dtype, name='down')(x)


class GatedMlp(nn.Module):
  """A SwiGLU with biases: out(silu(gate(x)) * value(x))."""

  config: EncoderConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = lambda width, name: Dense(width, dtype=self.dtype, name=name)
    gate, value = dense(self.config.mlp, 'gate')(x), dense(self.config.mlp, 'value')(x)
    return dense(self.config.width, 'out')(jax.nn.silu(gate) * value)


class Scale(nn.Module):
  """A learned factor for each channel; starts at 1."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return x * self.param('scale', nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)


class Layer(nn.Module):
  """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  config: EncoderConfig
  dtype: jnp.dtype
  attention: str = ''  # implementation, see Attention

  @nn.compact
  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    c = self.config
    y = LayerNorm(c.eps, name='attention_norm')(x)
    attend = Attention(c, self.dtype, self.attention, name='attention')
    scaled = lambda y, name: Scale(name=name)(y) if c.layer_scale else y
    x = x + scaled(attend(y, y, mask), 'attention_scale')
    y = LayerNorm(c.eps, name='mlp_norm')(x)
    mlp = GatedMlp if c.activation == 'swiglu' else Mlp
    return x + scaled(mlp(c, self.dtype, name='mlp')(y), 'mlp_scale')


class Encoder(nn.Module):
  """A stack of layers and a final norm.

  Layers are separate subtrees (`layers_0`, ...). On one device they run in a Python loop of
  calls of one function, which is traced and lowered once. On several devices their weights are
  stacked and scanned, so that only one layer is compiled; the stack copies a device's share of the
  weights.
  """

  config: EncoderConfig
  dtype: jnp.dtype

  def setup(self) -> None:
    self.layers = [Layer(self.config, self.dtype) for _ in range(self.config.layers)]
    self.norm = LayerNorm(self.config.eps)

  def __call__(self, x: Array, mask: Array | None = None, depth: int | None = None) -> Array:
    """Tokens [B, L, D] after the final norm, or the raw output of the first `depth` layers."""
    layers = self.layers[:depth]
    if self.is_initializing():
      for layer in layers:
        x = layer(x, mask)
    else:
      x, _ = self._run(layers, x, mask, Taps())
    return self.norm(x) if depth is None else x

  def tapped(self, x: Array, taps: Taps, mask: Array | None = None) -> Array:
    """Hidden states [n, B, L, D] after `taps.hidden` layers; layers after the last don't run.

    Raises:
      UserError: `taps` selects a missing layer, no hidden states, or keys and values.
    """
    taps.check(self.config.layers)
    if taps.kv or not taps.hidden:
      raise UserError(
        f'taps.hidden is {taps.hidden} and taps.kv {taps.kv}: an encoder returns only '
        'hidden states, of at least one layer'
      )
    _, states = self._run(self.layers[: max(taps.hidden)], x, mask, taps)
    return self.norm(states.hidden) if taps.normed else states.hidden

  def _run(
    self, layers: list[Layer], x: Array, mask: Array | None, taps: Taps
  ) -> tuple[Array, Tapped]:
    """The raw output of the last of `layers`, and the hidden states that `taps` names."""
    weights = [layer.variables['params'] for layer in layers]
    layer = Layer(self.config, self.dtype, parent=None)
    one = lambda x, params: layer.apply({'params': params}, x, mask)
    tapped, slots = taps.buffers(x), taps.slots(len(layers))
    if len(weights) < 2 or not sharding.is_sharded():
      one = jax.jit(one)
      for i, params in enumerate(weights):
        x = one(x, params)
        tapped = tapped.write(taps.select(x), slots.layer(i))
      return x, tapped

    def step(carry: tuple[Array, Tapped], inputs: tuple[Params, Tapped]) -> Any:
      x = one(sharding.constrain(carry[0], ('batch', None, None)), inputs[0])
      return (x, carry[1].write(taps.select(x), inputs[1])), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    return jax.lax.scan(step, (x, tapped), (stacked, slots))[0]


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
  """Flattened patches in raster order: [B, H, W, C] -> [B, P, patch * patch * C]."""
  return einops.rearrange(images, 'B (h p) (w q) C -> B (h w) (p q C)', p=patch, q=patch)


def resize_positions(table: Array, side: int, height: int, width: int) -> Array:
  """A square position table [side^2, D], bicubically resampled to [height * width, D].

  It uses PyTorch's bicubic kernel (a = -0.75), half-pixel centres and no antialiasing, as Show-o2
  (misc.py) and transformers' DINOv2 and CLIP. A table of the right size is returned unchanged.
  """
  if (height, width) == (side, side):
    return table
  square = table.astype(jnp.float32).reshape(side, side, -1)
  shape = (height, width, square.shape[-1])
  method = jax.image.ResizeMethod.CUBIC_PYTORCH
  return jax.image.resize(square, shape, method, antialias=False).reshape(height * width, -1)


class ClassTokens(nn.Module):
  """Images [B, H, W, C] -> class token and patches plus position embeddings: [B, 1 + P, width].

  For images of other sizes than `side * patch` pixels, position embeddings of the patches are
  resampled bicubically.
  """

  width: int
  patch: int
  side: int  # of the position table's square, in patches
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images: Array) -> Array:
    normal = nn.initializers.normal(0.02)
    first = self.param('class', normal, (self.width,))
    position = self.param('position', normal, (1 + self.side**2, self.width))
    embed = Dense(self.width, use_bias=self.use_bias, dtype=self.dtype, name='patch')
    height, width = (side // self.patch for side in images.shape[1:3])
    # Pixels that don't fill a patch are left out, as by the convolution of the original networks.
    images = images[:, : height * self.patch, : width * self.patch].astype(self.dtype)
    x = embed(patches(images, self.patch))
    first = jnp.broadcast_to(first.astype(self.dtype), (x.shape[0], 1, self.width))
    table = resize_positions(position[1:], self.side, height, width)
    table = jnp.concatenate([position[:1], table])
    return jnp.concatenate([first, x], axis=1) + table.astype(self.dtype)
