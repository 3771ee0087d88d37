"""Show-o2's flow head: time embedding and modulated decoder layers over the whole sequence.

Source: reference implementation Show-o2 (third_party/show_o2), modules of its `diffusion_head_a`,
`diffusion_head_b`, `time_embed`, `time_embed_proj` and `diff_proj`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array
from vpe_jax.models.dense import Dense
from vpe_jax.models.transformer import Modulation, RMSNorm, TransformerConfig
from vpe_jax.ops import norms, rope

FREQUENCIES = 128  # of the time embedding: a cosine and a sine for each


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  """Sizes of the flow head, whose width may differ from that of the experts."""

  width: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  rope_theta: float = 5e5
  rope_scaling: rope.RopeScaling | None = rope.RopeScaling()

  def __post_init__(self) -> None:
    _ = self.blocks  # TransformerConfig checks these fields, which have the same names there.

  @property
  def blocks(self) -> TransformerConfig:
    """Sizes of the modulated layers: no bias, per-head q/k norms before rotation."""
    return TransformerConfig(
      width=self.width,
      mlp=self.mlp,
      layers=self.layers,
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_width=self.head_width,
      rope_theta=self.rope_theta,
      rope_scaling=self.rope_scaling,
      qkv_bias=False,
      qk_norm=True,
      eps=1e-5,
    )


def waves(clock: Array) -> Array:
  """Cosines, then sines, of times [B] at falling frequencies: [B, 1, 2 * FREQUENCIES] float32."""
  freq = np.exp(-np.log(1e4) * np.arange(FREQUENCIES, dtype=np.float64) / FREQUENCIES)
  angle = clock.astype(jnp.float32)[:, None, None] * freq.astype(np.float32)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nn.Module):
  """Embeds Show-o2's clock: the time from 0 (noise) to 1 (data), not multiplied by a factor.

  One result is the condition of the modulation, in float32 because it scales every image token. The
  other is the time token, which precedes the image tokens.
  """

  config: HeadConfig
  width: int  # of the expert that processes the time token

  @nn.compact
  def __call__(self, clock: Array) -> tuple[Array, Array]:
    """Condition [B, 1, head width] and time token [B, 1, width] for clocks [B]."""
    hidden = Dense(self.config.width, name='in')(waves(clock))
    condition = Dense(self.config.width, name='out')(jax.nn.silu(hidden))
    return condition, Dense(self.width, name='token')(condition)


class Entry(nn.Module):
  """Projects final-norm hidden states of the experts [B, L, D] to [B, L, head width]."""

  config: HeadConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, hidden: Array) -> Array:
    dense = lambda name: Dense(self.config.width, dtype=self.dtype, name=name)
    return dense('out')(jax.nn.gelu(dense('in')(hidden), approximate=False))


class Exit(nn.Module):
  """Velocities [B, L, channels] float32 of image tokens [B, L, head width].

  A modulated norm with the condition [B, 1, head width], then a linear map.
  """

  config: HeadConfig
  channels: int  # values per image token: patch * patch * latent channels
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, hidden: Array, condition: Array) -> Array:
    shift, scale = Modulation(2, self.config.width, name='modulation')(condition)
    y = norms.modulate(RMSNorm(1e-6, name='norm')(hidden), shift, scale)
    # Starts at zero: a fresh network predicts the mean velocity, 0.
    out = Dense(self.channels, kernel_init=nn.initializers.zeros, dtype=self.dtype, name='out')
    return out(y).astype(jnp.float32)
