"""LlamaGen's VQ-16 and VQ-8 tokenizers.

The release is a pickled state dict without a config.json. We read and write one with the fields of
LlamaGen's ModelArgs and arguments of its encoder; those with a default in parentheses are optional:

  encoder_ch_mult or ch_mult: channels of each level, in multiples of ch
  decoder_ch_mult (encoder_ch_mult): must be equal to it
  ch (128), num_res_blocks (2), z_channels (256)
  codebook_size (16384), codebook_embed_dim (8), codebook_l2_norm (true)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vpe_jax.checkpoints.tables import llamagen_vq as table
from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.codecs.vqgan import VqGan, VqGanConfig
from vpe_jax.contracts import Array, Params, UserError

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = VqGanConfig
_DEFAULTS = {
  'ch': 128,
  'num_res_blocks': 2,
  'z_channels': 256,
  'codebook_size': 16_384,
  'codebook_embed_dim': 8,
  'codebook_l2_norm': True,
}


def sizes(config: Mapping[str, Any]) -> VqGanConfig:
  """Our sizes from a config.json with the fields in the docstring of this module."""
  fields = {**_DEFAULTS, **config}
  if not fields['codebook_l2_norm']:
    raise UserError('codebook_l2_norm is false: our codebook entries have unit norm')
  name = 'ch_mult' if 'ch_mult' in fields else 'encoder_ch_mult'
  factors = fields[name]
  if factors[:1] != [1]:
    raise UserError(f'{name} is {factors}: it must begin with 1 in our tokenizer')
  if fields.get('decoder_ch_mult', factors) != factors:
    raise UserError(
      f'decoder_ch_mult is {fields["decoder_ch_mult"]} and {name} {factors}: they must be '
      'equal in our tokenizer'
    )
  body = PyramidConfig(
    widths=tuple(fields['ch'] * factor for factor in factors),
    blocks=fields['num_res_blocks'],
    outputs=fields['z_channels'],
    inputs=fields['z_channels'],
    attention=(len(factors) - 1,),
  )
  return VqGanConfig(body, fields['codebook_size'], fields['codebook_embed_dim'], normed=True)


def config_json(sizes: VqGanConfig) -> dict[str, Any]:
  """A config.json with the fields in the docstring of this module."""
  widths = sizes.body.widths
  factors = [width // widths[0] for width in widths]
  return {
    'model_type': 'llamagen_vq',
    'ch': widths[0],
    'encoder_ch_mult': factors,
    'decoder_ch_mult': factors,
    'num_res_blocks': sizes.body.blocks,
    'z_channels': sizes.body.inputs,
    'codebook_size': sizes.codes,
    'codebook_embed_dim': sizes.width,
    'codebook_l2_norm': True,
  }


def init(sizes: VqGanConfig, rng: Array) -> Params:
  """Random initial parameters."""
  side = sizes.body.factor
  return VqGan(sizes).init(rng, jnp.zeros((1, side, side, 3)))['params']


def axes(sizes: VqGanConfig) -> dict[str, int]:
  """No axes: an export infers all sizes from our leaves."""
  del sizes
  return {}


# VQ-16, vq_ds16_c2i.pt.
RELEASED_SIZES = sizes({'encoder_ch_mult': [1, 1, 2, 2, 4]})
