"""CLIP, both towers (transformers' CLIPModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vpe_jax.checkpoints.families import encoders
from vpe_jax.checkpoints.tables import clip as table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.clip import Clip, ClipConfig

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = ClipConfig
axes = encoders.patch_axes
# transformers' defaults of fields that a config.json may omit.
_TOWER = {'num_hidden_layers': 12, 'layer_norm_eps': 1e-5, 'hidden_act': 'quick_gelu'}
_VISION = {
  **_TOWER,
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_attention_heads': 12,
  'image_size': 224,
  'patch_size': 32,
}
_TEXT = {
  **_TOWER,
  'hidden_size': 512,
  'intermediate_size': 2048,
  'num_attention_heads': 8,
  'vocab_size': 49408,
  'max_position_embeddings': 77,
  'eos_token_id': 49407,
}
# With this eos_token_id, transformers pools at the largest id of a caption instead.
_LEGACY_EOS_ID = 2


def sizes(config: Mapping[str, Any]) -> ClipConfig:
  """Our sizes from config.json."""
  vision = {**_VISION, **config['vision_config']}
  text = {**_TEXT, **config['text_config']}
  end = text['eos_token_id']
  if not isinstance(end, int):
    raise UserError(f'eos_token_id is {end}: our text tower supports a single end token')
  return ClipConfig(
    image_size=encoders.side(vision, 'image_size'),
    patch=encoders.side(vision, 'patch_size'),
    vocabulary=text['vocab_size'],
    text_length=text['max_position_embeddings'],
    end=None if end == _LEGACY_EOS_ID else end,
    width=config.get('projection_dim', 512),
    vision=encoders.tower(vision),
    text=encoders.tower(text),
  )


def config_json(sizes: ClipConfig) -> dict[str, Any]:
  """A config.json for CLIPModel."""
  vision = {'image_size': sizes.image_size, 'patch_size': sizes.patch}
  text = {
    'vocab_size': sizes.vocabulary,
    'max_position_embeddings': sizes.text_length,
    'eos_token_id': _LEGACY_EOS_ID if sizes.end is None else sizes.end,
  }
  width = {'projection_dim': sizes.width}
  return {
    'architectures': ['CLIPModel'],
    'model_type': 'clip',
    **width,
    'vision_config': {
      'model_type': 'clip_vision_model',
      **encoders.tower_fields(sizes.vision),
      **vision,
      **width,
    },
    'text_config': {
      'model_type': 'clip_text_model',
      **encoders.tower_fields(sizes.text),
      **text,
      **width,
    },
  }


def init(sizes: ClipConfig, rng: Array) -> Params:
  """Random initial parameters."""
  images = jnp.zeros((1, sizes.image_size, sizes.image_size, 3))
  return Clip(sizes).init(rng, images, jnp.zeros((1, sizes.text_length), jnp.int32))['params']
