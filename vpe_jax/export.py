r"""Writes one network of a run as shipped weights: python -m vpe_jax.export --workdir=RUN --to=FILE

Examples:
  python -m vpe_jax.export --workdir=runs/siglip-tiny --to=vpe_jax/assets/siglip.safetensors
  python -m vpe_jax.export --workdir=runs/image --network=image \
      --to=vpe_jax/assets/image.safetensors
"""

from __future__ import annotations

import json
import pathlib
import subprocess

from absl import flags
from etils import epath

from vpe_jax import front_door, systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline

FLAGS = flags.FLAGS
_MEASURED = 1024  # training pictures from which the moments of latents are measured


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'the run, local or gs://')
  flags.DEFINE_string('to', None, 'file to write, ending in .safetensors, local or gs://')
  flags.DEFINE_string('network', '', 'one network of a run that trains several')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged parameters, or the last')
  flags.DEFINE_bool('overwrite', False, 'replaces an existing file')


def export(
  workdir: str, to: str, network: str = '', which: str = 'ema', overwrite: bool = False
) -> dict[str, str]:
  """Writes a run's weights in bfloat16; what is measured from them is measured after rounding.

  Args:
    workdir: the run.
    to: file to write, ending in `.safetensors`.
    network: `visual_prompt` or `image` of a codec run, which needs it; '' for all parameters.
    which: `ema` or `raw`.
    overwrite: whether an existing file is replaced.

  Returns:
    The file's metadata: the run's config (JSON), step, commit, and what `weights.save` adds.

  Raises:
    UserError: no such run or network, or the file exists or can't be written.
  """
  weights.check_target(to, overwrite)
  front_door.check_folder(str(epath.Path(to).parent))
  params, metadata = weights.load_run(workdir, which)
  config, known = json.loads(metadata['config']), ', '.join(sorted(params))
  if network and network not in params:
    raise UserError(f"{workdir} holds no network '{network}', only {known}")
  if not network and config['system'] == 'codec':  # Its networks are read one by one.
    raise UserError(f'{workdir} holds several networks: choose one with --network, of {known}')
  tree = params[network] if network else params
  if network == 'image':
    # Before anything is written: a run's pictures may be gone.
    system = systems.build(config)
    data = Pipeline(system.config.data, system.config.seed)
    pictures = data.examples(range(min(_MEASURED, len(data)))).image
    tree = system.normalised(weights.rounded(tree), pictures)
  metadata = metadata | {'network': network, 'commit': _commit()}
  weights.save(to, tree, metadata, overwrite=overwrite)
  return weights.load(to)[1]


def _commit() -> str:
  """The commit of the checkout that this runs from; `none` without one, or without git."""
  command = ['git', '-C', str(pathlib.Path(__file__).parent), 'rev-parse', 'HEAD']
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:
    return 'none'
  return found.stdout.strip() if found.returncode == 0 else 'none'


def main() -> None:
  """Runs the command."""
  for name in ('workdir', 'to'):
    if not FLAGS[name].value:
      raise UserError(f'--{name} is missing: see python -m vpe_jax.export --help')
  metadata = export(FLAGS.workdir, FLAGS.to, FLAGS.network, FLAGS.weights, FLAGS.overwrite)
  size = epath.Path(FLAGS.to).stat().length / 1e6
  print(f'{FLAGS.to}: {size:.2f} MB, step {metadata["step"]}, {metadata["fingerprint"]}')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
