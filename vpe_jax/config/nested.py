"""Conversion of config sections (frozen dataclasses) from nested dicts and back."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from vpe_jax.config.fields import OutOfRange, Tagged, did_you_mean
from vpe_jax.contracts import UserError

_MAX_FLOAT = float(np.finfo(np.float32).max)  # parameters and settings are float32


def build_section(
  cls: type, values: Mapping[str, Any], sections: Mapping[str, type] | None = None
) -> Any:
  """Builds a section (a frozen dataclass) from nested dicts, the inverse of `to_dict`.

  Args:
    cls: type of the section.
    values: its fields; missing ones have their defaults.
    sections: types of fields annotated Any, by name.

  Raises:
    UserError: a key is unknown or missing, or its value has the wrong type or is out of range.
  """
  return _build(cls, dict(values), '', sections or {})


def base_section(section: Any, cls: type) -> Any:
  """Converts a section to its base class `cls`: other fields are left out."""
  return cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})


def to_dict(config: Any) -> dict[str, Any]:
  """The config as plain nested dicts and lists, which checkpoints store as JSON."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, Mapping):
    return {name: to_dict(value) for name, value in config.items()}
  return [to_dict(item) for item in config] if isinstance(config, tuple) else config


def flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dicts as one dict with dotted keys, such as `optim.lr`."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _build(cls: type, values: Mapping[str, Any], path: str, sections: Mapping[str, type]) -> Any:
  hints = typing.get_type_hints(cls) | dict(sections)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      raise UserError(f"unknown config key '{path}{key}'{did_you_mean(key, fields)}")
  built = {}
  for name, field in fields.items():
    if name in values:
      value = values[name]
      if dataclasses.is_dataclass(field.default) and isinstance(value, Mapping):
        value = _merged(to_dict(field.default), value)
      built[name] = _value(hints[name], value, f'{path}{name}')
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise UserError(f"config key '{path}{name}' is missing")
  try:
    return cls(**built)
  except OutOfRange as error:
    raise OutOfRange(error.name, error.message, path) from error


def _merged(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """A section's values; missing ones come from the section's default."""
  if values.get('kind', default.get('kind')) != default.get('kind'):
    return dict(values)  # The default is of another kind and has other fields.
  merged = dict(default)
  for name, value in values.items():
    inner = isinstance(value, Mapping) and isinstance(default.get(name), Mapping)
    merged[name] = _merged(default[name], value) if inner else value
  return merged


def _value(hint: Any, value: Any, path: str) -> Any:
  tagged = isinstance(hint, type) and issubclass(hint, Tagged)
  origin, is_section = typing.get_origin(hint), tagged or dataclasses.is_dataclass(hint)
  if (is_section or origin is Mapping) and not isinstance(value, Mapping):
    raise UserError(f"config key '{path}' must be a section, not {value!r}")
  if is_section:
    if tagged:
      if str(kind := value.get('kind')) not in hint.KINDS:
        known = did_you_mean(str(kind), hint.KINDS)
        raise UserError(f"config key '{path}.kind' is {kind!r}{known}")
      hint = hint.KINDS[kind]
    return _build(hint, dict(value), f'{path}.', {})
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in typing.get_args(hint):
      return None
    # The first type of a union is the one that a single value must have.
    hints = [inner for inner in typing.get_args(hint) if inner is not type(None)]
    tuples = [inner for inner in hints if typing.get_origin(inner) is tuple]
    choices = tuples if isinstance(value, (tuple, list)) and tuples else hints
    return _value(choices[0], value, path)
  if origin is Mapping:
    return to_dict(value)
  if origin is tuple:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_value(typing.get_args(hint)[0], item, path) for item in items)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    with contextlib.suppress(OverflowError):
      value = float(value)
  # Also refuses NaN.
  if hint is float and isinstance(value, float) and not abs(value) <= _MAX_FLOAT:
    raise UserError(f"config key '{path}' is {value}: it must be a finite number")
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise UserError(f"config key '{path}' must be {hint.__name__}, not {value!r}")
  return value
