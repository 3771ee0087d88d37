"""From `--config=configs/t2i.py:preset,args` and `--config.key=value` to plain nested dicts.

Overrides may name every field of the configuration, also those that the file leaves at their
defaults (ml_collections' own flags know only the keys that the file writes out).
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
from vpe_jax.config import nearest, to_dict
from vpe_jax.contracts import UserError

_WORDS = {'true': True, 'false': False, 'none': None}


def load(spec: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """The whole configuration as plain dicts.

  Args:
    spec: `FILE.py` or `FILE.py:ARG`; the file's `get_config(ARG)` is called.
    overrides: dotted key -> value as text.

  Raises:
    UserError: no such file, no config file, a bad argument, an unknown key, or a value of the
      wrong type or out of range.
  """
  path, _, arg = spec.partition(':')
  try:
    given = _given(Path(path), arg)
  except ValueError as error:
    raise UserError(f'--config={spec}: {" ".join(str(error).split())}') from error
  before = to_dict(systems.build(given).config)
  values = dict(before)
  _change_kinds(values, overrides)
  for key, text in overrides.items():
    _override(values, key, text)
  _keep_stages(values, before, overrides)
  systems.build(values)  # Checks the overridden values.
  return values


def split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
  """Takes `--config.key=value` out of a command line: (overrides, the other arguments).

  As with other flags, `--config.key` alone means true.
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


def overrides_taker() -> tuple[dict[str, str], Callable[[list[str]], list[str]]]:
  """For front doors: a dict, and a function that moves a command line's overrides into it."""
  found: dict[str, str] = {}

  def take(arguments: list[str]) -> list[str]:
    overrides, others = split_overrides(arguments)
    found.update(overrides)
    return others

  return found, take


def _given(path: Path, arg: str) -> Mapping[str, Any]:
  """What a config file returns for an argument, as plain dicts.

  Raises:
    ValueError: a bad argument.
    UserError: the file is no config file, or fails.
  """
  try:
    found = _get_config(path)(arg)
  except ValueError:
    raise
  # A config file is code of the user's, so anything can go wrong in it, even an exit.
  except (Exception, SystemExit) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]  # fmt: skip
    where = f' in line {lines[-1]}' if lines else ''
    raise UserError(f'the file fails{where} ({reason}): mend it') from error
  plain = found.to_dict() if isinstance(found, ConfigDict) else found
  if not isinstance(plain, Mapping):
    raise UserError(f'get_config returns {type(found).__name__}, not a ConfigDict or a dict')
  return plain


def _get_config(path: Path) -> Any:
  if not path.is_file():
    known = sorted(str(p) for p in path.parent.glob('*.py') if p.name != 'common.py')
    raise UserError(f'there is no such file{nearest(str(path), known) if known else ""}')
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
    raise UserError('the file has no get_config(arg), as configs/t2i.py has')
  return module.get_config


def _keep_stages(values: dict[str, Any], before: Mapping[str, Any], given: Iterable[str]) -> None:
  """Where stages were left out on the command line, those that stay keep their own numbers."""
  names, stages = before['stages'], values['stages']
  stages = [stages] if isinstance(stages, str) else stages
  if not isinstance(stages, (list, tuple)) or not all(stage in names for stage in stages):
    return  # Whatever it is, building the config says so.
  of = lambda many: [many[names.index(stage)] for stage in stages]
  for key in {'steps', 'batch_size'} - set(given):
    values[key] = of(before[key])
  kept = (key for key, value in before['optim'].items() if isinstance(value, list))
  values['optim'] |= {key: of(before['optim'][key]) for key in kept if f'optim.{key}' not in given}


def _change_kinds(values: dict[str, Any], overrides: Mapping[str, str]) -> None:
  """Gives sections of `model` whose kind is overridden the defaults of that kind."""
  for key, kind in overrides.items():
    match = re.fullmatch(r'model\.(\w+)\.kind', key)
    section = values['model'].get(match[1]) if match else None
    if isinstance(section, dict) and section.get('kind', kind) != kind:
      model = systems.model_section(values['system'])
      values['model'][match[1]] = _kind_defaults(model, match[1], kind)


def _kind_defaults(model: type, name: str, kind: str) -> dict[str, Any]:
  """A kind of section and its fields that have a default, as plain values."""
  kinds = typing.get_type_hints(model)[name].KINDS
  if kind not in kinds:
    raise UserError(f"config key 'model.{name}.kind' is '{kind}'{nearest(kind, kinds)}")
  fields = dataclasses.fields(kinds[kind])
  defaults = {f.name: to_dict(f.default) for f in fields if f.default is not dataclasses.MISSING}
  return defaults | {'kind': kind}


def _override(values: dict[str, Any], key: str, text: str) -> None:
  *sections, name = key.split('.')
  if sections[:1] == ['evals']:  # An open section: evaluators check their own options.
    for section in sections:
      values = values.setdefault(section, {})
    values[name] = _literal(text)
    return
  for section in sections:
    _check(values, section, key)
    if not isinstance(values[section], dict):
      raise UserError(f"unknown config key '{key}': '{section}' is a single value")
    values = values[section]
  _check(values, name, key)
  # A field of text may hold one for each stage.
  is_text = isinstance(values[name], str) and not text.startswith('(')
  values[name] = text if is_text else _literal(text)


def _check(values: Mapping[str, Any], name: str, key: str) -> None:
  if name not in values:
    raise UserError(f"unknown config key '{key}'{nearest(name, values)}")


def _literal(text: str) -> Any:
  if text.lower() in _WORDS:
    return _WORDS[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return text  # Names such as a,b: the field's type decides whether text will do.
