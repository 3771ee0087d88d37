"""Writes one network of a run as shipped weights: python -m vpe_jax.export --workdir=RUN --to=FILE

Examples:
  python -m vpe_jax.export --workdir=runs/siglip-tiny --to=vpe_jax/assets/siglip.safetensors
  python -m vpe_jax.export --workdir=runs/codec-tiny --network=image \
      --to=vpe_jax/assets/image.safetensors
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from absl import app, flags

from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline

_MEASURED = 1024  # training pictures from which the moments of latents are measured

_WORKDIR = flags.DEFINE_string('workdir', None, 'the run, local or gs://')
_TO = flags.DEFINE_string('to', None, 'file to write, ending in .safetensors')
_NETWORK = flags.DEFINE_string('network', '', 'one network of a run that trains several')
_WEIGHTS = flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged parameters, or the last')
_OVERWRITE = flags.DEFINE_bool('overwrite', False, 'replaces an existing file')


def export(
  workdir: str, to: str, network: str = '', which: str = 'ema', overwrite: bool = False
) -> dict[str, str]:
  """Writes a run's weights in bfloat16; what is measured from them is measured after rounding.

  Args:
    workdir: the run.
    to: file to write, ending in `.safetensors`.
    network: `visual_prompt` or `image` of a codec run; '' for all parameters.
    which: `ema` or `raw`.
    overwrite: whether an existing file is replaced.

  Returns:
    The file's metadata: the run's config (JSON), step, commit, and what `weights.save` adds.

  Raises:
    UserError: no such run or network, or the file exists.
  """
  params, metadata = weights.load_run(workdir, which)
  if network and network not in params:
    raise UserError(f"{workdir} holds no network '{network}', only {', '.join(sorted(params))}")
  tree = params[network] if network else params
  metadata = metadata | {'network': network, 'commit': _commit()}
  weights.save(to, tree, metadata, overwrite=overwrite)
  if network == 'image':
    system = systems.build(json.loads(metadata['config']))
    data = Pipeline(system.config.data, system.config.seed)
    pictures = data.examples(range(min(_MEASURED, len(data)))).image
    rounded, _ = weights.load(to)
    weights.save(to, system.normalised(rounded, pictures), metadata, overwrite=True)
  return weights.load(to)[1]


def _commit() -> str:
  """The commit of the checkout that this runs from."""
  folder = pathlib.Path(__file__).parent
  command = ['git', '-C', str(folder), 'rev-parse', 'HEAD']
  found = subprocess.run(command, capture_output=True, text=True, check=False)
  return found.stdout.strip() if found.returncode == 0 else 'none'


def _main(_: list[str]) -> None:
  for name in ('workdir', 'to'):
    if not flags.FLAGS[name].value:
      raise UserError(f'--{name} is missing: see python -m vpe_jax.export --help')
  metadata = export(_WORKDIR.value, _TO.value, _NETWORK.value, _WEIGHTS.value, _OVERWRITE.value)
  size = pathlib.Path(_TO.value).stat().st_size / 1e6
  print(f'{_TO.value}: {size:.2f} MB, step {metadata["step"]}, {metadata["fingerprint"]}')


def _or_exit(argv: list[str]) -> None:
  try:
    _main(argv)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  app.run(_or_exit)
