"""Qwen2 and Qwen2.5 with tied or untied output head (transformers' Qwen2ForCausalLM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpe_jax.checkpoints.families import decoders
from vpe_jax.checkpoints.tables import qwen2 as table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.models.decoder import Decoder, DecoderConfig

LAYOUTS = table.LAYOUTS
STEM = 'model'
Sizes = DecoderConfig
# transformers' defaults of fields that a config.json may omit.
_DEFAULTS = {
  'rope_theta': 1e4,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'max_position_embeddings': 32768,
}


def sizes(config: Mapping[str, Any]) -> DecoderConfig:
  """Our sizes from config.json."""
  if config.get('use_sliding_window'):
    raise UserError('use_sliding_window is true: our layers attend to the whole sequence')
  return decoders.language_model(config, _DEFAULTS, qkv_bias=True)


def config_json(sizes: DecoderConfig) -> dict[str, Any]:
  """A config.json for Qwen2ForCausalLM."""
  return {
    'architectures': ['Qwen2ForCausalLM'],
    'model_type': 'qwen2',
    **decoders.language_model_fields(sizes),
  }


def init(sizes: DecoderConfig, rng: Array) -> Params:
  """Random initial parameters."""
  return Decoder(sizes).init(rng)


def axes(sizes: DecoderConfig) -> dict[str, int]:
  """No axes: an export infers all sizes from our leaves."""
  del sizes
  return {}
