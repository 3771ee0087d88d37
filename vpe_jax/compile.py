r"""Compiles a run for a TPU pod without having one: does it fit, and what limits its speed?

Examples:
  python -m vpe_jax.compile --config=configs/t2i.py:paper --topology=v5p:4x4x4
  python -m vpe_jax.compile --config=configs/t2i.py:pod --topology=v5litepod-256 --json=fit.json
  python -m vpe_jax.compile --config=configs/t2i.py:pod,chips=256 --topology=v5p:4x4x4 --slices=4 \
      --mesh=data=4,fsdp=64
  python -m vpe_jax.compile --config=configs/t2i.py:paper --topology=v6e:8x8 --stage=plan
  python -m vpe_jax.compile --config=configs/t2i.py:paper --topology=v5e:4x4 --program=sample \
      --images_per_chip=1
  python -m vpe_jax.compile --config=configs/t2i.py:debug --topology=cpu:8
  python -m vpe_jax.compile --workdir=weights/showo2 --topology=v6e:2x2 --program=sample

Runs on any machine with `pip install libtpu`; a paper-size program takes minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import os

import jax
from absl import flags

from vpe_jax import front_door
from vpe_jax.compilation import cards, examine, program, topology
from vpe_jax.contracts import DTYPES, UserError
from vpe_jax.training import config_file

FLAGS = flags.FLAGS
_overrides, _parse_overrides = config_file.override_parser()


def _define_flags() -> None:
  flags.DEFINE_string(
    'config', None, 'config file and preset, or a run; --config.KEY=VALUE changes a field'
  )
  flags.DEFINE_string('workdir', None, 'a run or an import: short for --config=WORKDIR')
  flags.DEFINE_string('topology', None, 'v5p:4x4x8, a Cloud name such as v5p-256, or cpu:8')
  flags.DEFINE_integer('slices', 1, 'number of slices of this topology, along the mesh axis data')
  flags.DEFINE_string('mesh', '', "axis sizes that override the config's, such as data=4,fsdp=16")
  flags.DEFINE_enum('program', program.TRAIN, program.KINDS, 'the training step, or sampling')
  flags.DEFINE_string('stage', None, 'stage of the run (default: its last)')
  flags.DEFINE_integer('images_per_chip', None, "overrides the config's batch size")
  flags.DEFINE_enum('dtype', None, DTYPES, 'of weights and computation, for --program=sample')
  flags.DEFINE_string('json', None, 'file for the report, local or gs://')
  flags.DEFINE_bool('overwrite', False, 'replace an existing file')
  help_text = "instead of compiling, rewrites the table of --config from a folder of reports"
  flags.DEFINE_string('write_card', None, help_text)


def main() -> None:
  """Runs the command."""
  if FLAGS.workdir and FLAGS.config:
    raise UserError(f'--config={FLAGS.config} and --workdir={FLAGS.workdir}: give one of them')
  FLAGS.config = FLAGS.config or FLAGS.workdir
  front_door.require_flags('config', 'topology' if FLAGS.write_card is None else 'write_card')
  if FLAGS.write_card:
    print(f'{FLAGS.config}: {cards.write(FLAGS.config, FLAGS.write_card)} rows')
    return
  target = topology.parse(FLAGS.topology, FLAGS.slices)
  out = None if FLAGS.json is None else front_door.new_file('json', FLAGS.json, FLAGS.overwrite)
  jax.config.update('jax_platforms', 'cpu')  # the target devices are not on this machine
  if target.chip is None and 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', target.chips)
  config = config_file.load(FLAGS.config, _overrides)
  names = ('topology', 'slices', 'program', 'stage', 'images_per_chip', 'dtype')
  values = {name: FLAGS[name].value for name in names}
  report = examine.examine(config, examine.Request(mesh=examine.parse_mesh(FLAGS.mesh), **values))
  argument = '' if config_file.is_stored(FLAGS.config) else FLAGS.config.partition(':')[2]
  if argument:  # options of a preset select different programs
    report = dataclasses.replace(report, config=f'{config["name"]}:{argument}')
  print(report.text(), flush=True)
  if out:
    report.save(out)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main, _parse_overrides)
