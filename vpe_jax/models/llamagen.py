"""LlamaGen's GPT: the codes of a picture, one after the other, from its class.

Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (arXiv 2406.06525). A row
is a class token and the picture's codes in raster order; positions are rotary on the codes' grid.

Parameter tree: `embed/{classes,codes}`, `layers` (stacked), `norm`, `head/kernel`. `LlamaGen` holds
no arrays: every method is a pure function of the parameters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax.config import check_sizes
from vpe_jax.contracts import Array, Params, Visibility
from vpe_jax.data.sequence import NEVER
from vpe_jax.models import mot
from vpe_jax.models.transformer import Layer, RMSNorm, TransformerConfig
from vpe_jax.ops import rope


@dataclasses.dataclass(frozen=True)
class LlamaGenConfig:
  """Sizes of the model.

  Attributes:
    classes: of pictures; row `classes` of their table is the null class, for guidance.
    codes: entries V of the codebook.
    side: of the square grid of codes.
    body: the layers; neighbours turn together (`rope_adjacent`).
    class_turn: what its rotation does to the class token's queries and keys: `zero` (all released
      weights: every code gives it the logit 0) or `identity`.
  """

  classes: int
  codes: int
  side: int
  body: TransformerConfig
  class_turn: str = 'zero'

  def __post_init__(self) -> None:
    check_sizes(self)


@dataclasses.dataclass(frozen=True)
class LlamaGen:
  """The network of one configuration, computing in `dtype`."""

  config: LlamaGenConfig
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  attention: str = ''

  @property
  def layer(self) -> Layer:
    """The layer module, which `mot.empty_cache` asks for."""
    return Layer(self.config.body, self.dtype)

  def init(self, rng: Array) -> Params:
    """Fresh parameters, float32."""
    c = self.config
    first, second, third = jax.random.split(rng, 3)
    table = lambda key, rows: 0.02 * jax.random.normal(key, (rows, c.body.width))
    return {
      'embed': {'classes': table(first, c.classes + 1), 'codes': table(second, c.codes)},
      'layers': mot.init_layers(self.layer, third),
      'norm': {'scale': jnp.ones((c.body.width,))},
      # The first prediction of a fresh network is uniform.
      'head': {'kernel': jnp.zeros((c.body.width, c.codes))},
    }

  def embed_classes(self, params: Params, classes: Array) -> Array:
    """Class tokens [B, 1, D] of classes [B]."""
    return jnp.take(params['embed']['classes'], classes, axis=0)[:, None].astype(self.dtype)

  def embed_codes(self, params: Params, codes: Array) -> Array:
    """Tokens [B, L, D] of codes [B, L]."""
    return jnp.take(params['embed']['codes'], codes, axis=0).astype(self.dtype)

  def stream(self, x: Array, start: Array | int = 0) -> mot.Stream:
    """Tokens [B, L, D] at the places `start`, `start` + 1, ... of their rows.

    Place 0 is the class token's, place 1 + n that of code n. The visibility of a whole row is what
    `mot.empty_cache` asks for.
    """
    c = self.config
    order = jnp.broadcast_to(start + jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    zeros = jnp.zeros_like(order)
    visibility = Visibility(order, zeros, order + 1, jnp.full_like(order, NEVER))
    at = jnp.maximum(order - 1, 0)
    grid = jnp.stack([at // c.side, at % c.side], axis=-1)
    cos, sin = rope.rotary_grid(grid, c.body.head_width, c.body.rope_theta)
    is_class = (order == 0)[..., None, None]
    cos = jnp.where(is_class, 0.0 if c.class_turn == 'zero' else 1.0, cos)
    return mot.Stream(x, order, visibility, rotation=(cos, jnp.where(is_class, 0.0, sin)))

  def run(
    self,
    params: Params,
    stream: mot.Stream,
    cache: mot.Cache | None = None,
    at: Array | int = 0,
  ) -> tuple[Array, mot.Cache | None]:
    """Logits [B, L, V] float32 of the code after each token, and the written cache.

    `cache` and `at` are those of `mot.run`.
    """
    layers, stacks = {'codes': self.layer}, {'codes': params['layers']}
    hidden, cache = mot.run(
      layers, stacks, {'codes': stream}, cache, at, self.remat, self.attention
    )
    norm = RMSNorm(self.config.body.eps)
    hidden = norm.apply({'params': params['norm']}, hidden['codes'])
    kernel = params['head']['kernel'].astype(hidden.dtype)
    return jnp.einsum('BLD,DV->BLV', hidden, kernel).astype(jnp.float32), cache

  def __call__(self, params: Params, classes: Array, codes: Array) -> Array:
    """Logits [B, P, V] float32 of the codes [B, P], each from those before it and the class [B]."""
    before = self.embed_codes(params, codes[:, :-1])
    x = jnp.concatenate([self.embed_classes(params, classes), before], axis=1)
    return self.run(params, self.stream(x))[0]
