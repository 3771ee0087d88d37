"""Show-o2 1.5B (arXiv 2506.15564): a single expert for text and image tokens.

The release is a pickled state dict. Its config.json contains the arguments of Showo2Qwen2_5, which
name a Qwen2.5 and a SigLIP instead of sizes; we know the sizes of the 1.5B models. For other models
we read and write a config.json with these fields; those with a default, given in parentheses, are
optional:

  hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
    vocab_size, rope_theta (1e6), rms_norm_eps (1e-6): language model, as in Qwen2
  bos_token_id (151644), boi_token_id (151652): first token of a sequence and of an image
  clip_latent_dim, clip_intermediate, clip_layers, clip_heads: SigLIP layers
  position_table (729): entries of the SigLIP position table, a square number
  head: hidden_size, head_dim, intermediate_size, num_attention_heads, num_key_value_heads,
    blocks, rope_theta, rope_scaling (factor, low_freq_factor, high_freq_factor,
    original_max_position_embeddings; null: none)
  latent_channels, latent_size, patch_size (2): image latents

A released Show-o2 has no visual prompt, so `sizes` returns zero codes and the parameters have no
`embed/codes`. To add a visual prompt, pass sizes with codes to `families.load`; the caller
initializes the new embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vpe_jax.checkpoints.families import decoders, encoders
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
axes = encoders.patch_axes
_BODY = {'rope_theta': 1e6, 'rms_norm_eps': 1e-6, 'bos_token_id': 151644, 'boi_token_id': 151652}
# Sizes of Qwen2.5-1.5B and of SigLIP so400m-patch14-384 without its last layer.
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
  'rope_scaling': decoders.rope_scaling_fields(RopeScaling()),
}


def sizes(config: Mapping[str, Any]) -> UnifiedConfig:
  """Our sizes from a config.json with the fields above, or from that of a 1.5B release."""
  if 'llm_vocab_size' in config:
    config = _from_arguments(config)
  fields = {**_BODY, 'position_table': 729, 'patch_size': 2, **config}
  side = math.isqrt(fields['position_table'])
  if side**2 != fields['position_table']:
    raise UserError(f'position_table is {fields["position_table"]}: it must be a square number')
  body = decoders.transformer_config(fields, qkv_bias=True)
  encoder = EncoderConfig(
    width=fields['clip_latent_dim'],
    layers=fields['clip_layers'],
    heads=fields['clip_heads'],
    mlp=fields['clip_intermediate'],
  )
  return UnifiedConfig(
    arch='single',
    text_vocab=fields['vocab_size'],
    codes=0,
    bos=fields['bos_token_id'],
    boi=fields['boi_token_id'],
    latent_size=fields['latent_size'],
    latent_channels=fields['latent_channels'],
    patch=fields['patch_size'],
    layout='raster',
    multiple=1,
    ar=body,
    dit=body,
    dual_path=DualPathConfig(encoder, side),
    head=_head(fields['head']),
  )


def config_json(sizes: UnifiedConfig) -> dict[str, Any]:
  """A config.json with the fields above.

  Raises:
    UserError: Show-o2's code doesn't support the network.
  """
  if sizes.arch != 'single' or sizes.layout != 'raster':
    raise UserError(
      f'Show-o2 has arch=single and layout=raster, these weights arch={sizes.arch} and '
      f"layout={sizes.layout}: they can't be written as showo2"
    )
  body, head, encoder = sizes.ar, sizes.head, sizes.dual_path.encoder
  return {
    'model_type': 'showo2',
    **decoders.transformer_fields(body),
    'vocab_size': sizes.text_vocab,
    'bos_token_id': sizes.bos,
    'boi_token_id': sizes.boi,
    'clip_latent_dim': encoder.width,
    'clip_intermediate': encoder.mlp,
    'clip_layers': encoder.layers,
    'clip_heads': encoder.heads,
    'position_table': sizes.dual_path.table**2,
    'head': {
      'hidden_size': head.width,
      'head_dim': head.head_width,
      'intermediate_size': head.mlp,
      'num_attention_heads': head.heads,
      'num_key_value_heads': head.kv_heads,
      'blocks': head.layers,
      'rope_theta': head.rope_theta,
      'rope_scaling': head.rope_scaling and decoders.rope_scaling_fields(head.rope_scaling),
    },
    'latent_channels': sizes.latent_channels,
    'latent_size': sizes.latent_size,
    'patch_size': sizes.patch,
  }


def init(sizes: UnifiedConfig, rng: Array) -> Params:
  """Random initial parameters; if `sizes.codes` isn't 0, with embeddings of the visual prompt."""
  return Unified(sizes).init(rng)


def _from_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Converts the arguments of Showo2Qwen2_5 to the fields above.

  Raises:
    UserError: the arguments are not those of a 1.5B model.
  """
  if (arguments['hidden_size'], arguments['clip_latent_dim']) != (1536, 1152):
    raise UserError(
      f'the sizes of a Show-o2 of width {arguments["hidden_size"]} are unknown (only those of the '
      '1.5B models are known): write a config.json with the fields that '
      'vpe_jax.checkpoints.families.showo2 lists'
    )
  if not arguments.get('add_time_embeds', True):
    raise UserError('add_time_embeds is false: our model has a time token before the image tokens')
  # image_latent_height and image_latent_width count image tokens.
  side, patch = arguments['image_latent_height'], arguments['patch_size']
  if side != (width := arguments['image_latent_width']):
    raise UserError(f'an image has {side} x {width} tokens: our model supports only square images')
  return {
    **_RELEASED,
    'hidden_size': arguments['hidden_size'],
    # Null: Show-o2's code takes the size of its tokenizer, 151669.
    'vocab_size': arguments['llm_vocab_size'] or 151669,
    'clip_latent_dim': arguments['clip_latent_dim'],
    'head': {**_RELEASED_HEAD, 'blocks': arguments.get('num_diffusion_layers', 10)},
    'latent_channels': arguments['image_latent_dim'],
    'latent_size': side * patch,
    'patch_size': patch,
  }


def _head(fields: Mapping[str, Any]) -> HeadConfig:
  return HeadConfig(
    width=fields['hidden_size'],
    mlp=fields['intermediate_size'],
    layers=fields['blocks'],
    heads=fields['num_attention_heads'],
    kv_heads=fields['num_key_value_heads'],
    head_width=fields['head_dim'],
    rope_theta=fields['rope_theta'],
    rope_scaling=decoders.rope_scaling(fields['rope_scaling']),
  )
