"""The decoder layer (Qwen2, Llama), shared by training, cached decoding and the flow head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.config import check, check_positive, check_sizes
from vpe_jax.contracts import Array
from vpe_jax.models.dense import Dense, DenseGeneral
from vpe_jax.models.dropout import Dropout, drop
from vpe_jax.ops import norms, rope

# Logical axis names (vpe_jax.sharding) of stacked layer parameters, by path.
_HEADS = ('layers', 'embed', 'heads', 'head')
_KV_HEADS = ('layers', 'embed', 'kv_heads', 'head')
LAYER_AXES = (
  (r'(cross/)?q/kernel', _HEADS),
  (r'(cross/)?q/bias', ('layers', 'heads', 'head')),
  (r'(cross/)?[kv]/kernel', _KV_HEADS),
  (r'(cross/)?[kv]/bias', ('layers', 'kv_heads', 'head')),
  (r'(cross/)?o/kernel', ('layers', 'heads', 'head', 'embed')),
  (r'(gate|up)/kernel', ('layers', 'embed', 'mlp')),
  (r'down/kernel', ('layers', 'mlp', 'embed')),
  (r'[qk]_norm/scale', ('layers', 'head')),
  (r'(attention|mlp|cross/query|cross/context)_norm/scale', ('layers', 'embed')),
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes of a stack of decoder layers.

  Attributes:
    width: model width D.
    mlp: hidden width of the SwiGLU.
    layers: number of layers.
    heads: query heads N.
    kv_heads: key/value heads K, a divisor of `heads`.
    head_width: width H of a head, even.
    rope_theta: base of the rotary frequencies.
    rope_scaling: Llama 3's stretch of the rotary frequencies, or None.
    qkv_bias: whether q, k and v have a bias (Qwen2).
    qk_norm: whether each head's q and k are RMS-normalised before rotation.
    eps: epsilon of the RMS norms, except those of `qk_norm` (1e-6).
    rope_adjacent: whether the rotary embedding pairs neighbouring channels of a head (LlamaGen)
      instead of its two halves.
  """

  width: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  rope_theta: float = 1e6
  rope_scaling: rope.RopeScaling | None = None
  qkv_bias: bool = True
  qk_norm: bool = False
  eps: float = 1e-6
  rope_adjacent: bool = False

  def __post_init__(self) -> None:
    check_sizes(self)
    check_positive(self, '', 'rope_theta', 'eps')
    shared = self.heads % self.kv_heads == 0
    check(self, '', 'kv_heads', shared, f'a divisor of heads={self.heads}')
    even = self.head_width % 2 == 0
    check(self, '', 'head_width', even, 'even: the rotary embedding rotates pairs of channels')


