"""Transfusion: a class, prefix codes, and a noisy image in one decoder.

Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model (arXiv 2408.11039)
without text. Prefix codes, such as a visual prompt, may come between class and image:

  sequence  [cls] s_1 ... s_P   x_1 ... x_N
  attends    to earlier tokens   to all tokens
  position   0    1  ...  P      P + 1, all of them

An image token is the sum of three embeddings: of a patch of noisy latents, of the time, and of row
and column (sines and cosines). All image tokens have the same rotary position (BAGEL's layout,
third_party/bagel).
Time and velocity are those of vpe_jax.contracts.

Parameter tree: `embed/classes`, with prefix codes also `embed/prefix` (input embeddings and output
head); `time/{hidden,out}`, `latents/{in,out}`, `layers` (stacked), `norm`. `Transfusion` holds no
arrays: every method is a pure function of the parameters.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vpe_jax.config import check, check_sizes
from vpe_jax.contracts import Array, Params, Visibility
from vpe_jax.models import mot
from vpe_jax.models.dense import Dense
from vpe_jax.models.diffusion_head import FREQUENCIES, waves
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.ops.matmul import matmul_transposed
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.spans import Layout, Span


@dataclasses.dataclass(frozen=True)
class TransfusionConfig:
  """Sizes of the model.

  Attributes:
    classes: entries of the class table, including the null class if the model has one.
    prefix_codes: entries of the codebook of prefix codes; 0: the model has no prefix codes.
    prefix_tokens: number P of prefix codes of a sequence; 0 if the model has none.
    latent_size: side of the latent grid.
    latent_channels: channels C of a latent.
    patch: side of the latent patch that one image token covers.
    body: the layers; its width is a multiple of 4.
  """

  classes: int
  prefix_codes: int
  prefix_tokens: int
  latent_size: int
  latent_channels: int
  patch: int
  body: TransformerConfig

  def __post_init__(self) -> None:
    check_sizes(self, prefix_codes=0, prefix_tokens=0)
    divides = self.latent_size % self.patch == 0
    check(self, 'model.', 'patch', divides, f'a divisor of latent_size={self.latent_size}')
    quarters = self.body.width % 4 == 0
    rule = 'a multiple of 4: sines and cosines of two axes'
    check(self.body, 'model.body.', 'width', quarters, rule)

  @property
  def side(self) -> int:
    """Side of the grid of image tokens."""
    return self.latent_size // self.patch

  @property
  def image_tokens(self) -> int:
    """Tokens N of an image."""
    return self.side**2

  @property
  def first(self) -> int:
    """Index of the first image token in the sequence."""
    return 1 + self.prefix_tokens

  @property
  def layout(self) -> Layout:
    """The sequence: class token, prefix codes, and the image at one position."""
    spans = [Span('class', 1, 'decoder')]
    if self.prefix_tokens:
      spans.append(Span('prefix', self.prefix_tokens, 'decoder', condition='prefix'))
    image = Span('image', self.image_tokens, 'decoder', full=True, shared_position=True)
    return Layout((*spans, image))

  @property
  def channels(self) -> int:
    """Values per image token: patch * patch * C."""
    return self.patch**2 * self.latent_channels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Positions and visibility of all slots of sequences [B, 1 + P + N]."""

  positions: Array
  visibility: Visibility

  def stream(self, x: Array, start: Array | int = 0) -> mot.Stream:
    """The stream of tokens x [B, L, D] in the slots from `start` on."""
    cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, x.shape[1], 1)
    return mot.Stream(x, cut(self.positions), jax.tree.map(cut, self.visibility))


