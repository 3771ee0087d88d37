"""SigLIP-VQ, the tokenizer of X-Omni, GLM-Image and LLaDA2.0-Uni."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vpe_jax.checkpoints.families import encoders
from vpe_jax.checkpoints.tables import siglip_vq as table
from vpe_jax.codecs.siglip_vq import SiglipVq, SiglipVqConfig
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.vit import EncoderConfig

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = SiglipVqConfig
axes = encoders.patch_axes
# transformers' name of an activation -> ours
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu_tanh'}
# transformers' defaults (GLM-Image) of fields that a config.json may omit.
_VISION = {
  'depth': 40,
  'hidden_size': 1536,
  'num_heads': 16,
  'intermediate_size': 6144,
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-6,
  'image_size': 2048,
  'patch_size': 16,
}
# Fields of which only one value is supported.
_FIXED = {'attention_bias': True, 'in_channels': 3, 'spatial_merge_size': 1}
_VQ = {'num_embeddings': 16_384, 'embed_dim': 2048, 'latent_channels': 1536}
_POST_BLOCKS = 2  # post blocks in X-Omni, whose config doesn't contain their number
_XOMNI = 'siglip2_giant_patch16_384'

# For X-Omni's pickled files in a folder without a config.json.
RELEASED_SIZES = SiglipVqConfig(post_blocks=_POST_BLOCKS)


def sizes(config: Mapping[str, Any]) -> SiglipVqConfig:
  """Our sizes from the config.json of GLM-Image, LLaDA2.0-Uni or X-Omni."""
  vision = config['vision_config']
  if 'encoder' in vision:
    return _xomni_sizes(vision['encoder'])
  vision, vq = {**_VISION, **_FIXED, **vision}, {**_VQ, **config['vq_config']}
  for field, ours in _FIXED.items():
    if vision[field] != ours:
      raise UserError(f"{field} is '{vision[field]}': our tower supports only {ours}")
  if vision['hidden_act'] not in _ACTIVATIONS:
    raise UserError(
      f"hidden_act is '{vision['hidden_act']}': our tower supports {', '.join(_ACTIVATIONS)}"
    )
  if vq['latent_channels'] != vision['hidden_size']:
    raise UserError(
      f'latent_channels is {vq["latent_channels"]}: it must equal the hidden_size of the tower, '
      f'{vision["hidden_size"]}'
    )
  encoder = EncoderConfig(
    width=vision['hidden_size'],
    layers=vision['depth'],
    heads=vision['num_heads'],
    mlp=vision['intermediate_size'],
    eps=vision['layer_norm_eps'],
    activation=_ACTIVATIONS[vision['hidden_act']],
  )
  return SiglipVqConfig(
    encoder=encoder,
    patch=vision['patch_size'],
    table=vision['image_size'] // vision['patch_size'],
    codes=vq['num_embeddings'],
    width=vq['embed_dim'],
    post_blocks=vq.get('post_blocks', 0),
  )


def config_json(sizes: SiglipVqConfig) -> dict[str, Any]:
  """A config.json with the tokenizer's fields of GLM-Image."""
  encoder = sizes.encoder
  names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  return {
    'model_type': 'glm_image',
    'vision_config': {
      **_FIXED,
      'model_type': 'glm_image_vision',
      'depth': encoder.layers,
      'hidden_size': encoder.width,
      'num_heads': encoder.heads,
      'intermediate_size': encoder.mlp,
      'hidden_act': names[encoder.activation],
      'layer_norm_eps': encoder.eps,
      'image_size': sizes.table * sizes.patch,
      'patch_size': sizes.patch,
    },
    'vq_config': {
      'model_type': 'glm_image_vqmodel',
      'num_embeddings': sizes.codes,
      'embed_dim': sizes.width,
      'latent_channels': encoder.width,
      'post_blocks': sizes.post_blocks,  # our own field: GLM-Image has no such blocks
    },
  }


def init(sizes: SiglipVqConfig, rng: Array) -> Params:
  """Random initial parameters."""
  return SiglipVq(sizes).init(rng, jnp.zeros((1, sizes.patch, sizes.patch, 3)))['params']


def _xomni_sizes(encoder: Mapping[str, Any]) -> SiglipVqConfig:
  name, width = encoder['siglip_name'], encoder.get('z_channels', 1536)
  if name != _XOMNI or width != 1536:
    raise UserError(f"the tower is '{name}' of width {width}: only {_XOMNI} of 1536 is supported")
  return SiglipVqConfig(
    codes=encoder['codebook_size'], width=encoder['codebook_dim'], post_blocks=_POST_BLOCKS
  )
