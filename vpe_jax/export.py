r"""Writes one network of a run as shipped weights: python -m vpe_jax.export --workdir=RUN --to=FILE

Examples:
  python -m vpe_jax.export --workdir=runs/siglip-tiny --to=vpe_jax/assets/siglip.safetensors
  python -m vpe_jax.export --workdir=runs/image --network=image \
      --to=vpe_jax/assets/image.safetensors
"""

from __future__ import annotations

import os

from absl import flags
from etils import epath

from vpe_jax import front_door
from vpe_jax.checkpoints.exports import export
from vpe_jax.contracts import UserError

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'the run, local or gs://')
  flags.DEFINE_string('to', None, 'file to write, ending in .safetensors, local or gs://')
  flags.DEFINE_string('network', '', 'one network of a run that trains several')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged parameters, or the last')
  flags.DEFINE_bool('overwrite', False, 'replaces an existing file')
  front_door.define_settings()
  flags.adopt_module_key_flags(front_door)  # So that --help lists them.


def main() -> None:
  """Runs the command."""
  for name in ('workdir', 'to'):
    if not FLAGS[name].value:
      raise UserError(f'--{name} is missing: see python -m vpe_jax.export --help')
  to = front_door.target('to', FLAGS.to)
  front_door.check_folder(os.path.dirname(to))
  given = (FLAGS.workdir, to, FLAGS.network, FLAGS.weights, FLAGS.overwrite)
  metadata = export(*given, **front_door.settings())
  size = epath.Path(to).stat().length / 1e6
  print(f'{to}: {size:.2f} MB, step {metadata["step"]}, {metadata["fingerprint"]}')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
