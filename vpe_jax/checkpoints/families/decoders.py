"""What families with Qwen2's or Llama's layers read from config.json, and write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpe_jax.contracts import UserError
from vpe_jax.models.decoder import DecoderConfig
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.ops.rope import RopeScaling

_SCALING = {
  'factor': 'factor',
  'low': 'low_freq_factor',
  'high': 'high_freq_factor',
  'original': 'original_max_position_embeddings',
}


def language_model(
  published: Mapping[str, Any], defaults: Mapping[str, Any], qkv_bias: bool
) -> DecoderConfig:
  """Sizes of a language model from its config.json.

  Args:
    published: config.json.
    defaults: of fields that the reference library may leave out.
    qkv_bias: whether q, k and v have a bias.

  Raises:
    KeyError: a field is missing.
    UserError: the layers differ from ours.
  """
  said = {**defaults, **published}
  return DecoderConfig(
    vocabulary=said['vocab_size'],
    body=body(said, qkv_bias),
    tied=said['tie_word_embeddings'],
    context=said['max_position_embeddings'],
  )


def language_model_fields(sizes: DecoderConfig) -> dict[str, Any]:
  """The fields that `language_model` reads."""
  return {
    **body_fields(sizes.body),
    'vocab_size': sizes.vocabulary,
    'tie_word_embeddings': sizes.tied,
    'max_position_embeddings': sizes.context,
  }


def body(said: Mapping[str, Any], qkv_bias: bool) -> TransformerConfig:
  """Sizes of the layers, from the fields of transformers' Qwen2Config and LlamaConfig.

  Args:
    said: the fields, defaults filled in.
    qkv_bias: whether q, k and v have a bias.

  Raises:
    KeyError: a field is missing.
    UserError: another activation or stretch of the rotary frequencies than ours.
  """
  if said.get('hidden_act', 'silu') != 'silu':
    raise UserError(f"the layers use '{said['hidden_act']}', ours silu")
  # transformers 5 writes both in rope_parameters, earlier versions apart.
  rope = said.get('rope_parameters') or {}
  scaling = rope if rope else said.get('rope_scaling')
  heads = said['num_attention_heads']
  return TransformerConfig(
    width=said['hidden_size'],
    mlp=said['intermediate_size'],
    layers=said['num_hidden_layers'],
    heads=heads,
    kv_heads=said.get('num_key_value_heads') or heads,
    head_width=said.get('head_dim') or said['hidden_size'] // heads,
    rope_theta=float(rope['rope_theta'] if 'rope_theta' in rope else said['rope_theta']),
    rope_scaling=stretch(scaling),
    qkv_bias=qkv_bias,
    eps=said['rms_norm_eps'],
  )


def body_fields(body: TransformerConfig) -> dict[str, Any]:
  """The fields that `body` reads."""
  scaling = body.rope_scaling
  return {
    'hidden_size': body.width,
    'intermediate_size': body.mlp,
    'num_hidden_layers': body.layers,
    'num_attention_heads': body.heads,
    'num_key_value_heads': body.kv_heads,
    'head_dim': body.head_width,
    'rope_theta': body.rope_theta,
    'rope_scaling': None if scaling is None else {'rope_type': 'llama3', **stretch_fields(scaling)},
    'rms_norm_eps': body.eps,
    'hidden_act': 'silu',
  }


def stretch(said: Mapping[str, Any] | None) -> RopeScaling | None:
  """The stretch of the rotary frequencies; None where there is none.

  Raises:
    UserError: it is none of Llama 3's.
  """
  kind = (said or {}).get('rope_type', (said or {}).get('type', 'llama3' if said else 'default'))
  if kind == 'default':
    return None
  if kind != 'llama3':
    raise UserError(f"the rotary frequencies are stretched as '{kind}', ours only as 'llama3'")
  return RopeScaling(**{ours: said[theirs] for ours, theirs in _SCALING.items()})


def stretch_fields(scaling: RopeScaling) -> dict[str, Any]:
  """The fields that `stretch` reads, but for the kind."""
  return {theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()}
