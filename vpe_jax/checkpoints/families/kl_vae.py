"""KL autoencoders of FLUX.1, Stable Diffusion 3 and SDXL (diffusers' AutoencoderKL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vpe_jax.checkpoints.tables import kl_vae as table
from vpe_jax.codecs.kl_vae import KlVae, KlVaeConfig
from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.contracts import Array, Params, UserError

LAYOUTS = table.LAYOUTS
STEM = 'diffusion_pytorch_model'
Sizes = KlVaeConfig
# Fields of which only diffusers' default is supported.
_FIXED = {
  'act_fn': 'silu',
  'latents_mean': None,
  'latents_std': None,
  'in_channels': 3,
  'out_channels': 3,
}


def sizes(config: Mapping[str, Any]) -> KlVaeConfig:
  """Our sizes from config.json."""
  for field, ours in _FIXED.items():
    if config.get(field, ours) != ours:
      raise UserError(f"{field} is '{config[field]}': our autoencoder supports only {ours}")
  for field, ours in (('down', 'DownEncoderBlock2D'), ('up', 'UpDecoderBlock2D')):
    kinds = set(config[f'{field}_block_types'])
    if kinds != {ours}:
      raise UserError(
        f"{field}_block_types are '{sorted(kinds)}': our autoencoder supports only {ours}"
      )
  channels = config.get('latent_channels', 4)
  body = PyramidConfig(
    widths=tuple(config['block_out_channels']),
    blocks=config.get('layers_per_block', 1),
    outputs=2 * channels,
    inputs=channels,
    middle=config.get('mid_block_add_attention', True),
    groups=config.get('norm_num_groups', 32),
  )
  return KlVaeConfig(
    body=body,
    quant=config.get('use_quant_conv', True),
    post_quant=config.get('use_post_quant_conv', True),
    shift=(config.get('shift_factor') or 0.0,),
    scale=(config.get('scaling_factor', 0.18215),),
  )


def config_json(sizes: KlVaeConfig) -> dict[str, Any]:
  """A config.json for AutoencoderKL."""
  body = sizes.body
  levels = len(body.widths)
  return {
    **_FIXED,
    '_class_name': 'AutoencoderKL',
    'block_out_channels': list(body.widths),
    'down_block_types': ['DownEncoderBlock2D'] * levels,
    'up_block_types': ['UpDecoderBlock2D'] * levels,
    'layers_per_block': body.blocks,
    'latent_channels': body.inputs,
    'norm_num_groups': body.groups,
    'mid_block_add_attention': body.middle,
    'use_quant_conv': sizes.quant,
    'use_post_quant_conv': sizes.post_quant,
    'shift_factor': sizes.shift[0] or None,
    'scaling_factor': sizes.scale[0],
  }


def init(sizes: KlVaeConfig, rng: Array) -> Params:
  """Random initial parameters."""
  side = sizes.body.factor
  return KlVae(sizes).init(rng, jnp.zeros((1, side, side, 3)))['params']


def axes(sizes: KlVaeConfig) -> dict[str, int]:
  """No axes: an export infers all sizes from our leaves."""
  del sizes
  return {}
