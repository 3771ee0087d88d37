"""LlamaGen's class-conditional GPT, B to XXL (arXiv 2406.06525).

The release is a pickled state dict without a config.json; copies on the hub have one with the
fields of LlamaGen's ModelArgs. We read and write these fields; those with a default, given in
parentheses, are optional:

  dim, n_layer, n_head, n_kv_head (n_head), norm_eps (1e-5), rope_base (1e4)
  ffn_hidden: hidden width of the MLP; by default computed from dim, ffn_dim_multiplier (none) and
    multiple_of (256) as in the original
  num_classes (1000): without the null class
  vocab_size (16384): entries of the codebook
  block_size: codes per image, a square number: 256 at 256 pixels, 576 at 384
  class_rotation (zero): `zero` or `identity`, see LlamaGenConfig; all releases have zero

Text-conditional models (model_type `t2i`) are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vpe_jax.checkpoints.tables import llamagen as table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.llamagen import LlamaGen, LlamaGenConfig
from vpe_jax.models.transformer import TransformerConfig

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = LlamaGenConfig
_DEFAULTS = {
  'norm_eps': 1e-5,
  'rope_base': 1e4,
  'num_classes': 1000,
  'vocab_size': 16384,
  'class_rotation': 'zero',
  'multiple_of': 256,
  'cls_token_num': 1,
}


def sizes(config: Mapping[str, Any]) -> LlamaGenConfig:
  """Our sizes from a config.json with the fields above."""
  fields = {**_DEFAULTS, **config}
  if fields.get('model_type') == 't2i' or fields['cls_token_num'] != 1:
    raise UserError(
      'this LlamaGen is conditioned on text (t2i): only class-conditional models are supported'
    )
  side = math.isqrt(fields['block_size'])
  if side**2 != fields['block_size']:
    raise UserError(f'block_size is {fields["block_size"]}: it must be a square number')
  if fields['class_rotation'] not in ('zero', 'identity'):
    rotation = fields['class_rotation']
    raise UserError(f"class_rotation is '{rotation}': it must be 'zero' or 'identity'")
  heads = fields['n_head']
  body = TransformerConfig(
    width=fields['dim'],
    mlp=fields.get('ffn_hidden') or _hidden(fields),
    layers=fields['n_layer'],
    heads=heads,
    kv_heads=fields.get('n_kv_head') or heads,
    head_width=fields['dim'] // heads,
    rope_theta=float(fields['rope_base']),
    qkv_bias=False,
    eps=fields['norm_eps'],
    rope_adjacent=True,
  )
  if body.head_width % 4:
    raise UserError(f'the head width is {body.head_width}: 2-D RoPE needs a multiple of 4')
  classes, codes = fields['num_classes'], fields['vocab_size']
  return LlamaGenConfig(classes, codes, side, body, fields['class_rotation'])


def config_json(sizes: LlamaGenConfig) -> dict[str, Any]:
  """A config.json with the fields above."""
  body = sizes.body
  return {
    'model_type': 'llamagen',
    'dim': body.width,
    'n_layer': body.layers,
    'n_head': body.heads,
    'n_kv_head': body.kv_heads,
    'ffn_hidden': body.mlp,
    'norm_eps': body.eps,
    'rope_base': body.rope_theta,
    'num_classes': sizes.classes,
    'vocab_size': sizes.codes,
    'block_size': sizes.side**2,
    'class_rotation': sizes.class_rotation,
  }


def init(sizes: LlamaGenConfig, rng: Array) -> Params:
  """Random initial parameters."""
  return LlamaGen(sizes).init(rng)


def axes(sizes: LlamaGenConfig) -> dict[str, int]:
  """No axes: an export infers all sizes from our leaves."""
  del sizes
  return {}


def _hidden(fields: Mapping[str, Any]) -> int:
  """Default MLP width: 8/3 dim * ffn_dim_multiplier, rounded up to a multiple of multiple_of."""
  hidden = int((fields.get('ffn_dim_multiplier') or 1) * int(8 * fields['dim'] / 3))
  multiple = fields['multiple_of']
  return -(-hidden // multiple) * multiple
