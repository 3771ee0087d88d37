"""LlamaGen's GPT: generates the codes of an image one by one, from its class.

Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation (arXiv 2406.06525). A
sequence is a class token and the image's codes in raster order; rotary positions are row and column
in the grid of codes. Prefix codes, such as a visual prompt, may come between class and image:

  sequence [cls] s_1 ... s_P z_1 ... z_N     the network runs over all but the last
  predicts  s_1  ...     z_1 ...     z_N

The head predicts joint ids: first the image's codes, then the prefix codes. Classes, image codes
and prefix codes have an embedding table each; a pad embedding replaces masked prefix codes.

Parameter tree: `embed/{classes,codes}`, with prefix codes also `embed/{prefix,pad}`; `layers`
(stacked), `norm`, `head/kernel`. `LlamaGen` holds no arrays: every method is a pure function of the
parameters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax.config import check, check_sizes
from vpe_jax.contracts import Array, Params
from vpe_jax.models import kernel_layout, mot
from vpe_jax.models.dropout import Dropout, drop
from vpe_jax.models.transformer import Layer, TransformerConfig
from vpe_jax.ops import rope
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.spans import Layout, Span


@dataclasses.dataclass(frozen=True)
class LlamaGenConfig:
  """Sizes of the model.

  Attributes:
    classes: number of classes, without the null class of guidance, which has the id `classes`.
    codes: entries V of the codebook.
    side: side of the image's square grid of codes.
    body: the layers, with `rope_adjacent` and without `rope_scaling`.
    class_rotation: rotary embedding of the class token. `zero` sets its queries and keys to 0, so
      that every code gives it the attention logit 0 (all released weights); `identity` doesn't
      rotate.
    prefix_codes: entries of the codebook of prefix codes; 0: the model has no prefix codes.
    prefix_side: side of the square grid of prefix codes.
    positions: rotary positions. `grid`: row and column, with the grid of prefix codes scaled to the
      size of the image's grid; `line`: index in the sequence.
  """

  classes: int
  codes: int
  side: int
  body: TransformerConfig
  class_rotation: str = 'zero'
  prefix_codes: int = 0
  prefix_side: int = 0
  positions: str = 'grid'

  def __post_init__(self) -> None:
    check_sizes(self)
    rotations, kinds = ('zero', 'identity'), ('grid', 'line')
    valid = self.class_rotation in rotations
    check(self, 'model.', 'class_rotation', valid, "'zero' or 'identity'")
    check(self, 'model.', 'positions', self.positions in kinds, "'grid' or 'line'")
    both = bool(self.prefix_codes) == bool(self.prefix_side)
    rule = f'0 if and only if prefix_codes is 0; prefix_codes={self.prefix_codes}'
    check(self, '', 'prefix_side', both, rule)
    quarters = self.positions != 'grid' or self.body.head_width % 4 == 0
    rule = 'a multiple of 4 with positions=grid: half of a head is rotated by the row of a code'
    check(self.body, 'model.body.', 'head_width', quarters, rule)
    unscaled = self.body.rope_scaling is None
    check(self.body, 'model.body.', 'rope_scaling', unscaled, 'None: LlamaGen has no RoPE scaling')

  @property
  def prefix_tokens(self) -> int:
    """Number P of prefix codes of a sequence."""
    return self.prefix_side**2

  @property
  def image_tokens(self) -> int:
    """Number N of codes of an image."""
    return self.side**2

  @property
  def layout(self) -> Layout:
    """The sequence: class token, prefix codes, codes of the image; all causal."""
    spans = [('class', 1), ('prefix', self.prefix_tokens), ('image', self.image_tokens)]
    return Layout(tuple(Span(name, length, 'decoder') for name, length in spans if length))

  @property
  def vocabulary(self) -> int:
    """Number of joint ids: those of the image's codes, then those of the prefix codes."""
    return self.codes + self.prefix_codes


