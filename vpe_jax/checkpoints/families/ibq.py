"""Emu3.5's IBQ tokenizer (BAAI/Emu3.5-VisionTokenizer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpe_jax.checkpoints.families import llamagen_vq
from vpe_jax.checkpoints.tables import ibq as table
from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.codecs.vqgan import VqGanConfig
from vpe_jax.contracts import UserError

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = VqGanConfig
# Fields of which only one value is supported.
_FIXED = {'double_z': False, 'in_channels': 3, 'out_ch': 3}

init = llamagen_vq.init
axes = llamagen_vq.axes


def sizes(config: Mapping[str, Any]) -> VqGanConfig:
  """Our sizes from the published config.yaml, or from a config.json with the same fields.

  Fields of the convolutional body may be in a section `ddconfig`, as published, or at the top
  level.
  """
  config = {**config, **config.get('ddconfig', {})}
  for field, ours in _FIXED.items():
    if config.get(field, ours) != ours:
      raise UserError(f"{field} is '{config[field]}': our tokenizer supports only {ours}")
  if config['ch_mult'][0] != 1:
    raise UserError(f'ch_mult is {config["ch_mult"]}: it must begin with 1 in our tokenizer')
  widths = tuple(config['ch'] * factor for factor in config['ch_mult'])
  sides = [config['resolution'] // 2**level for level in range(len(widths))]
  body = PyramidConfig(
    widths=widths,
    blocks=config['num_res_blocks'],
    outputs=config['z_channels'],
    inputs=config['z_channels'],
    attention=tuple(i for i, side in enumerate(sides) if side in config['attn_resolutions']),
    fine_first=True,
  )
  return VqGanConfig(body, config['n_embed'], config['embed_dim'], normed=False)


def config_json(sizes: VqGanConfig) -> dict[str, Any]:
  """A config.json with the fields of the published config.yaml."""
  body = sizes.body
  # Sizes depend on the resolution only through attn_resolutions: any multiple of the factor fits.
  resolution = 16 * body.factor
  return {
    **_FIXED,
    'model_type': 'ibq',
    'ch': body.widths[0],
    'ch_mult': [width // body.widths[0] for width in body.widths],
    'num_res_blocks': body.blocks,
    'resolution': resolution,
    'attn_resolutions': [resolution // 2**level for level in body.attention],
    'z_channels': body.inputs,
    'n_embed': sizes.codes,
    'embed_dim': sizes.width,
  }


# For a model.ckpt without its config.yaml.
RELEASED_SIZES = sizes(
  {
    'ch': 256,
    'ch_mult': [1, 1, 2, 2, 4],
    'num_res_blocks': 4,
    'resolution': 256,
    'attn_resolutions': [16],
    'z_channels': 256,
    'n_embed': 131_072,
    'embed_dim': 256,
  }
)
