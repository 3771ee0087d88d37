"""Shared by config files: parsing of the argument after the colon, as in `configs/t2i.py:debug`."""

from __future__ import annotations

from collections.abc import Mapping

from vpe_jax.config import nearest


def parse_arg(
  arg: str | None, presets: tuple[str, ...], **known: str
) -> tuple[str, dict[str, str]]:
  """The preset and the options of a config argument.

  Args:
    arg: `preset`, `preset,key=value,...` or `key=value,...`; None or '' for the default.
    presets: what the config file offers; the first one is the default.
    **known: option names and their defaults.

  Raises:
    ValueError: an unknown preset or option; one line that names the nearest.
  """
  preset, options = presets[0], dict(known)
  for i, part in enumerate(filter(None, (arg or '').split(','))):
    key, equals, value = part.partition('=')
    if not equals and i == 0:
      if part not in presets:
        raise ValueError(f"unknown preset '{part}'{nearest(part, presets)}")
      preset = part
    elif key not in known:
      hint = nearest(key, known) if known else '; there are none beside the preset'
      raise ValueError(f"unknown config argument '{part}'{hint}")
    else:
      options[key] = value
  return preset, options


def is_true(name: str, options: Mapping[str, str]) -> bool:
  """Whether an option is `true`.

  Raises:
    ValueError: it is neither that nor `false`; one line that says so.
  """
  if options[name] not in (known := ('true', 'false')):
    raise ValueError(f'{name}={options[name]}{nearest(options[name], known)}')
  return options[name] == 'true'
