r"""Trains: python -m vpe_jax.main --config=configs/t2i.py

Examples:
  python -m vpe_jax.main --config=configs/t2i.py                      (preset tiny, any machine)
  python -m vpe_jax.main --config=configs/t2i.py:debug --workdir=/tmp/run
  python -m vpe_jax.main --config=configs/t2i.py \
      --config.data.source=folder:PATH --config.data.examples=0 --workdir=runs/mine
  python -m vpe_jax.main --config=configs/t2i.py --config.steps="(600, 900)" --allow_change=steps
  python -m vpe_jax.main --config=configs/c2i_continuous.py:tiny,fork=both     (a chain of runs)
  python -m vpe_jax.main --config=RUN --config.start=RUN --workdir=runs/tuned
  python -m vpe_jax.main --workdir=RUN

The same command continues an interrupted run; so does `--workdir=RUN` alone, but not for a chain.
"""

from __future__ import annotations

import sys

from absl import flags

from vpe_jax import devices, front_door, sharding, storage
from vpe_jax.training import config_file, runs
from vpe_jax.training.workdir import CACHE

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


def main() -> None:
  """Runs the command."""
  spec = FLAGS.config or FLAGS.workdir
  if not FLAGS.config and not (spec and config_file.is_stored(spec)):
    cure = f'{spec} has no run to continue; ' if spec else ''
    front_door.require_flags('config', cure=f'{cure}try --config=t2i')
  workdir = FLAGS.workdir
  if workdir is not None:
    workdir = front_door.output_path('workdir', workdir)
  sharding.initialize_distributed()  # before anything uses a device
  chain = config_file.load_chain(spec, _overrides)
  *_, config = chain.values()
  if config['quick_compile']:
    devices.disable_optimizations()
  if warning := devices.unused_accelerator_warning():
    print(warning, file=sys.stderr, flush=True)
  workdir = workdir or f'runs/{config["name"]}-{config["preset"]}'
  devices.use_compilation_cache(storage.resolve(workdir) / CACHE)
  is_complete = runs.run_chain(chain, workdir, FLAGS.allow_change)
  sharding.end_together()
  if not is_complete:
    sys.exit(front_door.TERMINATED)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main, _parse_overrides)
