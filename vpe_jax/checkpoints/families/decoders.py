"""Conversion of config.json for families with Qwen2's or Llama's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpe_jax.contracts import UserError
from vpe_jax.models.decoder import DecoderConfig
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.ops.rope import RopeScaling

# Field of RopeScaling -> field of config.json.
_ROPE_SCALING_FIELDS = {
  'factor': 'factor',
  'low': 'low_freq_factor',
  'high': 'high_freq_factor',
  'original': 'original_max_position_embeddings',
}


def language_model(
  config: Mapping[str, Any], defaults: Mapping[str, Any], qkv_bias: bool
) -> DecoderConfig:
  """Converts config.json to the sizes of a language model.

  Args:
    config: content of config.json.
    defaults: the reference library's defaults of fields that config.json may omit.
    qkv_bias: whether q, k and v have a bias.

  Raises:
    KeyError: a field is missing.
    UserError: see `transformer_config`.
  """
  fields = {**defaults, **config}
  return DecoderConfig(
    vocabulary=fields['vocab_size'],
    body=transformer_config(fields, qkv_bias),
    tied=fields['tie_word_embeddings'],
    context=fields['max_position_embeddings'],
  )


def language_model_fields(sizes: DecoderConfig) -> dict[str, Any]:
  """Inverse of `language_model`: the fields of config.json."""
  return {
    **transformer_fields(sizes.body),
    'vocab_size': sizes.vocabulary,
    'tie_word_embeddings': sizes.tied,
    'max_position_embeddings': sizes.context,
  }


def transformer_config(fields: Mapping[str, Any], qkv_bias: bool) -> TransformerConfig:
  """Converts fields of transformers' Qwen2Config or LlamaConfig to the sizes of the layers.

  Args:
    fields: fields of config.json, with defaults filled in.
    qkv_bias: whether q, k and v have a bias.

  Raises:
    KeyError: a field is missing.
    UserError: our implementation doesn't support the activation or the RoPE scaling.
  """
  if fields.get('hidden_act', 'silu') != 'silu':
    raise UserError(f"hidden_act is '{fields['hidden_act']}': our layers use silu")
  # transformers 5 writes theta and scaling in rope_parameters, earlier versions in two fields.
  rope = fields.get('rope_parameters') or {}
  scaling = rope if rope else fields.get('rope_scaling')
  heads = fields['num_attention_heads']
  return TransformerConfig(
    width=fields['hidden_size'],
    mlp=fields['intermediate_size'],
    layers=fields['num_hidden_layers'],
    heads=heads,
    kv_heads=fields.get('num_key_value_heads') or heads,
    head_width=fields.get('head_dim') or fields['hidden_size'] // heads,
    rope_theta=float(rope['rope_theta'] if 'rope_theta' in rope else fields['rope_theta']),
    rope_scaling=rope_scaling(scaling),
    qkv_bias=qkv_bias,
    eps=fields['rms_norm_eps'],
  )


def transformer_fields(sizes: TransformerConfig) -> dict[str, Any]:
  """Inverse of `transformer_config`: the fields of config.json."""
  scaling = sizes.rope_scaling
  return {
    'hidden_size': sizes.width,
    'intermediate_size': sizes.mlp,
    'num_hidden_layers': sizes.layers,
    'num_attention_heads': sizes.heads,
    'num_key_value_heads': sizes.kv_heads,
    'head_dim': sizes.head_width,
    'rope_theta': sizes.rope_theta,
    'rope_scaling': scaling and {'rope_type': 'llama3', **rope_scaling_fields(scaling)},
    'rms_norm_eps': sizes.eps,
    'hidden_act': 'silu',
  }


def rope_scaling(fields: Mapping[str, Any] | None) -> RopeScaling | None:
  """Converts the RoPE scaling in config.json; None for no scaling.

  If the type is missing, fields with a factor are Llama 3's scaling, and fields without one are no
  scaling: transformers 5 writes theta alone in `rope_parameters`.

  Raises:
    UserError: the type of scaling is neither 'default' nor 'llama3'.
  """
  fields = fields or {}
  default = 'llama3' if 'factor' in fields else 'default'
  kind = fields.get('rope_type', fields.get('type', default))
  if kind == 'default':
    return None
  if kind != 'llama3':
    raise UserError(f"the type of RoPE scaling is '{kind}': our layers support only 'llama3'")
  return RopeScaling(**{ours: fields[theirs] for ours, theirs in _ROPE_SCALING_FIELDS.items()})


def rope_scaling_fields(scaling: RopeScaling) -> dict[str, Any]:
  """Inverse of `rope_scaling`, without the type."""
  return {theirs: getattr(scaling, ours) for ours, theirs in _ROPE_SCALING_FIELDS.items()}
