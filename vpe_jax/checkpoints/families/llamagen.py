"""LlamaGen's class-conditional GPT, B to XXL (arXiv 2406.06525).

The release is a pickled state dict without a config.json; copies on the hub have one with the
fields of the original's ModelArgs. These are the fields that we read and write; those with a
default may be left out:

  dim, n_layer, n_head, n_kv_head (n_head), norm_eps (1e-5), rope_base (1e4)
  ffn_hidden: hidden width of the MLP; by default what the original makes of dim,
    ffn_dim_multiplier (none) and multiple_of (256)
  num_classes (1000): without the null class
  vocab_size (16384): entries of the codebook
  block_size: codes of a picture, a square number: 256 at 256 pixels, 576 at 384
  class_turn (zero): `zero` or `identity`, see LlamaGenConfig; all releases have zero

Models that read text (model_type `t2i`) are refused.
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
  'class_turn': 'zero',
  'multiple_of': 256,
  'cls_token_num': 1,
}


def sizes(published: Mapping[str, Any]) -> LlamaGenConfig:
  """Our sizes from a config.json with the fields above."""
  said = {**_DEFAULTS, **published}
  if said.get('model_type') == 't2i' or said['cls_token_num'] != 1:
    raise UserError('this LlamaGen reads text (t2i): ours reads a class, one token')
  side = math.isqrt(said['block_size'])
  if side**2 != said['block_size']:
    raise UserError(f'block_size {said["block_size"]} is no square number of codes')
  if said['class_turn'] not in ('zero', 'identity'):
    raise UserError(f"class_turn is '{said['class_turn']}': it must be 'zero' or 'identity'")
  heads = said['n_head']
  body = TransformerConfig(
    width=said['dim'],
    mlp=said.get('ffn_hidden') or _hidden(said),
    layers=said['n_layer'],
    heads=heads,
    kv_heads=said.get('n_kv_head') or heads,
    head_width=said['dim'] // heads,
    rope_theta=float(said['rope_base']),
    qkv_bias=False,
    eps=said['norm_eps'],
    rope_adjacent=True,
  )
  if body.head_width % 4:
    raise UserError(f'a head of width {body.head_width} has no pairs for rows and columns alike')
  return LlamaGenConfig(said['num_classes'], said['vocab_size'], side, body, said['class_turn'])


def published(sizes: LlamaGenConfig) -> dict[str, Any]:
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
    'class_turn': sizes.class_turn,
  }


def init(sizes: LlamaGenConfig, rng: Array) -> Params:
  """Fresh parameters."""
  return LlamaGen(sizes).init(rng)


def axes(sizes: LlamaGenConfig) -> dict[str, int]:
  """None: all axes show in our leaves."""
  del sizes
  return {}


def _hidden(said: Mapping[str, Any]) -> int:
  """The original's hidden width: two thirds of 4 dim, scaled and rounded up."""
  hidden = int((said.get('ffn_dim_multiplier') or 1) * int(8 * said['dim'] / 3))
  multiple = said['multiple_of']
  return -(-hidden // multiple) * multiple
