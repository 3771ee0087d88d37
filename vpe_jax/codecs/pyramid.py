"""The convolutional encoder and decoder that most image autoencoders share.

The encoder has VQGAN's (arXiv 2012.09841) residual blocks at decreasing resolutions, with optional
attention; the decoder mirrors it. The KL autoencoders of latent diffusion and FLUX, the
tokenizers of LlamaGen and Emu3.5, and Wan's autoencoder (for a still image) are this network with
different values of `PyramidConfig`.
"""

from __future__ import annotations

import dataclasses

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.config import check, check_sizes
from vpe_jax.contracts import Array
from vpe_jax.ops import norms


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
  """Sizes of an encoder and its decoder.

  Attributes:
    widths: channels of each level, from the resolution of the image down; each level has half the
      resolution of the previous one.
    blocks: residual blocks per level of the encoder; the decoder has one more per level.
    outputs: output channels of the encoder.
    inputs: input channels of the decoder.
    colours: channels of an image.
    attention: levels (0 has the resolution of the image) with attention after each block.
    middle: whether the two blocks of `Middle` have attention between them.
    groups: groups of group normalization; 0: RMS normalization over the channels of each position,
      without a bias (Wan).
    halve: true: the convolution after upsampling halves the channels (Wan); false: the next level's
      first block changes them.
    fine_first: whether `level_0` of the decoder is the finest level, as in VQGAN's code; otherwise
      it is the coarsest, which runs first. It affects only the names of parameters.
  """

  widths: tuple[int, ...]
  blocks: int
  outputs: int
  inputs: int
  colours: int = 3
  attention: tuple[int, ...] = ()
  middle: bool = True
  groups: int = 32
  halve: bool = False
  fine_first: bool = False

  def __post_init__(self) -> None:
    check_sizes(self, attention=0, groups=0, blocks=0)
    levels = len(self.widths)
    in_range = all(level < levels for level in self.attention)
    check(self, '', 'attention', in_range, f'levels below {levels}, the number of widths')
    divides = not self.groups or all(width % self.groups == 0 for width in self.widths)
    check(self, '', 'widths', divides, f'multiples of groups={self.groups}')

  @property
  def factor(self) -> int:
    """Pixels per latent along each side."""
    return 2 ** (len(self.widths) - 1)


class Norm(nn.Module):
  """Group normalization with scale and bias, or RMS normalization with a scale."""

  groups: int  # 0: RMS normalization
  eps: float = 1e-6  # of group normalization

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    if not self.groups:
      # x / |x| * sqrt(C); the eps only avoids division by zero.
      return norms.rms_norm(x, scale, 1e-24)
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return norms.group_norm(x, scale, bias, self.groups, self.eps)


class _Module(nn.Module):
  """Base class of the modules below: shared settings and constructors of submodules."""

  config: PyramidConfig
  dtype: jnp.dtype

  def conv(self, width: int, name: str, side: int = 3, **options) -> nn.Conv:
    """A convolution that preserves the resolution unless options change that."""
    return nn.Conv(width, (side, side), dtype=self.dtype, name=name, **options)

  def norm(self, name: str) -> Norm:
    """The normalization of the config."""
    return Norm(self.config.groups, name=name)

  def module(self, kind: type[_Module], name: str, **options) -> _Module:
    """A submodule with the same config and dtype."""
    return kind(self.config, self.dtype, name=name, **options)


class Block(_Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution adapts x if the width changes."""

  width: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = self.conv(self.width, 'conv_1')(jax.nn.silu(self.norm('norm_1')(x)))
    y = self.conv(self.width, 'conv_2')(jax.nn.silu(self.norm('norm_2')(y)))
    if x.shape[-1] != self.width:
      x = self.conv(self.width, 'shortcut', side=1)(x)
    return x + y


class Attention(_Module):
  """x + attention(norm(x)) over all positions, with one head."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
    y = einops.rearrange(self.norm('norm')(x), 'B h w C -> B (h w) C')
    q, k, v = dense('q')(y), dense('k')(y), dense('v')(y)
    logits = jnp.einsum('BLC,BSC->BLS', q, k).astype(jnp.float32)
    weights = jax.nn.softmax(logits * width**-0.5, -1).astype(v.dtype)
    y = dense('o')(jnp.einsum('BLS,BSC->BLC', weights, v))
    return x + y.reshape(x.shape)


class Level(_Module):
  """The blocks of one level, each followed by attention if `config.attention` has the level."""

  level: int = 0
  blocks: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    for i in range(self.blocks):
      x = self.module(Block, f'block_{i}', width=c.widths[self.level])(x)
      if self.level in c.attention:
        x = self.module(Attention, f'attention_{i}')(x)
    return x


class Middle(_Module):
  """Two blocks at the lowest resolution; if `config.middle`, with attention between them."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = self.module(Block, 'block_0', width=x.shape[-1])(x)
    if self.config.middle:
      x = self.module(Attention, 'attention')(x)
    return self.module(Block, 'block_1', width=x.shape[-1])(x)


class Encoder(_Module):
  """Images [B, H, W, 3] -> [B, H / factor, W / factor, outputs]."""

  @nn.compact
  def __call__(self, images: Array) -> Array:
    c = self.config
    x = self.conv(c.widths[0], 'start')(images.astype(self.dtype))
    for level in range(len(c.widths)):
      x = self.module(Level, f'level_{level}', level=level, blocks=c.blocks)(x)
      if level + 1 < len(c.widths):
        # Zero padding at the bottom and the right only.
        down = self.conv(x.shape[-1], f'down_{level}', strides=2, padding=((0, 1), (0, 1)))
        x = down(x)
    x = self.module(Middle, 'middle')(x)
    return self.conv(c.outputs, 'end')(jax.nn.silu(self.norm('norm')(x)))


class Decoder(_Module):
  """[B, h, w, inputs] -> images [B, h * factor, w * factor, 3], not clipped."""

  @nn.compact
  def __call__(self, latents: Array) -> Array:
    c = self.config
    x = self.conv(c.widths[-1], 'start')(latents.astype(self.dtype))
    x = self.module(Middle, 'middle')(x)
    for step, level in enumerate(reversed(range(len(c.widths)))):
      name = level if c.fine_first else step
      x = self.module(Level, f'level_{name}', level=level, blocks=c.blocks + 1)(x)
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = self.conv(x.shape[-1] // (2 if c.halve else 1), f'up_{name}')(x)
    return self.conv(c.colours, 'end')(jax.nn.silu(self.norm('norm')(x)))
