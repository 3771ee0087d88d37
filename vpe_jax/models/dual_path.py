"""Show-o2's dual-path embedding: semantic and low-level features of latents, fused.

Source: reference implementation Show-o2 (third_party/show_o2): `image_embedder_und`,
`position_embedding`, `und_trans` (a SigLIP encoder), `image_embedder_gen` and `fusion_proj`.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.config import check_sizes
from vpe_jax.contracts import Array, Params
from vpe_jax.models import mot, vit
from vpe_jax.models.dense import Dense
from vpe_jax.models.transformer import RMSNorm


@dataclasses.dataclass(frozen=True)
class DualPathConfig:
  """Sizes of the dual path.

  Attributes:
    encoder: the encoder of the semantic path.
    table: side of the square table of position embeddings, in patches.
  """

  encoder: vit.EncoderConfig
  table: int

  def __post_init__(self) -> None:
    check_sizes(self)


class Ends(nn.Module):
  """The dual path without its encoder: embeddings and positions before it, fusion after it."""

  config: DualPathConfig
  width: int  # model width D of the expert that reads the image tokens
  patch: int
  dtype: jnp.dtype

  def setup(self) -> None:
    c = self.config
    dense = lambda width: Dense(width, dtype=self.dtype)
    self.und = dense(c.encoder.width)
    self.gen = dense(self.width)
    self.positions = self.param(
      'positions', nn.initializers.normal(0.02), (c.table**2, c.encoder.width)
    )
    self.fusion_norm = RMSNorm(1e-6)
    self.fusion_in = dense(self.width)
    self.fusion_out = dense(self.width)

  def embed(self, latents: Array) -> tuple[Array, Array]:
    """Encoder inputs and low-level features of latents [B, h, w, C].

    They are [B, P, encoder width] and [B, P, D].
    """
    patches = vit.patches(latents.astype(self.dtype), self.patch)
    height, width = (side // self.patch for side in latents.shape[1:3])
    table = vit.resize_positions(self.positions, self.config.table, height, width)
    return self.und(patches) + table.astype(self.dtype), self.gen(patches)

  def fuse(self, und: Array, gen: Array) -> Array:
    """Image tokens [B, P, D] from encoder outputs and low-level features, shaped as in `embed`."""
    both = self.fusion_norm(jnp.concatenate([und, gen], axis=-1))
    return self.fusion_out(jax.nn.gelu(self.fusion_in(both), approximate=False))

  def __call__(self, latents: Array) -> Array:
    """Touches every parameter, for `init`; the encoder between the two halves is left out."""
    return self.fuse(*self.embed(latents))


@dataclasses.dataclass(frozen=True)
class DualPath:
  """Maps latents [B, h, w, C] to image tokens [B, P, D]; parameters `ends` and `encoder`."""

  config: DualPathConfig
  width: int
  patch: int
  dtype: jnp.dtype
  remat: str = 'none'  # a key of mot.REMAT
  attention: str = ''  # implementation, see vit.Attention

  @property
  def _parts(self) -> tuple[Ends, vit.Layer]:
    ends = Ends(self.config, self.width, self.patch, self.dtype)
    return ends, vit.Layer(self.config.encoder, self.dtype, self.attention)

  def init(self, rng: Array, latents: Array) -> Params:
    """Fresh parameters for latents [B, h, w, C]; those of the encoder are stacked over layers."""
    ends, layer = self._parts
    first, second = jax.random.split(rng)
    x = jnp.zeros((1, 1, self.config.encoder.width))
    keys = jax.random.split(second, self.config.encoder.layers)
    return {
      'ends': ends.init(first, latents)['params'],
      'encoder': jax.vmap(lambda key: layer.init(key, x)['params'])(keys),
    }

  def __call__(self, params: Params, latents: Array) -> Array:
    """Image tokens of latents; `params['encoder']` is stacked over layers, or a tuple of layers."""
    ends, layer = self._parts
    variables = {'params': params['ends']}

    def one(x: Array, weights: Params) -> tuple[Array, None]:
      x = sharding.constrain(x, ('batch', None, None))
      return layer.apply({'params': weights}, x), None

    # Without remat, the backward pass saves the activations of each layer: with dense attention
    # also the weights [P, P] of each head.
    if mot.REMAT[self.remat] is not None:
      one = jax.checkpoint(one, policy=mot.REMAT[self.remat])
    und, gen = ends.apply(variables, latents, method='embed')
    if isinstance(params['encoder'], tuple):
      for weights in params['encoder']:
        und, _ = one(und, weights)
    else:
      und, _ = jax.lax.scan(one, und, params['encoder'])
    return ends.apply(variables, und, gen, method='fuse')
