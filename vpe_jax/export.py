r"""Exports the weights of a run, or of one of its networks, to a file, or a generator to a folder.

Examples:
  python -m vpe_jax.export --workdir=runs/siglip-tiny --to=vpe_jax/assets/siglip.safetensors
  python -m vpe_jax.export --workdir=runs/image --network=image \
      --to=vpe_jax/assets/image.safetensors
  python -m vpe_jax.export --workdir=runs/t2i-tiny --to=published/foxes --licence=CC-BY-4.0

A folder (a name without suffix) is a run with its codecs, tokenizer and model card, which sample,
evaluate and --config.start open anywhere.
"""

from __future__ import annotations

import os

from absl import flags
from etils import epath

from vpe_jax import front_door
from vpe_jax.checkpoints.exports import export, export_folder
from vpe_jax.contracts import UserError

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'folder of the run, local or gs://')
  flags.DEFINE_string('to', None, 'a file ending in .safetensors, or a new folder')
  flags.DEFINE_string('licence', '', 'licence of the parameters, for the model card of a folder')
  flags.DEFINE_string('network', '', 'network to export, if the run trains several')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'EMA or last parameters')
  flags.DEFINE_integer('step', None, 'step of the checkpoint (default: the newest)')
  flags.DEFINE_bool('overwrite', False, 'replace an existing file')
  front_door.define_settings()
  flags.adopt_module_key_flags(front_door)  # so that --help lists the settings


def main() -> None:
  """Runs the command."""
  front_door.require_flags('workdir', 'to')
  to = front_door.output_path('to', FLAGS.to)
  front_door.check_folder(os.path.dirname(to))
  settings = front_door.settings()
  if not epath.Path(to).suffix:
    if FLAGS.network or FLAGS.overwrite:
      raise UserError(f'{to} is a folder: --network and --overwrite are for a .safetensors file')
    which = FLAGS.weights, FLAGS.step, FLAGS.licence
    lines = export_folder(FLAGS.workdir, to.rstrip('/'), *which, **settings)
    print('\n'.join([*lines, f'wrote {to}']))
    return
  source = FLAGS.workdir, to, FLAGS.network, FLAGS.weights, FLAGS.overwrite, FLAGS.step
  metadata = export(*source, **settings)
  size = epath.Path(to).stat().length / 1e6
  print(f'{to}: {size:.2f} MB, step {metadata["step"]}, {metadata["fingerprint"]}')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
