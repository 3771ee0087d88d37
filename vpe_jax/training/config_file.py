"""Loads `--config=configs/t2i.py:preset,args` with `--config.key=value` overrides as nested dicts.

`--config=RUN`, the folder of a run or of an import, loads its stored configuration.

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

from vpe_jax import storage, systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import did_you_mean, to_dict
from vpe_jax.contracts import UserError
from vpe_jax.training import evaluations

SHIPPED = Path(__file__).parents[1] / 'configs'  # a link in a checkout, a copy in an installation
# Sections whose fields are not known here: evaluators and the data section check their own.
_OPEN = (('evals',), ('data', 'filters'))
_WORDS = {'true': True, 'false': False, 'none': None}
RUNS = 'runs'  # key of a chain: name -> config of each run


def load(spec: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """Loads the complete configuration of a single run as nested dicts.

  Args:
    spec: `FILE.py` or `FILE.py:ARG`; ARG is the argument of the file's `get_config`. A shipped
      config has the short name `t2i`, and is found as `configs/t2i.py` in any folder. Or the folder
      of a run, or weights that `weights.read_config` reads.
    overrides: dotted key -> value as text.

  Raises:
    UserError: the file doesn't exist or is no config file, its argument is invalid, a key is
      unknown, a value has the wrong type or is out of range, or the config is a chain of runs.
  """
  chain = load_chain(spec, overrides)
  if '' not in chain:
    names = ', '.join(chain)
    raise UserError(f'--config={spec} is a chain of runs ({names}): name the config of one of them')
  return chain['']


def load_chain(spec: str, overrides: Mapping[str, str]) -> dict[str, dict[str, Any]]:
  """Loads a config that may be a chain: several runs, in the order in which they train.

  A chain's `get_config` returns `{'runs': {NAME: config, ...}}`, and `start` of a config may be the
  name of an earlier run. `--config.KEY=VALUE` changes all runs, `--config.NAME.KEY=VALUE` one.

  Args:
    spec: see `load`.
    overrides: see `load`.

  Returns:
    Name -> configuration as nested dicts; a single run has the name ''.

  Raises:
    UserError: see `load`.
  """
  path, _, arg = spec.partition(':')
  try:
    values = weights.read_config(spec) if is_stored(spec) else _file_values(_find(path), arg)
  except ValueError as error:
    raise UserError(f'--config={spec}: {" ".join(str(error).split())}') from error
  if RUNS not in values:
    return {'': _with_overrides(values, overrides)}
  names = tuple(values[RUNS])
  shared = {key: text for key, text in overrides.items() if key.partition('.')[0] not in names}
  chain = {}
  for name, config in values[RUNS].items():
    run = config.to_dict() if isinstance(config, ConfigDict) else config
    own = {key: text for key, text in overrides.items() if key.partition('.')[0] == name}
    own = {key.partition('.')[2]: text for key, text in own.items()}
    chain[name] = _with_overrides(run, shared | own)
  return chain


def in_folder(chain: Mapping[str, dict[str, Any]], workdir: str) -> dict[str, dict[str, Any]]:
  """Workdir -> config of each run of a chain; a `start` that names a run becomes its workdir."""
  folders = {name: f'{workdir}/{name}' if name else workdir for name in chain}
  return {
    folders[name]: run | {'start': folders.get(run['start'] or None, run['start'])}
    for name, run in chain.items()
  }


def _with_overrides(file_values: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
  """The complete configuration of one run, with overridden fields."""
  base = to_dict(systems.build(file_values).config)
  values = dict(base)
  _change_kinds(values, overrides)
  for key, text in overrides.items():
    _override(values, key, text)
  _select_stages(values, base, overrides)
  evaluations.build(systems.build(values))  # Checks the overridden values.
  return values


def _find(name: str) -> Path:
  """The config file of a name: a file, or else a shipped one.

  Raises:
    UserError: there is no such file.
  """
  path = Path(name).expanduser()
  shipped = SHIPPED / f'{path.stem}.py'
  is_shipped_name = name in (path.stem, f'configs/{shipped.name}')
  if not path.is_file() and is_shipped_name and shipped.is_file():
    return shipped
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() and path.suffix else SHIPPED
    known = [p for p in sorted(folder.glob('*.py')) if p.name not in ('common.py', '__init__.py')]
    names = [p.stem if folder == SHIPPED else str(p) for p in known]
    raise UserError(f'there is no such file{did_you_mean(name, names) if names else ""}')
  return path


def is_stored(spec: str) -> bool:
  """Whether `--config` names a run or weights with a stored config, rather than a config file."""
  return weights.is_file(spec) or storage.is_remote(spec) or Path(spec).expanduser().is_dir()


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
  if path.suffix != '.py':
    raise UserError('a config is a Python file, such as configs/t2i.py')
  spec = importlib.util.spec_from_file_location(f'configs.{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  # Config files import each other as `configs.<name>`; other folders of this name come later.
  sys.path.insert(0, str(path.resolve().parent.parent))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)
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
