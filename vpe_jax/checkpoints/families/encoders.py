"""What families with the layers of models/vit.py read from config.json, and write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpe_jax.config import nearest
from vpe_jax.contracts import UserError
from vpe_jax.models.vit import EncoderConfig

# transformers' name -> ours
_ACTIVATIONS = {'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'quick_gelu': 'quick_gelu'}


def activation(name: str) -> str:
  """Our name of an activation.

  Raises:
    UserError: our layers don't have it.
  """
  if name not in _ACTIVATIONS:
    raise UserError(f"the layers use '{name}', which ours lack{nearest(name, _ACTIVATIONS)}")
  return _ACTIVATIONS[name]


def activation_field(name: str) -> str:
  """The name that `activation` reads."""
  return next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == name)


def side(said: Mapping[str, Any], field: str) -> int:
  """A side in pixels of something square.

  Raises:
    UserError: it has two sides.
  """
  if not isinstance(said[field], int):
    raise UserError(f'{field} is {said[field]}: ours is square, one number')
  return said[field]


def tower(said: Mapping[str, Any]) -> EncoderConfig:
  """Sizes of the layers, from the fields that SigLIP's and CLIP's towers share.

  Args:
    said: the fields, defaults filled in.

  Raises:
    KeyError: a field is missing.
    UserError: the activation is none of ours.
  """
  return EncoderConfig(
    width=said['hidden_size'],
    layers=said['num_hidden_layers'],
    heads=said['num_attention_heads'],
    mlp=said['intermediate_size'],
    eps=said['layer_norm_eps'],
    activation=activation(said['hidden_act']),
  )


def tower_fields(tower: EncoderConfig) -> dict[str, Any]:
  """The fields that `tower` reads."""
  return {
    'hidden_size': tower.width,
    'num_hidden_layers': tower.layers,
    'num_attention_heads': tower.heads,
    'intermediate_size': tower.mlp,
    'layer_norm_eps': tower.eps,
    'hidden_act': activation_field(tower.activation),
  }
