"""Loads `--config=configs/t2i.py:preset,args` with `--config.key=value` overrides as nested dicts.

An override may set any field of the configuration, including fields that the file leaves at their
defaults. (ml_collections' flags only accept keys that the file sets.)
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpe_jax import systems
from vpe_jax.config import did_you_mean, to_dict
from vpe_jax.contracts import UserError

# Sections whose fields are not known here: evaluators and the data section check their own.
_OPEN = (('evals',), ('data', 'filters'))
_WORDS = {'true': True, 'false': False, 'none': None}


def load(spec: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """Loads the complete configuration as nested dicts.

  Args:
    spec: `FILE.py` or `FILE.py:ARG`; ARG is the argument of the file's `get_config`.
    overrides: dotted key -> value as text.

  Raises:
    UserError: the file doesn't exist or is no config file, its argument is invalid, a key is
      unknown, or a value has the wrong type or is out of range.
  """
  path, _, arg = spec.partition(':')
  try:
    file_values = _file_values(Path(path), arg)
  except ValueError as error:
    raise UserError(f'--config={spec}: {" ".join(str(error).split())}') from error
  base = to_dict(systems.build(file_values).config)
  values = dict(base)
  _change_kinds(values, overrides)
  for key, text in overrides.items():
    _override(values, key, text)
  _select_stages(values, base, overrides)
  systems.build(values)  # Checks the overridden values.
  return values


def split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
  """Splits a command line into `--config.key=value` overrides and the other arguments.

  As for other flags, `--config.key` without a value means true.

  Returns:
    (overrides: dotted key -> value as text, other arguments).
  """
  overrides, others = {}, []
  for argument in arguments:
    dashless = argument.lstrip('-')
    if argument.startswith('-') and dashless.startswith('config.'):
      key, equals, text = dashless.removeprefix('config.').partition('=')
      overrides[key] = text if equals else 'true'
    else:
      others.append(argument)
  return overrides, others


def override_parser() -> tuple[dict[str, str], Callable[[list[str]], list[str]]]:
  """For commands: a dict, and a function that moves the overrides of a command line into it."""
  collected: dict[str, str] = {}

  def parse(arguments: list[str]) -> list[str]:
    overrides, others = split_overrides(arguments)
    collected.update(overrides)
    return others

  return collected, parse


def _file_values(path: Path, arg: str) -> Mapping[str, Any]:
  """Calls a config file's `get_config(arg)`; returns nested dicts.

  Raises:
    ValueError: the argument is invalid.
    UserError: the file is no config file, or fails.
  """
  try:
    config = _get_config(path)(arg)
  except ValueError:
    raise
  # A config file is user code that can raise anything, even SystemExit.
  except (Exception, SystemExit) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]  # fmt: skip
    where = f' in line {lines[-1]}' if lines else ''
    raise UserError(f'the file fails{where} ({reason}): fix it') from error
  values = config.to_dict() if isinstance(config, ConfigDict) else config
  if not isinstance(values, Mapping):
    raise UserError(
      f'get_config returns {type(config).__name__}: it must return a ConfigDict or a dict'
    )
  return values


def _get_config(path: Path) -> Any:
  if not path.is_file():
    known = sorted(str(p) for p in path.parent.glob('*.py') if p.name != 'common.py')
    raise UserError(f'there is no such file{did_you_mean(str(path), known) if known else ""}')
  if path.suffix != '.py':
    raise UserError('a config is a Python file, such as configs/t2i.py')
  # Config files import each other as `configs.<name>`.
  root = str(path.resolve().parent.parent)
  if root not in sys.path:
    sys.path.append(root)
  spec = importlib.util.spec_from_file_location(f'configs.{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not callable(getattr(module, 'get_config', None)):
    raise UserError('the file has no get_config(arg): define it as in configs/t2i.py')
  return module.get_config


def _select_stages(
  values: dict[str, Any], base: Mapping[str, Any], overridden: Iterable[str]
) -> None:
  """If an override removes stages, selects the per-stage values of the remaining stages.

  Args:
    values: the overridden configuration, changed in place.
    base: the configuration of the file.
    overridden: dotted keys of the overrides, whose values are not changed.
  """
  names, stages = base['stages'], values['stages']
  stages = [stages] if isinstance(stages, str) else stages
  if not isinstance(stages, (list, tuple)) or not all(stage in names for stage in stages):
    return  # Building the config raises the error.
  select = lambda per_stage: [per_stage[names.index(stage)] for stage in stages]
  for key in {'steps', 'batch_size'} - set(overridden):
    values[key] = select(base[key])
  lists = {key: value for key, value in base['optim'].items() if isinstance(value, list)}
  values['optim'] |= {
    key: select(value) for key, value in lists.items() if f'optim.{key}' not in overridden
  }


def _change_kinds(values: dict[str, Any], overrides: Mapping[str, str]) -> None:
  """Resets sections of `model` whose kind is overridden to the defaults of the new kind."""
  for key, kind in overrides.items():
    match = re.fullmatch(r'model\.(\w+)\.kind', key)
    section = values['model'].get(match[1]) if match else None
    if isinstance(section, dict) and section.get('kind', kind) != kind:
      model = systems.model_section(values['system'])
      values['model'][match[1]] = _kind_defaults(model, match[1], kind)


def _kind_defaults(model: type, name: str, kind: str) -> dict[str, Any]:
  """A kind of a section and the defaults of its fields, as nested dicts."""
  kinds = typing.get_type_hints(model)[name].KINDS
  if kind not in kinds:
    raise UserError(f"config key 'model.{name}.kind' is '{kind}'{did_you_mean(kind, kinds)}")
  fields = dataclasses.fields(kinds[kind])
  defaults = {f.name: to_dict(f.default) for f in fields if f.default is not dataclasses.MISSING}
  return defaults | {'kind': kind}


def _override(values: dict[str, Any], key: str, text: str) -> None:
  *sections, name = key.split('.')
  if tuple(sections[:1]) in _OPEN or tuple(sections[:2]) in _OPEN:
    for section in sections:
      values = values.setdefault(section, {})
      _check_section(values, section, key)
    values[name] = _literal(text)
    return
  for section in sections:
    _check(values, section, key)
    values = values[section]
    _check_section(values, section, key)
  _check(values, name, key)
  if isinstance(values[name], dict):
    raise UserError(f"config key '{key}' is a section: set one of its fields, as {key}.NAME=VALUE")
  # A text field may have a tuple with one value per stage.
  is_text = isinstance(values[name], str) and not text.startswith('(')
  values[name] = text if is_text else _literal(text)


def _check(values: Mapping[str, Any], name: str, key: str) -> None:
  if name not in values:
    raise UserError(f"unknown config key '{key}'{did_you_mean(name, values)}")


def _check_section(values: Any, name: str, key: str) -> None:
  if not isinstance(values, dict):
    raise UserError(f"unknown config key '{key}': '{name}' is a single value")


def _literal(text: str) -> Any:
  if text.lower() in _WORDS:
    return _WORDS[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return text  # A string such as a,b; the field's type decides whether it is valid.