@dataclasses.dataclass(frozen=True)
class LlamaGen(mot.OneExpert):
  """The network of one configuration, in `dtype`; `dropout` applies to streams with keys."""

  config: LlamaGenConfig
  dropout: Dropout = Dropout()

  @property
  def layer(self) -> Layer:
    """The layer module, an argument of `mot.empty_cache`."""
    return Layer(self.config.body, self.dtype, dropout=self.dropout)

  def init(self, rng: Array) -> Params:
    """Fresh parameters, float32."""
    c = self.config
    keys = jax.random.split(rng, 5)
    table = lambda key, rows: 0.02 * jax.random.normal(key, (rows, c.body.width))
    embed = {'classes': table(keys[0], c.classes + 1), 'codes': table(keys[1], c.codes)}
    if c.prefix_codes:
      embed |= {'prefix': table(keys[3], c.prefix_codes), 'pad': table(keys[4], 1)}
    return {
      'embed': embed,
      'layers': mot.init_layers(self.layer, keys[2]),
      'norm': {'scale': jnp.ones((c.body.width,))},
      # The first prediction of a fresh network is uniform.
      'head': {'kernel': jnp.zeros((c.body.width, c.vocabulary))},
    }

  def embed_classes(self, params: Params, classes: Array) -> Array:
    """Class tokens [B, 1, D] of classes [B]."""
    return jnp.take(params['embed']['classes'], classes, axis=0)[:, None].astype(self.dtype)

  def embed_codes(self, params: Params, codes: Array) -> Array:
    """Tokens [B, L, D] of an image's codes [B, L]."""
    return jnp.take(params['embed']['codes'], codes, axis=0).astype(self.dtype)

  def embed_prefix(self, params: Params, codes: Array, masked: Array | None = None) -> Array:
    """Tokens [B, L, D] of prefix codes [B, L]; the pad embedding where `masked` (bool [B, L])."""
    tokens = jnp.take(params['embed']['prefix'], codes, axis=0)
    if masked is not None:
      tokens = jnp.where(masked[..., None], params['embed']['pad'], tokens)
    return tokens.astype(self.dtype)

  def stream(
    self, x: Array, start: Array | int = 0, dropout_keys: Array | None = None
  ) -> mot.Stream:
    """Tokens x [B, L, D] at the indices `start`, `start` + 1, ... of their sequences.

    Index 0 is the class token, followed by prefix codes, if any, and the image's codes.
    `dropout_keys` [B] are for embeddings and layers, one per sequence; None: nothing is dropped.
    """
    x = drop(x, self.dropout.token, dropout_keys, 'token')
    region = build(self.config.layout, keep=jnp.ones(x.shape[:1], bool))['decoder']
    cut = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, x.shape[1], 1)
    order, visibility = cut(region.positions), jax.tree.map(cut, region.visibility)
    rotation = self._rotation(order)
    return mot.Stream(x, order, visibility, rotation=rotation, dropout_keys=dropout_keys)

  def _rotation(self, order: Array) -> tuple[Array, Array]:
    """Rotary tables [B, L, 1, H / 2] of indices [B, L]."""
    c = self.config
    is_class = (order == 0)[..., None, None]
    if c.positions == 'line':
      cos, sin = rope.rotary(order, c.body.head_width, c.body.rope_theta)
    else:
      cos, sin = rope.rotary_grid(self._grid(order), c.body.head_width, c.body.rope_theta)
    cos = jnp.where(is_class, 0.0 if c.class_rotation == 'zero' else 1.0, cos)
    return cos, jnp.where(is_class, 0.0, sin)

  def _grid(self, order: Array) -> Array:
    """Row and column [B, L, 2] on the image's grid; those of the class token have no meaning."""
    c = self.config
    cell = lambda at, side: jnp.stack([at // side, at % side], axis=-1).astype(jnp.float32)
    image = cell(jnp.maximum(order - 1 - c.prefix_tokens, 0), c.side)
    if not c.prefix_side:
      return image
    prefix = cell(jnp.maximum(order - 1, 0), c.prefix_side) * (c.side / c.prefix_side)
    return jnp.where((order <= c.prefix_tokens)[..., None], prefix, image)

  def logits(self, params: Params, hidden: Array, block: str = '') -> Array:
    """Logits [B, L, V] float32 of hidden states [B, L, D], for all joint ids or one `block`.

    `block` is `codes` (the image's), `prefix`, or '' for all.
    """
    c = self.config
    blocks = {'': (0, c.vocabulary), 'codes': (0, c.codes), 'prefix': (c.codes, c.vocabulary)}
    first, last = blocks[block]
    return kernel_layout.columns(params['head'], hidden, first, last).astype(jnp.float32)

  def run(
    self,
    params: Params,
    stream: mot.Stream,
    cache: mot.Cache | None = None,
    at: Array | int = 0,
  ) -> tuple[Array, mot.Cache | None]:
    """Logits [B, L, V] float32 of the id after each token, and the written cache; see mot.run."""
    hidden, cache = self.states(params, stream, cache, at)
    return self.logits(params, hidden), cache

  def inputs(
    self,
    params: Params,
    classes: Array,
    codes: Array,
    prefix: Array | None = None,
    masked: Array | None = None,
  ) -> Array:
    """Input embeddings in training: all tokens of a sequence but the last, [B, P + N, D].

    Args:
      params: parameters of the model.
      classes: class ids [B]; `config.classes` is the null class.
      codes: codes of the images [B, N].
      prefix: prefix codes [B, P]; None if the model has none.
      masked: bool [B, P]; where True, the pad embedding replaces the prefix code.
    """
    tokens = [self.embed_classes(params, classes)]
    if self.config.prefix_codes:
      tokens.append(self.embed_prefix(params, prefix, masked))
    return jnp.concatenate([*tokens, self.embed_codes(params, codes[:, :-1])], axis=1)

  def __call__(
    self,
    params: Params,
    classes: Array,
    codes: Array,
    prefix: Array | None = None,
    masked: Array | None = None,
  ) -> Array:
    """Logits [B, P + N, V] float32 of each id, given those before it; see `inputs`."""
    x = self.inputs(params, classes, codes, prefix, masked)
    return self.run(params, self.stream(x))[0]
