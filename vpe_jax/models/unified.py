"""A unified model that generates tokens autoregressively and image latents by flow matching.

The AR expert has the text tokens and the prefix codes, such as a visual prompt; the diffusion
expert has the image tokens. Three architectures:

  internal: both experts in one sequence, joined by attention (Mixture-of-Transformers).
  external: two experts, each with a sequence of its own.
  single: one expert for all tokens (Transfusion, Show-o2).

Parameter tree: `embed/{text,codes}`, `ar/{layers,norm}`, `dit/{layers,norm,dual_path,head}`. A
single expert has neither `dit/layers` nor `dit/norm`. A model without prefix codes has no
`embed/codes`; a model with source images also has `ar/dual_path`; a diffusion expert with
cross-attention also has `dit/layers/cross`. `Unified` holds no arrays: every method is a pure
function of the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from vpe_jax.config import check, check_sizes
from vpe_jax.contracts import Array, Params, Region, UserError, Visibility, concatenate
from vpe_jax.models import mot, transformer
from vpe_jax.models.diffusion_head import Entry, Exit, HeadConfig, TimeEmbedding
from vpe_jax.models.dual_path import DualPath, DualPathConfig
from vpe_jax.models.transformer import Layer, RMSNorm, TransformerConfig
from vpe_jax.ops.matmul import matmul_transposed

ARCHS = ('internal', 'external', 'single')
CONDITIONS = ('prefix', 'keys', 'cross')
_HEADS = ('layers', 'embed', 'heads', 'head')
_ENCODER = (
  (r'attention/[qkv]/kernel', _HEADS),
  (r'attention/[qkv]/bias', ('layers', 'heads', 'head')),
  (r'attention/o/kernel', ('layers', 'heads', 'head', 'embed')),
  (r'mlp/(up|gate|value)/kernel', ('layers', 'embed', 'mlp')),
  (r'mlp/(up|gate|value)/bias', ('layers', 'mlp')),
  (r'mlp/(down|out)/kernel', ('layers', 'mlp', 'embed')),
  (r'(attention/o|mlp/(down|out))/bias', ('layers', 'embed')),
  (r'(attention|mlp)_(norm|scale)/(scale|bias)', ('layers', 'embed')),
)
LOGICAL_AXES = (
  (r'embed/(text|codes)', ('vocab', 'embed')),
  *((rf'(ar|dit)/layers/{path}', axes) for path, axes in transformer.LAYER_AXES),
  (r'(ar|dit)/norm/scale', ('embed',)),
  *((rf'(ar|dit)/dual_path/encoder/{path}', axes) for path, axes in _ENCODER),
  (r'(ar|dit)/dual_path/ends/positions', (None, 'embed')),
  (r'(ar|dit)/dual_path/ends/\w+/kernel', ('mlp', 'embed')),
  (r'(ar|dit)/dual_path/ends/\w+/(bias|scale)', ('embed',)),
  *((rf'dit/head/blocks/{path}', axes) for path, axes in transformer.LAYER_AXES),
  (r'dit/head/blocks/modulation/out/kernel', ('layers', 'embed', 'mlp')),
  (r'dit/head/blocks/modulation/out/bias', ('layers', 'mlp')),
  (r'dit/head/exit/modulation/out/kernel', ('embed', 'mlp')),
  (r'dit/head/exit/modulation/out/bias', ('mlp',)),
  (r'dit/head/(time|entry|exit)/\w+/kernel', ('mlp', 'embed')),
  (r'dit/head/(time|entry|exit)/\w+/(bias|scale)', ('embed',)),
)


@dataclasses.dataclass(frozen=True)
class UnifiedConfig:
  """Sizes and choices of the model.

  Attributes:
    arch: `internal`, `external` or `single`; see the module.
    text_vocab: size of the text vocabulary.
    codes: entries of the codebook of prefix codes; two more ids mark the begin and the end of the
      codes. 0: the model has no prefix codes, and no ids for their begin and end.
    bos: text id of the token that begins a sequence.
    boi: text id of the token that begins the image.
    latent_size: side of the latent grid.
    latent_channels: channels C of a latent.
    patch: side of the latent patch that one image token covers.
    layout: which latents token n predicts. `patch`: its own patch; `raster`: the patch^2 latents of
      the flattened grid from n * patch^2 on, as in Show-o2's released model.
    multiple: regions are padded to a multiple of this many tokens.
    ar: the AR expert, for text tokens and prefix codes.
    dit: the diffusion expert, for image tokens; layers, heads, kv_heads, head_width and width equal
      those of `ar`.
    dual_path: the embedding of noisy latents.
    head: the flow head.
    references: whether the model edits images: a second dual path embeds the source image for the
      AR expert.
    condition: how the prefix codes condition the diffusion expert of `arch=external`; the other
      architectures don't read this field. `prefix`: the AR expert's hidden states are tokens of the
      diffusion expert's sequence; `keys`: it attends to the AR expert's keys and values; `cross`:
      cross-attention to the AR expert's hidden states, which adds parameters.
  """

  arch: str
  text_vocab: int
  codes: int
  bos: int
  boi: int
  latent_size: int
  latent_channels: int
  patch: int
  layout: str
  multiple: int
  ar: TransformerConfig
  dit: TransformerConfig
  dual_path: DualPathConfig
  head: HeadConfig
  references: bool = False
  condition: str = 'prefix'

  def __post_init__(self) -> None:
    check_sizes(self, codes=0, bos=0, boi=0)
    valid = self.condition in CONDITIONS
    check(self, 'model.', 'condition', valid, f'one of {", ".join(CONDITIONS)}')
    if self.arch not in ARCHS:
      raise UserError(f"model.arch is '{self.arch}': it must be one of {', '.join(ARCHS)}")
    fits = self.latent_size % self.patch == 0
    check(self, 'model.', 'patch', fits, f'a divisor of latent_size={self.latent_size}')
    if self.layout not in ('patch', 'raster'):
      raise UserError(f"model.layout is '{self.layout}': it must be 'patch' or 'raster'")
    for name in ('layers', 'heads', 'kv_heads', 'head_width'):
      ar, dit = getattr(self.ar, name), getattr(self.dit, name)
      if ar != dit:
        raise UserError(f'model.ar.{name} is {ar} and model.dit.{name} is {dit}: set both equal')
    if self.arch == 'single' and self.ar != self.dit:
      raise UserError('model.arch=single has one expert: model.ar and model.dit must be equal')
    if self.ar.width != self.dit.width:
      raise UserError(
        'the head and the time token serve both experts: model.ar.width and model.dit.width must '
        'be equal'
      )

  @property
  def has_cross_attention(self) -> bool:
    """Whether the diffusion expert has cross-attention to the prefix codes."""
    return self.arch == 'external' and self.condition == 'cross'

  @property
  def image_tokens(self) -> int:
    """Tokens of an image, without the time token."""
    return (self.latent_size // self.patch) ** 2

  @property
  def code_entries(self) -> int:
    """Entries of the table of prefix codes, with their begin and end; 0 without prefix codes."""
    return self.codes + 2 if self.codes else 0


@dataclasses.dataclass(frozen=True)
class Unified:
  """The network of one configuration, in `dtype`; `remat` and `attention` are those of mot.run."""

  config: UnifiedConfig
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  attention: str = ''

  def _layers(self) -> dict[str, Layer]:
    c = self.config
    image_layer = Layer(c.dit, self.dtype, crossed=c.has_cross_attention)
    return {'ar': Layer(c.ar, self.dtype), 'dit': image_layer}

  def _block(self) -> Layer:
    return Layer(self.config.head.blocks, self.dtype, modulated=True)

  def _dual_path(self) -> DualPath:
    c = self.config
    return DualPath(c.dual_path, c.dit.width, c.patch, self.dtype, self.remat, self.attention)

  def _ends(self) -> tuple[TimeEmbedding, Entry, Exit]:
    c = self.config
    channels = c.patch**2 * c.latent_channels
    return (
      TimeEmbedding(c.head, c.dit.width),
      Entry(c.head, self.dtype),
      Exit(c.head, channels, self.dtype),
    )

  def init(self, rng: Array) -> Params:
    """Fresh parameters, float32."""
    c = self.config
    keys = dict(zip(('text', 'codes', 'ar', 'dit', 'dual', 'head'), jax.random.split(rng, 6)))
    table = lambda key, rows: 0.02 * jax.random.normal(key, (rows, c.ar.width))
    norm = lambda config: {'scale': jnp.ones((config.width,))}
    layers = self._layers()
    latents = jnp.zeros((1, c.latent_size, c.latent_size, c.latent_channels))
    dit = {
      'dual_path': self._dual_path().init(keys['dual'], latents),
      'head': self._init_head(keys['head']),
    }
    if c.arch != 'single':
      dit |= {'layers': mot.init_layers(layers['dit'], keys['dit']), 'norm': norm(c.dit)}
    ar = {'layers': mot.init_layers(layers['ar'], keys['ar']), 'norm': norm(c.ar)}
    if c.references:
      ar['dual_path'] = self._dual_path().init(jax.random.fold_in(keys['dual'], 1), latents)
    embed = {'text': table(keys['text'], c.text_vocab)}
    if c.codes:
      embed['codes'] = table(keys['codes'], c.code_entries)
    return {'embed': embed, 'ar': ar, 'dit': dit}

  def _init_head(self, rng: Array) -> Params:
    c = self.config
    first, second, third, fourth = jax.random.split(rng, 4)
    time, entry, exit_ = self._ends()
    condition = jnp.zeros((1, 1, c.head.width))
    return {
      'time': time.init(first, jnp.zeros((1,)))['params'],
      'entry': entry.init(second, jnp.zeros((1, 1, c.dit.width)))['params'],
      'blocks': mot.init_layers(self._block(), third),
      'exit': exit_.init(fourth, condition, condition)['params'],
    }

  def prepare(self, params: Params) -> Params:
    """Unstacks all layers: outside jit for decoding, inside it for unrolled training."""

    def unstacked(name: str, tree: Any) -> Any:
      if name in ('layers', 'blocks', 'encoder'):
        return mot.unstack(tree)
      if isinstance(tree, Mapping):
        return {key: unstacked(key, value) for key, value in tree.items()}
      return tree

    return unstacked('', params)

  def table(self, params: Params) -> Array:
    """Embeddings [V, D] of the joint vocabulary: text, codes, begin and end of the codes.

    The output head is tied to this table; see `code_logits`.
    """
    text = params['embed']['text']
    return jnp.concatenate([text, params['embed']['codes']]) if self.config.codes else text

  def embed(self, params: Params, ids: Array) -> Array:
    """Token embeddings [B, L, D] of joint ids [B, L]."""
    return jnp.take(self.table(params), ids, axis=0).astype(self.dtype)

  def code_logits(self, params: Params, hidden: Array) -> Array:
    """Logits [B, L, codes] float32 of the prefix codes, the only ids that are sampled."""
    table = params['embed']['codes'][: self.config.codes].astype(hidden.dtype)
    return matmul_transposed(hidden, table).astype(jnp.float32)

  def token_stream(self, params: Params, region: Region) -> mot.Stream:
    """The AR expert's input for the tokens of `region`."""
    return mot.Stream(self.embed(params, region.ids), region.positions, region.visibility)

  def image_stream(
    self, params: Params, latents: Array, clock: Array, region: Region
  ) -> tuple[mot.Stream, Array]:
    """The diffusion expert's input, and the head's condition [B, 1, head width].

    `latents` [B, h, w, C] are noisy; `clock` [B] is Show-o2's, 0 at noise and 1 at data.
    """
    condition, token = self.time(params, clock)
    x = self.embed_image(params['dit'], token, latents)
    x = jnp.pad(x, ((0, 0), (0, region.ids.shape[1] - x.shape[1]), (0, 0)))
    return mot.Stream(x, region.positions, region.visibility), condition

  def context_kv(self, params: Params, context: mot.Stream) -> mot.Cache:
    """Keys and values of the diffusion expert's cross-attention to hidden states `context.x`."""
    return mot.context_kv(self._layers()['dit'], params['dit']['layers'], context)

  def time(self, params: Params, clock: Array) -> tuple[Array, Array]:
    """The head's condition [B, 1, head width] and the time token [B, 1, D], from the clock [B]."""
    time, _, _ = self._ends()
    return time.apply({'params': params['dit']['head']['time']}, clock)

  def embed_image(self, expert: Params, token: Array, latents: Array) -> Array:
    """The time token [B, 1, D], then image tokens from an expert's dual path: [B, 1 + P, D]."""
    image = self._dual_path()(expert['dual_path'], latents)
    return jnp.concatenate([token.astype(self.dtype), image.astype(self.dtype)], axis=1)

  def backbone(
    self,
    params: Params,
    streams: Mapping[str, mot.Stream],
    cache: mot.Cache | None = None,
    at: Array | int = 0,
  ) -> tuple[dict[str, Array], mot.Cache | None]:
    """Final-norm hidden states of each stream [B, L, D], and the updated cache; see mot.run."""
    experts = {name: self._expert(params, name) for name in streams}
    stacks = {name: expert['layers'] for name, expert in experts.items()}
    hidden, cache = mot.run(self._layers(), stacks, streams, cache, at, self.remat, self.attention)
    norms = {'ar': RMSNorm(self.config.ar.eps), 'dit': RMSNorm(self.config.dit.eps)}
    normed = {n: norms[n].apply({'params': experts[n]['norm']}, x) for n, x in hidden.items()}
    return normed, cache

  def head(
    self,
    params: Params,
    streams: Mapping[str, mot.Stream],
    cache: mot.Cache | None = None,
    at: Array | int = 0,
  ) -> tuple[dict[str, Array], mot.Cache | None]:
    """Runs the head's layers over final-norm hidden states (`x` of each stream).

    Image streams have a `condition`; streams of other tokens have none and are not modulated, as in
    Show-o2. Returns hidden states [B, L, head width] of each stream, and the updated cache.
    """
    _, entry, _ = self._ends()
    weights = params['dit']['head']
    head_streams = {
      name: dataclasses.replace(s, x=entry.apply({'params': weights['entry']}, s.x), context=None)
      for name, s in streams.items()
    }
    block = self._block()
    blocks = dict.fromkeys(streams, block)
    stacks = dict.fromkeys(streams, weights['blocks'])
    return mot.run(blocks, stacks, head_streams, cache, at, self.remat, self.attention)

  def velocity(self, params: Params, hidden: Array, condition: Array) -> Array:
    """Show-o2's velocity (data - noise) [B, h, w, C] from the head's output for the image stream.

    `hidden` is [B, L, head width]: the time token, the image tokens, and padding.
    """
    c = self.config
    _, _, exit_ = self._ends()
    image = hidden[:, 1 : 1 + c.image_tokens]
    out = exit_.apply({'params': params['dit']['head']['exit']}, image, condition)
    if c.layout == 'raster':
      return out.reshape(out.shape[0], c.latent_size, c.latent_size, c.latent_channels)
    side = c.latent_size // c.patch
    return rearrange(
      out, 'B (h w) (p q C) -> B (h p) (w q) C', h=side, w=side, p=c.patch, q=c.patch
    )

  def caches(self, params: Params, key: Visibility) -> tuple[mot.Cache, mot.Cache]:
    """Empty caches of backbone and head for sequences of visibility `key` [B, S]."""
    layers = self._expert(params, 'ar')['layers']
    blocks = params['dit']['head']['blocks']
    return (
      mot.empty_cache(self._layers()['ar'], layers, key, self.dtype),
      mot.empty_cache(self._block(), blocks, key, self.dtype),
    )

  def __call__(
    self, params: Params, regions: Mapping[str, Region], latents: Array, clock: Array
  ) -> tuple[Array, Array]:
    """Runs the model on whole sequences, as in training.

    Returns:
      Final-norm hidden states [B, L, D] of the AR expert, and Show-o2's velocity [B, h, w, C]
      float32.
    """
    image, condition = self.image_stream(params, latents, clock, regions['dit'])
    streams = {'ar': self.token_stream(params, regions['ar']), 'dit': image}
    hidden, _ = self.backbone(params, streams)
    streams = {name: dataclasses.replace(streams[name], x=hidden[name]) for name in streams}
    streams['dit'] = dataclasses.replace(streams['dit'], condition=condition)
    out, _ = self.head(params, streams)
    return hidden['ar'], self.velocity(params, out['dit'], condition)

  def _expert(self, params: Params, name: str) -> Params:
    return params['ar' if self.config.arch == 'single' else name]


def sequence_visibility(regions: Mapping[str, Region]) -> Visibility:
  """The visibility of a whole sequence: those of its regions, in storage order."""
  return concatenate([region.visibility for region in regions.values()])
