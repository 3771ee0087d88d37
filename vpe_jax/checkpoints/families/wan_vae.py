"""Wan 2.1's autoencoder for still images: AutoencoderKLWan on one frame, as a 2-D network.

On one frame, a causal convolution uses only the last time slice of its kernel, and the convolutions
that resample time (`time_conv`) never run. So only 44.6M of the 126.9M published parameters are
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpe_jax.checkpoints.families import kl_vae
from vpe_jax.checkpoints.tables import wan_vae as table
from vpe_jax.codecs.kl_vae import KlVaeConfig
from vpe_jax.codecs.pyramid import PyramidConfig
from vpe_jax.contracts import UserError

LAYOUTS = table.LAYOUTS
STEM = 'diffusion_pytorch_model'
Sizes = KlVaeConfig
# Moments of the latents, per channel.
_MEAN = (
  -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
  0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_DEVIATION = (
  2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
  3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
# diffusers' defaults of fields that a config.json may omit.
_DEFAULTS = {
  'base_dim': 96,
  'z_dim': 16,
  'dim_mult': [1, 2, 4, 4],
  'num_res_blocks': 2,
  'latents_mean': _MEAN,
  'latents_std': _DEVIATION,
}
# Fields of which only one value is supported. Wan 2.2's autoencoder is residual and works on
# patches, so it is refused.
_FIXED = {
  'is_residual': False,
  'patch_size': None,
  'attn_scales': [],
  'in_channels': 3,
  'out_channels': 3,
  'num_res_blocks': 2,
}

init = kl_vae.init
axes = kl_vae.axes


def sizes(config: Mapping[str, Any]) -> KlVaeConfig:
  """Our sizes from config.json."""
  fields = {**_DEFAULTS, **config}
  for field, ours in {**_FIXED, 'decoder_base_dim': fields['base_dim']}.items():
    value = fields[field] if fields.get(field) is not None else ours
    if value != ours:
      raise UserError(f"{field} is '{value}': our autoencoder supports only {ours}")
  if len(fields['dim_mult']) != 4 or fields['dim_mult'][0] != 1:
    raise UserError(f'dim_mult is {fields["dim_mult"]}: it must have 4 values and begin with 1')
  body = PyramidConfig(
    widths=tuple(fields['base_dim'] * factor for factor in fields['dim_mult']),
    blocks=fields['num_res_blocks'],
    outputs=2 * fields['z_dim'],
    inputs=fields['z_dim'],
    groups=0,
    halve=True,
  )
  return KlVaeConfig(
    body=body,
    quant=True,
    post_quant=True,
    shift=tuple(fields['latents_mean']),
    scale=tuple(1.0 / deviation for deviation in fields['latents_std']),
  )


def config_json(sizes: KlVaeConfig) -> dict[str, Any]:
  """A config.json for AutoencoderKLWan."""
  base = sizes.body.widths[0]
  return {
    '_class_name': 'AutoencoderKLWan',
    'base_dim': base,
    'z_dim': sizes.channels,
    'dim_mult': [width // base for width in sizes.body.widths],
    'num_res_blocks': sizes.body.blocks,
    'latents_mean': list(sizes.shift),
    'latents_std': [1.0 / scale for scale in sizes.scale],
  }


# Wan2.1_VAE.pth is published without a config.json.
RELEASED_SIZES = sizes({})
