"""Shared by config files: parsing of the argument after the colon, as in `configs/t2i.py:debug`."""

from __future__ import annotations

from collections.abc import Mapping

from vpe_jax.config import did_you_mean


def parse_arg(
  arg: str | None, presets: tuple[str, ...], **defaults: str
) -> tuple[str, dict[str, str]]:
  """The preset and the options of a config argument.

  Args:
    arg: `preset`, `preset,key=value,...` or `key=value,...`; None or '' for the default.
    presets: names of the presets; the first one is the default.
    **defaults: option names and their defaults.

  Raises:
    ValueError: the preset or an option is unknown, or an option has no value or several.
  """
  preset, options, named = presets[0], dict(defaults), set()
  for i, part in enumerate(filter(None, (arg or '').split(','))):
    key, equals, value = part.partition('=')
    if not equals and i == 0:
      if part not in presets:
        raise ValueError(f"unknown preset '{part}'{did_you_mean(part, presets)}")
      preset = part
    elif key not in defaults:
      hint = did_you_mean(key, defaults) if defaults else '; this config takes only a preset'
      raise ValueError(f"unknown config argument '{part}'{hint}")
    elif not value:
      raise ValueError(f"config argument '{part}' has no value: write {key}=VALUE")
    elif key in named:
      raise ValueError(f"config argument '{part}': {key} occurs twice; name one value")
    else:
      options[key] = value
      named.add(key)
  return preset, options


def is_true(name: str, options: Mapping[str, str]) -> bool:
  """Whether an option is `true`.

  Raises:
    ValueError: it is neither `true` nor `false`.
  """
  if options[name] not in ('true', 'false'):
    raise ValueError(f'{name}={options[name]}: it must be true or false')
  return options[name] == 'true'
