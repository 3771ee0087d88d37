"""LlamaGen's VQ-16 and VQ-8 tokenizers."""

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


def sizes(published: Mapping[str, Any]) -> VqGanConfig:
  """Our sizes from a config.json with the names of LlamaGen's code."""
  if not published.get('codebook_l2_norm', True):
    raise UserError('the codebook is not on the unit sphere (codebook_l2_norm), ours is')
  if published['ch_mult'][0] != 1:
    raise UserError(f'the tokenizer has ch_mult {published["ch_mult"]}, ours begins with 1')
  widths = tuple(published['ch'] * factor for factor in published['ch_mult'])
  body = PyramidConfig(
    widths=widths,
    blocks=published['num_res_blocks'],
    outputs=published['z_channels'],
    inputs=published['z_channels'],
    attention=(len(widths) - 1,),
  )
  width = published['codebook_embed_dim']
  return VqGanConfig(body, published['codebook_size'], width, normed=True)


def published(sizes: VqGanConfig) -> dict[str, Any]:
  """A config.json with the names of LlamaGen's code."""
  widths = sizes.body.widths
  return {
    'model_type': 'llamagen_vq',
    'ch': widths[0],
    'ch_mult': [width // widths[0] for width in widths],
    'num_res_blocks': sizes.body.blocks,
    'z_channels': sizes.body.inputs,
    'codebook_size': sizes.codes,
    'codebook_embed_dim': sizes.width,
    'codebook_l2_norm': True,
  }


def init(sizes: VqGanConfig, rng: Array) -> Params:
  """Fresh parameters."""
  side = sizes.body.factor
  return VqGan(sizes).init(rng, jnp.zeros((1, side, side, 3)))['params']


def axes(sizes: VqGanConfig) -> dict[str, int]:
  """All axes show in our leaves."""
  del sizes
  return {}


# VQ-16, vq_ds16_c2i.pt, is published without a config.json.
BARE = sizes(
  {
    'ch': 128,
    'ch_mult': [1, 1, 2, 2, 4],
    'num_res_blocks': 2,
    'z_channels': 256,
    'codebook_size': 16_384,
    'codebook_embed_dim': 8,
  }
)