@dataclasses.dataclass(frozen=True)
class Transfusion(mot.OneExpert):
  """The network of one configuration, computing in `dtype`."""

  config: TransfusionConfig

  def _dense(self) -> dict[str, Dense]:
    width = self.config.body.width
    zeros = nn.initializers.zeros
    return {
      'hidden': Dense(width),
      'out': Dense(width),
      'latents_in': Dense(width, dtype=self.dtype),
      # Starts at zero: a fresh network predicts the mean velocity, 0.
      'latents_out': Dense(self.config.channels, kernel_init=zeros, dtype=self.dtype),
    }

  def init(self, rng: Array) -> Params:
    """Fresh parameters, float32."""
    c, dense = self.config, self._dense()
    D = c.body.width
    keys = jax.random.split(rng, 7)
    table = lambda key, rows: 0.02 * jax.random.normal(key, (rows, D))
    fresh = lambda name, key, inputs: dense[name].init(key, jnp.zeros((1, inputs)))['params']
    embed = {'classes': table(keys[0], c.classes)}
    if c.prefix_codes:
      embed['prefix'] = table(keys[1], c.prefix_codes)
    return {
      'embed': embed,
      'time': {
        'hidden': fresh('hidden', keys[2], 2 * FREQUENCIES),
        'out': fresh('out', keys[3], D),
      },
      'latents': {
        'in': fresh('latents_in', keys[4], c.channels),
        'out': fresh('latents_out', keys[5], D),
      },
      'layers': mot.init_layers(self.layer, keys[6]),
      'norm': {'scale': jnp.ones((D,))},
    }

  def slots(self, keep: Array) -> Slots:
    """The slots of a batch; where `keep` (bool [B]) is False, prefix codes are absent.

    The image then has the position after the class, because positions count present tokens only.
    """
    region = build(self.config.layout, keep=keep)['decoder']
    return Slots(region.positions, region.visibility)

  def embed_classes(self, params: Params, classes: Array) -> Array:
    """Class tokens [B, 1, D] of classes [B]."""
    return jnp.take(params['embed']['classes'], classes, axis=0)[:, None].astype(self.dtype)

  def embed_prefix(self, params: Params, codes: Array) -> Array:
    """Tokens [B, L, D] of prefix codes [B, L]."""
    return jnp.take(params['embed']['prefix'], codes, axis=0).astype(self.dtype)

  def embed_image(self, params: Params, latents: Array, time: Array) -> Array:
    """Image tokens [B, N, D] of noisy latents [B, h, w, C] at times [B]."""
    c, dense = self.config, self._dense()
    p = c.patch
    patches = rearrange(latents, 'B (h p) (w q) C -> B (h w) (p q C)', p=p, q=p)
    x = dense['latents_in'].apply({'params': params['latents']['in']}, patches.astype(self.dtype))
    hidden = dense['hidden'].apply({'params': params['time']['hidden']}, waves(time))
    clock = dense['out'].apply({'params': params['time']['out']}, jax.nn.silu(hidden))
    return x + (clock + grid_waves(c.side, c.body.width)).astype(self.dtype)

  def logits(self, params: Params, hidden: Array) -> Array:
    """Logits [B, L, prefix_codes] float32 of the next prefix code, from hidden states [B, L, D]."""
    table = params['embed']['prefix'].astype(hidden.dtype)
    return matmul_transposed(hidden, table).astype(jnp.float32)

  def velocity(self, params: Params, hidden: Array) -> Array:
    """The velocity (noise - data) [B, h, w, C] float32 from the image's hidden states [B, N, D]."""
    c = self.config
    out = self._dense()['latents_out'].apply({'params': params['latents']['out']}, hidden)
    return rearrange(
      out.astype(jnp.float32),
      'B (h w) (p q C) -> B (h p) (w q) C',
      h=c.side,
      p=c.patch,
      q=c.patch,
    )

  def __call__(
    self,
    params: Params,
    classes: Array,
    prefix: Array,
    keep: Array,
    noisy: tuple[Array, Array],
  ) -> tuple[Array, Array]:
    """Whole sequences at once, as in training.

    Args:
      params: parameters of the model.
      classes: class ids [B].
      prefix: prefix codes [B, P]; P = 0 if the model has none.
      keep: bool [B]: whether an example has its prefix codes.
      noisy: latents [B, h, w, C] and their times [B].

    Returns:
      Final-norm hidden states of class and prefix [B, 1 + P, D], and the velocity [B, h, w, C].
    """
    tokens = [self.embed_classes(params, classes)]
    if self.config.prefix_codes:
      tokens.append(self.embed_prefix(params, prefix))
    x = jnp.concatenate([*tokens, self.embed_image(params, *noisy)], axis=1)
    hidden, _ = self.states(params, self.slots(keep).stream(x))
    first = self.config.first
    return hidden[:, :first], self.velocity(params, hidden[:, first:])


def grid_waves(side: int, width: int) -> np.ndarray:
  """Fixed embeddings of the cells of a square grid in raster order: float32 [side ** 2, width].

  Sine and cosine of the column, then sine and cosine of the row, take a quarter of the width each
  (the two-dimensional table of MAE and DiT, which BAGEL uses).
  """
  quarter = width // 4
  freq = 1e4 ** (-np.arange(quarter, dtype=np.float64) / quarter)
  rows, columns = np.divmod(np.arange(side**2), side)
  angles = [axis[:, None] * freq for axis in (columns, rows)]
  parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(parts, axis=1).astype(np.float32)
