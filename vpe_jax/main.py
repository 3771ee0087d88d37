r"""Trains: python -m vpe_jax.main --config=configs/t2i.py

Examples:
  python -m vpe_jax.main --config=configs/t2i.py                      (preset tiny, any machine)
  python -m vpe_jax.main --config=configs/t2i.py:debug --workdir=/tmp/run
  python -m vpe_jax.main --config=configs/t2i.py \
      --config.data.source=folder:PATH --config.data.examples=0 --workdir=runs/mine
  python -m vpe_jax.main --config=configs/t2i.py --config.steps="(600, 900)" --allow_change=steps
  python -m vpe_jax.main --config=RUN --config.start=RUN --workdir=runs/tuned
  python -m vpe_jax.main --workdir=RUN

The same command continues an interrupted run; so does its folder alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from vpe_jax import devices, front_door, sharding, systems
from vpe_jax.training import config_file, loop, reference

FLAGS = flags.FLAGS
_overrides, _parse_overrides = config_file.override_parser()


def _define_flags() -> None:
  flags.DEFINE_string(
    'config', None, 'config file and preset, or a run; --config.KEY=VALUE changes a field'
  )
  flags.DEFINE_string(
    'workdir', None, 'where the run is written, local or gs:// (default: runs/<config>-<preset>)'
  )
  flags.DEFINE_list(
    'allow_change', [], 'config fields that may differ from those of the interrupted run'
  )


def run(config: Mapping[str, Any], workdir: str, allow_change: Sequence[str] = ()) -> bool:
  """Starts or continues the run of a config (nested dicts); the Python API of this command.

  Returns:
    Whether the run is complete; False after SIGTERM, when it was saved before its end.

  Raises:
    UserError: the config, the folder, the data or the machine is unsuitable.
  """
  system = systems.build(config)
  finished = loop.train(system.config, system, workdir, allow_change)
  if finished is not None and jax.process_index() == 0:
    print(reference.comparison(system.config, workdir) or f'done: {workdir}', flush=True)
  return finished is not None


def main() -> None:
  """Runs the command."""
  spec = FLAGS.config or FLAGS.workdir
  if not spec:
    front_door.require_flags('config', cure='try --config=configs/t2i.py')
  workdir = FLAGS.workdir
  if workdir is not None:
    workdir = front_door.output_path('workdir', workdir)
  sharding.initialize_distributed()  # before anything uses a device
  config = config_file.load(spec, _overrides)
  if config.get('quick_compile'):
    devices.disable_optimizations()
  if warning := devices.unused_accelerator_warning():
    print(warning, file=sys.stderr, flush=True)
  workdir = workdir or f'runs/{config["name"]}-{config["preset"]}'
  if not run(config, workdir, FLAGS.allow_change):
    sys.exit(front_door.TERMINATED)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main, _parse_overrides, cache_programs=True)
