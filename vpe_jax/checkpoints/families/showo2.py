"""Show-o2 1.5B and its kin (arXiv 2506.15564): one expert for text and picture.

The release is a pickled state dict. Its config.json holds the arguments of the original's
Showo2Qwen2_5, which name a Qwen2.5 and a SigLIP in the place of sizes; we know those of the 1.5B
models. Else, these are the fields that we read and write; those with a default may be left out:

  hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
    vocab_size, rope_theta (1e6), rms_norm_eps (1e-6): of the language model, as Qwen2's
  bos_token_id (151644), boi_token_id (151652): rows that begin a sequence and a picture
  clip_latent_dim, clip_intermediate, clip_layers, clip_heads: of the SigLIP layers
  position_table (729): rows of their position table, a square
  head: hidden_size, head_dim, intermediate_size, num_attention_heads, num_key_value_heads,
    blocks, rope_theta, rope_scaling (factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings; null: none)
  latent_channels, latent_size, patch_size (2): of the picture

A released Show-o2 has no visual prompt: `sizes` gives it no codes, and so no `embed/codes`. Give
sizes with codes to `families.load` to make room for a visual prompt; its rows are the caller's to
draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vpe_jax.checkpoints.families import decoders
from vpe_jax.checkpoints.tables import showo2 as table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.diffusion_head import HeadConfig
from vpe_jax.models.dual_path import DualPathConfig
from vpe_jax.models.unified import Unified, UnifiedConfig
from vpe_jax.models.vit import EncoderConfig
from vpe_jax.ops.rope import RopeScaling

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = UnifiedConfig
FREE = ('codes', 'multiple', 'latent_size')  # what no parameter that is published depends on
_BODY = {'rope_theta': 1e6, 'rms_norm_eps': 1e-6, 'bos_token_id': 151644, 'boi_token_id': 151652}
# Of Qwen2.5-1.5B, of SigLIP so400m-patch14-384 without its last layer, and of the head.
_RELEASED = {
  'intermediate_size': 8960,
  'num_hidden_layers': 28,
  'num_attention_heads': 12,
  'num_key_value_heads': 2,
  'clip_intermediate': 4304,
  'clip_layers': 26,
  'clip_heads': 16,
}
_RELEASED_HEAD = {
  'hidden_size': 2048,
  'head_dim': 64,
  'intermediate_size': 8192,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'rope_theta': 5e5,
  'rope_scaling': decoders.stretch_fields(RopeScaling()),
}


def sizes(published: Mapping[str, Any]) -> UnifiedConfig:
  """Our sizes from a config.json with the fields above, or that of the 1.5B releases."""
  if 'llm_vocab_size' in published:
    published = _from_arguments(published)
  said = {**_BODY, 'position_table': 729, 'patch_size': 2, **published}
  side = math.isqrt(said['position_table'])
  if side**2 != said['position_table']:
    raise UserError(f'a position table of {said["position_table"]} rows is not square')
  body = decoders.body(said, qkv_bias=True)
  encoder = EncoderConfig(
    width=said['clip_latent_dim'],
    layers=said['clip_layers'],
    heads=said['clip_heads'],
    mlp=said['clip_intermediate'],
  )
  return UnifiedConfig(
    arch='single',
    text_vocab=said['vocab_size'],
    codes=0,
    bos=said['bos_token_id'],
    boi=said['boi_token_id'],
    latent_size=said['latent_size'],
    latent_channels=said['latent_channels'],
    patch=said['patch_size'],
    layout='raster',
    multiple=1,
    ar=body,
    dit=body,
    dual_path=DualPathConfig(encoder, side),
    head=_head(said['head']),
  )


def published(sizes: UnifiedConfig) -> dict[str, Any]:
  """A config.json with the fields above.

  Raises:
    UserError: the network is none that Show-o2's code can run.
  """
  if sizes.arch != 'single' or sizes.layout != 'raster':
    raise UserError(
      f'Show-o2 has arch=single and layout=raster, these weights arch={sizes.arch} and '
      f"layout={sizes.layout}: they can't be written as showo2"
    )
  body, head, und = sizes.ar, sizes.head, sizes.dual_path.encoder
  return {
    'model_type': 'showo2',
    **decoders.body_fields(body),
    'vocab_size': sizes.text_vocab,
    'bos_token_id': sizes.bos,
    'boi_token_id': sizes.boi,
    'clip_latent_dim': und.width,
    'clip_intermediate': und.mlp,
    'clip_layers': und.layers,
    'clip_heads': und.heads,
    'position_table': sizes.dual_path.table**2,
    'head': {
      'hidden_size': head.width,
      'head_dim': head.head_width,
      'intermediate_size': head.mlp,
      'num_attention_heads': head.heads,
      'num_key_value_heads': head.kv_heads,
      'blocks': head.layers,
      'rope_theta': head.rope_theta,
      'rope_scaling': head.rope_scaling and decoders.stretch_fields(head.rope_scaling),
    },
    'latent_channels': sizes.latent_channels,
    'latent_size': sizes.latent_size,
    'patch_size': sizes.patch,
  }


def init(sizes: UnifiedConfig, rng: Array) -> Params:
  """Fresh parameters, rows of the visual prompt included."""
  return Unified(sizes).init(rng)


def axes(sizes: UnifiedConfig) -> dict[str, int]:
  """The side of a patch of latents."""
  return {'p': sizes.patch, 'q': sizes.patch}


def _from_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
  """Our fields from the arguments of Showo2Qwen2_5.

  Raises:
    UserError: they are those of another model than the 1.5B ones.
  """
  if (given['hidden_size'], given['clip_latent_dim']) != (1536, 1152):
    raise UserError(
      f'we know the sizes of Show-o2 1.5B alone, not of one of width {given["hidden_size"]}: '
      'write a config.json with the fields that vpe_jax.checkpoints.families.showo2 lists'
    )
  if not given.get('add_time_embeds', True):
    raise UserError('add_time_embeds is off: our model has a time token before the image tokens')
  # Height and width of the original count image tokens.
  side, patch = given['image_latent_height'], given['patch_size']
  if side != given['image_latent_width']:
    raise UserError(f'pictures of {side} x {given["image_latent_width"]} tokens: ours are square')
  return {
    **_RELEASED,
    'hidden_size': given['hidden_size'],
    # Null where the tokenizer of the original's own code decides.
    'vocab_size': given['llm_vocab_size'] or 151669,
    'clip_latent_dim': given['clip_latent_dim'],
    'head': {**_RELEASED_HEAD, 'blocks': given.get('num_diffusion_layers', 10)},
    'latent_channels': given['image_latent_dim'],
    'latent_size': side * patch,
    'patch_size': patch,
  }


def _head(said: Mapping[str, Any]) -> HeadConfig:
  return HeadConfig(
    width=said['hidden_size'],
    mlp=said['intermediate_size'],
    layers=said['blocks'],
    heads=said['num_attention_heads'],
    kv_heads=said['num_key_value_heads'],
    head_width=said['head_dim'],
    rope_theta=said['rope_theta'],
    rope_scaling=decoders.stretch(said['rope_scaling']),
  )
