"""Conversion of config.json for families with the layers of models/vit.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpe_jax.config import did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.models.vit import EncoderConfig

# transformers' name of an activation -> ours
_ACTIVATIONS = {'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'quick_gelu': 'quick_gelu'}


def activation(name: str) -> str:
  """Converts transformers' name of an activation to ours.

  Raises:
    UserError: our layers don't support it.
  """
  if name not in _ACTIVATIONS:
    raise UserError(f"unsupported activation '{name}'{did_you_mean(name, _ACTIVATIONS)}")
  return _ACTIVATIONS[name]


def activation_field(name: str) -> str:
  """Inverse of `activation`: transformers' name."""
  return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == name)


def side(fields: Mapping[str, Any], field: str) -> int:
  """Reads the side of a square image or patch, in pixels.

  Raises:
    UserError: the field is not a single integer.
  """
  if not isinstance(fields[field], int):
    raise UserError(f'{field} is {fields[field]}: only squares are supported, given by one integer')
  return fields[field]


def tower(fields: Mapping[str, Any]) -> EncoderConfig:
  """Converts the fields of a SigLIP or CLIP tower to the sizes of its layers.

  Args:
    fields: the tower's section of config.json, with defaults filled in.

  Raises:
    KeyError: a field is missing.
    UserError: our layers don't support the activation.
  """
  return EncoderConfig(
    width=fields['hidden_size'],
    layers=fields['num_hidden_layers'],
    heads=fields['num_attention_heads'],
    mlp=fields['intermediate_size'],
    eps=fields['layer_norm_eps'],
    activation=activation(fields['hidden_act']),
  )


def tower_fields(tower: EncoderConfig) -> dict[str, Any]:
  """Inverse of `tower`: the fields of config.json."""
  return {
    'hidden_size': tower.width,
    'num_hidden_layers': tower.layers,
    'num_attention_heads': tower.heads,
    'intermediate_size': tower.mlp,
    'layer_norm_eps': tower.eps,
    'hidden_act': activation_field(tower.activation),
  }


def patch_axes(sizes: Any) -> dict[str, int]:
  """Implements `Family.axes` for families whose sizes have a field `patch`, the side of a patch."""
  return {'p': sizes.patch, 'q': sizes.patch}
