"""Trains: python -m vpe_jax.main --config=configs/t2i.py

Examples:
  python -m vpe_jax.main --config=configs/t2i.py                      (preset tiny, any machine)
  python -m vpe_jax.main --config=configs/t2i.py:debug --workdir=/tmp/run
  python -m vpe_jax.main --config=configs/t2i.py --config.optim.lr=3e-4 --config.data.source=folder:PATH
  python -m vpe_jax.main --config=configs/t2i.py --config.steps="(300, 900)" --allow_change=steps

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from vpe_jax import sharding, systems
from vpe_jax.contracts import UserError
from vpe_jax.training import config_file, loop, machine, reference

_CONFIG = flags.DEFINE_string(
  'config', None, 'a config file and preset; --config.KEY=VALUE overrides one of its fields'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'where the run is written, local or gs:// (default: runs/<config>-<preset>)'
)
_ALLOW_CHANGE = flags.DEFINE_list(
  'allow_change', [], 'config fields that may differ from those the run was started with'
)
_overrides: dict[str, str] = {}


def run(config: Mapping[str, Any], workdir: str, allow_change: Sequence[str] = ()) -> None:
  """Trains what a config (plain nested dicts) describes, or continues it; the command as a call.

  Raises:
    UserError: a mistake in the config, the folder, the data or the machine, in one line.
  """
  system = systems.build(config)
  finished = loop.train(system.config, system, workdir, allow_change)
  if finished is not None and jax.process_index() == 0:
    line = reference.comparison(system.config, workdir)
    print(line or f'done: {workdir}', flush=True)


def _main() -> None:
  if _CONFIG.value is None:
    raise UserError('--config is missing: try --config=configs/t2i.py')
  machine.use_compilation_cache()
  sharding.initialize_distributed()  # Before anything can touch a device.
  config = config_file.load(_CONFIG.value, _overrides)
  warning = machine.idle_hardware()
  if warning:
    print(warning, file=sys.stderr, flush=True)
  run(config, _WORKDIR.value or f'runs/{config["name"]}-{config["preset"]}', _ALLOW_CHANGE.value)


def _parse(argv: list[str]) -> list[str]:
  """Takes the config's overrides out of the command line before absl reads it."""
  overrides, others = config_file.split_overrides(argv)
  _overrides.update(overrides)
  left = app.parse_flags_with_usage(others)
  if len(left) > 1:
    raise UserError(f"unexpected argument '{left[1]}': every argument has the form --name=value")
  return left


def _or_exit(function: Any, *args: Any) -> Any:
  """Turns a user's mistake into one line and status 2."""
  try:
    return function(*args)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  app.run(lambda _: _or_exit(_main), flags_parser=lambda argv: _or_exit(_parse, argv))
