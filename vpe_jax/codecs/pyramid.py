"""The convolutional encoder and decoder that most image autoencoders share.

VQGAN's (arXiv 2012.09841) residual blocks at ever lower resolution, attention in the middle, and
the mirror image back. Latent diffusion's and FLUX's KL autoencoders, LlamaGen's and Emu3.5's
tokenizers, and Wan's autoencoder on a still image are this network; they differ in the fields of
`PyramidConfig`.
"""

from __future__ import annotations

import dataclasses

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax.config import check_sizes
from vpe_jax.contracts import Array, UserError
from vpe_jax.ops import norms


@dataclasses.dataclass(frozen=True)
class PyramidConfig:
  """Sizes of an encoder and its decoder.

  Attributes:
    widths: channels of each level, from the pictures' resolution down; each level has half the
      resolution of the one before.
    blocks: residual blocks per level of the encoder; the decoder has one more.
    outputs: channels that the encoder gives.
    inputs: channels that the decoder takes.
    colours: channels of a picture.
    attention: levels (0 is the pictures' resolution) with attention after each block.
    middle: whether the lowest resolution has attention between its last two blocks.
    groups: groups of channels that are normalised together over the whole picture; 0: each place
      is divided by the root mean square of its own channels, without a bias (Wan).
    halve: whether going up a level halves the channels (Wan) or leaves that to the next block.
    fine_first: whether the names of the decoder's levels count from the pictures' resolution
      (VQGAN's own code) or in the order in which they run.
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
    uneven = [width for width in self.widths if self.groups and width % self.groups]
    if uneven:
      raise UserError(f'{uneven[0]} channels are not {self.groups} groups of equal size')

  @property
  def factor(self) -> int:
    """Pixels per latent, per side."""
    return 2 ** (len(self.widths) - 1)


class Norm(nn.Module):
  """Normalisation with a learned scale, and a bias where groups are normalised."""

  groups: int
  eps: float = 1e-6  # of group normalisation

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    if not self.groups:
      # x / |x| * sqrt(C): the smallest eps that keeps a black place finite.
      return norms.rms_norm(x, scale, 1e-24)
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return norms.group_norm(x, scale, bias, self.groups, self.eps)


class _Part(nn.Module):
  """Settings shared by all parts."""

  config: PyramidConfig
  dtype: jnp.dtype

  def conv(self, width: int, name: str, side: int = 3, **options) -> nn.Conv:
    """A convolution that keeps the resolution unless options say otherwise."""
    return nn.Conv(width, (side, side), dtype=self.dtype, name=name, **options)

  def norm(self, name: str) -> Norm:
    return Norm(self.config.groups, name=name)

  def part(self, kind: type[_Part], name: str, **given) -> _Part:
    return kind(self.config, self.dtype, name=name, **given)


class Block(_Part):
  """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution of x where the width changes."""

  width: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = self.conv(self.width, 'conv_1')(jax.nn.silu(self.norm('norm_1')(x)))
    y = self.conv(self.width, 'conv_2')(jax.nn.silu(self.norm('norm_2')(y)))
    if x.shape[-1] != self.width:
      x = self.conv(self.width, 'shortcut', side=1)(x)
    return x + y


class Attention(_Part):
  """x + attention over all places, with one head."""

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


class Level(_Part):
  """The blocks of one resolution, each followed by attention where the config says so."""

  level: int = 0
  blocks: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    c = self.config
    for i in range(self.blocks):
      x = self.part(Block, f'block_{i}', width=c.widths[self.level])(x)
      if self.level in c.attention:
        x = self.part(Attention, f'attention_{i}')(x)
    return x


class Middle(_Part):
  """Two blocks at the lowest resolution, with attention between them."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = self.part(Block, 'block_0', width=x.shape[-1])(x)
    if self.config.middle:
      x = self.part(Attention, 'attention')(x)
    return self.part(Block, 'block_1', width=x.shape[-1])(x)


class Encoder(_Part):
  """Pictures [B, H, W, 3] -> [B, H / factor, W / factor, outputs]."""

  @nn.compact
  def __call__(self, images: Array) -> Array:
    c = self.config
    x = self.conv(c.widths[0], 'start')(images.astype(self.dtype))
    for level in range(len(c.widths)):
      x = self.part(Level, f'level_{level}', level=level, blocks=c.blocks)(x)
      if level + 1 < len(c.widths):
        # One row and column of zeros, below and to the right only.
        down = self.conv(x.shape[-1], f'down_{level}', strides=2, padding=((0, 1), (0, 1)))
        x = down(x)
    x = self.part(Middle, 'middle')(x)
    return self.conv(c.outputs, 'end')(jax.nn.silu(self.norm('norm')(x)))


class Decoder(_Part):
  """[B, h, w, inputs] -> pictures [B, h * factor, w * factor, 3], not clipped."""

  @nn.compact
  def __call__(self, latents: Array) -> Array:
    c = self.config
    x = self.conv(c.widths[-1], 'start')(latents.astype(self.dtype))
    x = self.part(Middle, 'middle')(x)
    for step, level in enumerate(reversed(range(len(c.widths)))):
      name = level if c.fine_first else step
      x = self.part(Level, f'level_{name}', level=level, blocks=c.blocks + 1)(x)
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = self.conv(x.shape[-1] // (2 if c.halve else 1), f'up_{name}')(x)
    return self.conv(c.colours, 'end')(jax.nn.silu(self.norm('norm')(x)))
