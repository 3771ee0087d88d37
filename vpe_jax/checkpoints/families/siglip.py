"""SigLIP and SigLIP 2 at a fixed resolution, both towers (transformers' SiglipModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vpe_jax.checkpoints.families import encoders
from vpe_jax.checkpoints.tables import siglip as table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.siglip import Siglip, SiglipConfig

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = SiglipConfig
axes = encoders.patch_axes
# transformers' defaults of fields that a config.json may omit.
_DEFAULTS = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'layer_norm_eps': 1e-6,
  'hidden_act': 'gelu_pytorch_tanh',
}


def sizes(config: Mapping[str, Any]) -> SiglipConfig:
  """Our sizes from config.json."""
  vision, text = config['vision_config'], config['text_config']
  projection = text.get('projection_size', text.get('hidden_size', _DEFAULTS['hidden_size']))
  towers = {
    name: encoders.tower({**_DEFAULTS, **fields})
    for name, fields in (('vision', vision), ('text', text))
  }
  if projection != towers['vision'].width:
    raise UserError(
      f'the output width of the text tower is {projection}, that of the image tower '
      f'{towers["vision"].width}: they must be equal'
    )
  patch = vision.get('patch_size', 16)
  return SiglipConfig(
    # Pixels that fill no patch are cropped (so400m-patch14-384: 6 of 384 pixels).
    image_size=vision.get('image_size', 224) // patch * patch,
    patch=patch,
    vocabulary=text.get('vocab_size', 32000),
    text_length=text.get('max_position_embeddings', 64),
    **towers,
  )


def config_json(sizes: SiglipConfig) -> dict[str, Any]:
  """A config.json for SiglipModel."""
  vision = {'image_size': sizes.image_size, 'patch_size': sizes.patch}
  text = {
    'vocab_size': sizes.vocabulary,
    'max_position_embeddings': sizes.text_length,
    'projection_size': sizes.vision.width,
  }
  return {
    'architectures': ['SiglipModel'],
    'model_type': 'siglip',
    'vision_config': {
      'model_type': 'siglip_vision_model',
      **encoders.tower_fields(sizes.vision),
      **vision,
    },
    'text_config': {'model_type': 'siglip_text_model', **encoders.tower_fields(sizes.text), **text},
  }


def init(sizes: SiglipConfig, rng: Array) -> Params:
  """Random initial parameters."""
  images = jnp.zeros((1, sizes.image_size, sizes.image_size, 3))
  ids, length = jnp.zeros((1, sizes.text_length), jnp.int32), jnp.ones((1,), jnp.int32)
  return Siglip(sizes).init(rng, images, ids, length)['params']
