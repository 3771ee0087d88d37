"""Exports the weights of a run, or of one of its networks, to a weight file."""

from __future__ import annotations

import json
import pathlib
import subprocess

from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import build_section
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline

_MOMENT_IMAGES = 1024  # training images used to measure the moments of latents


def export(
  workdir: str,
  to: str,
  network: str = '',
  which: str = 'ema',
  overwrite: bool = False,
  step: int | None = None,
  **settings: float | None,
) -> dict[str, str]:
  """Writes a run's weights in bfloat16.

  The file of an autoencoder (`image`) also has the moments of its latents, measured with the
  rounded weights.

  Args:
    workdir: folder of the run (local or gs://).
    to: output file, ending in `.safetensors`.
    network: name of the network to export; '' for all parameters. A run of the codec system needs
      a name: `feature_vq`, `image` or `image_codes`.
    which: `ema` for EMA parameters, `raw` for those of the last step.
    overwrite: whether an existing file may be replaced.
    step: step of the checkpoint; None: the newest intact one.
    settings: sampling settings that override the run's; None keeps the run's.

  Returns:
    The file's metadata: the run's config (JSON), step, commit, and the entries that `weights.save`
    adds.

  Raises:
    UserError: the run or network doesn't exist, a codec run is exported without `network`, a
      setting is out of range, or the file exists or can't be written.
  """
  weights.check_target(to, overwrite)
  params, metadata = weights.load_run(workdir, which, step=step)
  config, networks = json.loads(metadata['config']), ', '.join(sorted(params))
  config['sample'] |= {name: value for name, value in settings.items() if value is not None}
  # Refuses unknown or invalid sampling settings.
  build_section(systems.sampling_sections()[config['system']], config['sample'])
  if network and network not in params:
    raise UserError(f"{workdir} has no network '{network}': choose one of {networks}")
  if not network and config['system'] == 'codec':  # Readers expect one network per file.
    raise UserError(f'{workdir} has several networks: choose one with --network, of {networks}')
  tree = params[network] if network else params
  if network == 'image':
    # Read before anything is written, because the run's images may no longer exist.
    system = systems.build(config)
    data = Pipeline.of(system)
    images = data.examples(range(min(_MOMENT_IMAGES, len(data)))).inputs['image']
    tree = system.normalize_latents(weights.round_to(tree), images)
  extra = {'config': json.dumps(config, sort_keys=True), 'network': network, 'commit': _commit()}
  weights.save(to, tree, metadata | extra, overwrite=overwrite)
  return weights.load(to)[1]


def _commit() -> str:
  """The commit of the checkout that contains this file; `none` without a checkout or git."""
  command = ['git', '-C', str(pathlib.Path(__file__).parent), 'rev-parse', 'HEAD']
  try:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:
    return 'none'
  return result.stdout.strip() if result.returncode == 0 else 'none'
