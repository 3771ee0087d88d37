"""DINOv2, small to giant (transformers' Dinov2Model)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vpe_jax.checkpoints.families import encoders
from vpe_jax.checkpoints.tables import dinov2 as table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.dinov2 import Dinov2, Dinov2Config
from vpe_jax.models.vit import EncoderConfig

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = Dinov2Config
axes = encoders.patch_axes
# transformers' defaults of fields that a config.json may omit.
_DEFAULTS = {
  'hidden_size': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'mlp_ratio': 4,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-6,
  'image_size': 224,
  'patch_size': 14,
  'use_swiglu_ffn': False,
}


def sizes(config: Mapping[str, Any]) -> Dinov2Config:
  """Our sizes from config.json."""
  fields = {**_DEFAULTS, **config}
  if not fields.get('qkv_bias', True):
    raise UserError('qkv_bias is false: our layers have biases on q, k and v')
  gated = fields['use_swiglu_ffn']
  width = fields['hidden_size']
  hidden = int(width * fields['mlp_ratio'])
  encoder = EncoderConfig(
    width=width,
    layers=fields['num_hidden_layers'],
    heads=fields['num_attention_heads'],
    mlp=_hidden(hidden, gated),
    eps=fields['layer_norm_eps'],
    activation='swiglu' if gated else encoders.activation(fields['hidden_act']),
    layer_scale=True,
  )
  image, patch = encoders.side(fields, 'image_size'), encoders.side(fields, 'patch_size')
  return Dinov2Config(image, patch, encoder)


def config_json(sizes: Dinov2Config) -> dict[str, Any]:
  """A config.json for Dinov2Model.

  Raises:
    UserError: no integer `mlp_ratio` of transformers gives the width of the MLP.
  """
  encoder = sizes.encoder
  gated = encoder.activation == 'swiglu'
  # transformers gives the MLP width as a multiple of the model width, before the reduction to two
  # thirds for a gated MLP.
  ratio = next((n for n in range(1, 17) if _hidden(encoder.width * n, gated) == encoder.mlp), None)
  if ratio is None:
    raise UserError(
      f'no integer mlp_ratio up to 16 gives the MLP width {encoder.mlp} at model width '
      f'{encoder.width} (activation {encoder.activation})'
    )
  return {
    'architectures': ['Dinov2Model'],
    'model_type': 'dinov2',
    'hidden_size': encoder.width,
    'num_hidden_layers': encoder.layers,
    'num_attention_heads': encoder.heads,
    'mlp_ratio': ratio,
    'use_swiglu_ffn': gated,
    'hidden_act': 'gelu' if gated else encoders.activation_field(encoder.activation),
    'layer_norm_eps': encoder.eps,
    'image_size': sizes.image_size,
    'patch_size': sizes.patch,
    # Our encoder has no mask token, which is only used in training.
    'use_mask_token': False,
  }


def init(sizes: Dinov2Config, rng: Array) -> Params:
  """Random initial parameters."""
  images = jnp.zeros((1, sizes.image_size, sizes.image_size, 3))
  return Dinov2(sizes).init(rng, images)['params']


def _hidden(width: int, gated: bool) -> int:
  """Hidden width of the MLP; for a gated MLP two thirds, rounded up to a multiple of 8."""
  return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width