class RMSNorm(nn.Module):
  """RMS normalisation with a learned scale."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    return norms.rms_norm(x, scale, self.eps)


class Modulation(nn.Module):
  """adaLN: `parts` vectors [B, 1, width] float32 from a condition [B, 1, D].

  All start at zero, so that a modulated layer starts as the identity.
  """

  parts: int
  width: int

  @nn.compact
  def __call__(self, condition: Array) -> list[Array]:
    zeros = nn.initializers.zeros
    out = Dense(self.parts * self.width, kernel_init=zeros, bias_init=zeros, name='out')
    # Modulation stays in float32: it scales every token of the image.
    return jnp.split(out(jax.nn.silu(condition.astype(jnp.float32))), self.parts, axis=-1)


class CrossAttention(nn.Module):
  """Attention of tokens to a context: hidden states of another sequence.

  Tokens and context are RMS-normalised first, each with a scale of its own; queries and keys are
  rotated as in self-attention, so that the context has an order. The output projection starts at
  zero: a fresh layer computes the same as one without cross-attention.
  """

  config: TransformerConfig
  dtype: jnp.dtype

  def setup(self) -> None:
    c = self.config
    heads = lambda n: DenseGeneral((n, c.head_width), use_bias=c.qkv_bias, dtype=self.dtype)
    self.query_norm = RMSNorm(c.eps)
    self.context_norm = RMSNorm(c.eps)
    self.q = heads(c.heads)
    self.k = heads(c.kv_heads)
    self.v = heads(c.kv_heads)
    self.o = DenseGeneral(
      c.width,
      axis=(-2, -1),
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros,
    )

  def keys_values(self, context: Array, tables: tuple[Array, Array]) -> tuple[Array, Array]:
    """Keys and values [B, S, K, H] of a context [B, S, D]; `tables` are those of rope.rotary."""
    y = self.context_norm(context)
    return rope.rotate(self.k(y), tables, self.config.rope_adjacent), self.v(y)

  def __call__(
    self, x: Array, tables: tuple[Array, Array], attend: Callable[[Array], Array]
  ) -> Array:
    """Output [B, L, D] for tokens [B, L, D]; `attend` maps queries to mixed values [B, L, N, H]."""
    q = rope.rotate(self.q(self.query_norm(x)), tables, self.config.rope_adjacent)
    return self.o(attend(q))


class Layer(nn.Module):
  """A pre-norm layer in two halves, so that several experts can share one attention between them.

  `project` computes q, k and v of this expert's tokens, and `rotate` applies the rotary embedding
  to q and k. After attention, `finish` computes the output from the mixed values.

  A `modulated` layer has `modulate`, whose output is the argument `modulation` of `project` and
  `finish`: six parts [B, 1, D] float32 in the order shift, scale, gate of the attention, then of
  the MLP (Show-o2's diffusion head). It is None for tokens that are not modulated. In a `crossed`
  layer, `finish` runs cross-attention before the MLP. With dropout keys, `finish` applies
  `dropout`.
  """

  config: TransformerConfig
  dtype: jnp.dtype
  modulated: bool = False
  crossed: bool = False
  dropout: Dropout = Dropout()

  def setup(self) -> None:
    c = self.config
    heads = lambda n: DenseGeneral((n, c.head_width), use_bias=c.qkv_bias, dtype=self.dtype)
    dense = lambda width: Dense(width, use_bias=False, dtype=self.dtype)
    self.attention_norm = RMSNorm(c.eps)
    self.q = heads(c.heads)
    self.k = heads(c.kv_heads)
    self.v = heads(c.kv_heads)
    self.o = DenseGeneral(c.width, axis=(-2, -1), use_bias=False, dtype=self.dtype)
    if c.qk_norm:
      self.q_norm = RMSNorm(1e-6)
      self.k_norm = RMSNorm(1e-6)
    self.mlp_norm = RMSNorm(c.eps)
    self.gate = dense(c.mlp)
    self.up = dense(c.mlp)
    self.down = dense(c.width)
    if self.modulated:
      self.modulation = Modulation(6, c.width)
    if self.crossed:
      self.cross = CrossAttention(c, self.dtype)

  def modulate(self, condition: Array) -> list[Array]:
    """The six parts of the modulation, from the condition [B, 1, D]."""
    return self.modulation(condition)

  def project(self, x: Array, modulation: list[Array] | None = None) -> tuple[Array, Array, Array]:
    """q [B, L, N, H], k and v [B, L, K, H] of tokens x [B, L, D], not rotated."""
    y = self.attention_norm(x)
    if modulation is not None:
      y = norms.modulate(y, modulation[0], modulation[1])
    q, k, v = self.q(y), self.k(y), self.v(y)
    if self.config.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    return q, k, v

  def rotate(self, heads: Array, tables: tuple[Array, Array]) -> Array:
    """q or k [B, L, N, H] after the rotary embedding; `tables` are those of rope.rotary."""
    return rope.rotate(heads, tables, self.config.rope_adjacent)

  def context_kv(self, context: Array, tables: tuple[Array, Array]) -> tuple[Array, Array]:
    """Keys and values of cross-attention; see CrossAttention.keys_values."""
    return self.cross.keys_values(context, tables)

  def finish(
    self,
    x: Array,
    mixed: Array,
    modulation: list[Array] | None = None,
    tables: tuple[Array, Array] | None = None,
    attend: Callable[[Array], Array] | None = None,
    keys: Array | None = None,
  ) -> Array:
    """The layer's output [B, L, D] from its input x [B, L, D] and the mixed values [B, L, N, H].

    `tables` and `attend` are arguments of CrossAttention, which runs only if `attend` is given.
    `keys` [B] are dropout keys, one per sequence; None: nothing is dropped.
    """
    modulated = modulation is not None
    attention_gate, shift, scale, mlp_gate = modulation[2:] if modulated else (None,) * 4
    y = drop(self.o(mixed), self.dropout.residual, keys, 'residual')
    x = x + _gated(y, attention_gate)
    if attend is not None:
      x = x + self.cross(x, tables, attend)
    y = self.mlp_norm(x)
    if modulated:
      y = norms.modulate(y, shift, scale)
    y = self.down(jax.nn.silu(self.gate(y)) * self.up(y))
    y = drop(y, self.dropout.mlp, keys, 'mlp')
    return x + _gated(y, mlp_gate)

  def __call__(
    self, x: Array, tables: tuple[Array, Array], condition: Array | None = None
  ) -> Array:
    """Touches every parameter, for `init`: q stands in for the mixed values."""
    modulation = self.modulate(condition) if self.modulated else None
    q, _, _ = self.project(x, modulation)
    q = self.rotate(q, tables)
    if not self.crossed:
      return self.finish(x, q, modulation)
    self.context_kv(x, tables)
    return self.finish(x, q, modulation, tables, lambda queries: queries)


def _gated(y: Array, gate: Array | None) -> Array:
  return y if gate is None else (y.astype(jnp.float32) * gate).astype(y.dtype)
