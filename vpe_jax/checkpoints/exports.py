"""Exports the weights of a run to a file, or with everything that sampling reads to a folder."""

from __future__ import annotations

import json
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

from vpe_jax import systems
from vpe_jax.checkpoints import complete, weights
from vpe_jax.config import build_section
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline

# Embedded data (config.data.source) -> its origin and licence.
_OPENMOJI = 'OpenMoji (CC BY-SA 4.0)'
_DATA_LICENCES = dict.fromkeys(('mixture', 'openmoji', 'edits'), _OPENMOJI)
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
    The file's metadata: that of `weights.load_run`, with `settings` in the config; network, commit,
    and the entries that `weights.save` adds.

  Raises:
    UserError: the run or network doesn't exist, a codec run is exported without `network`, a
      setting is out of range, or the file exists or can't be written.
  """
  weights.check_target(to, overwrite)
  params, metadata = weights.load_run(workdir, which, 'bfloat16', step)
  config = _with_settings(weights.config_of(metadata, workdir), settings)
  networks = ', '.join(sorted(params))
  if network and network not in params:
    raise UserError(f"{workdir} has no network '{network}': choose one of {networks}")
  if not network and config['system'] == 'codec':  # A file of weights has one codec.
    raise UserError(f'{workdir} has several networks: choose one with --network, of {networks}')
  tree = params[network] if network else params
  if network == 'image':
    # The images are read before the file is written, because they may no longer exist.
    system = systems.build(config)
    data = Pipeline.of(system)
    images = data.examples(range(min(_MOMENT_IMAGES, len(data)))).inputs['image']
    tree = system.normalize_latents(weights.round_to(tree), images)
  extra = {'config': json.dumps(config, sort_keys=True), 'network': network, 'commit': _commit()}
  weights.save(to, tree, metadata | extra, overwrite=overwrite)
  return weights.load(to)[1]


def export_folder(
  source: str,
  to: str,
  which: str = 'ema',
  step: int | None = None,
  licence: str = '',
  **settings: float | None,
) -> list[str]:
  """Writes a generator as a complete folder, in bfloat16; see checkpoints.complete.

  Args:
    source: folder of the run (local or gs://), an asset, or a weight file with a config.
    to: local output folder, which must not exist.
    which: `ema` for EMA parameters, `raw` for those of the last step. A file has only one kind.
    step: step of the checkpoint; None: the newest intact one. A file has no other.
    licence: licence of the parameters, for the model card.
    settings: sampling settings that override the run's; None keeps the run's.

  Returns:
    A line for each network inside, and for the tokenizer.

  Raises:
    UserError: the source doesn't exist, does not generate images, or has no weights of this kind
      or step; a setting is out of range; or the folder exists, is not local or can't be written.
  """
  complete.check_target(to)
  if weights.is_file(source):
    weights.check_file(source, which, step)
    params, metadata = weights.load(source, 'bfloat16')
  else:
    params, metadata = weights.load_run(source, which, 'bfloat16', step)
  config = _with_settings(weights.config_of(metadata, source), settings)
  data, trained = config['data']['source'], int(metadata.get('step', 0))
  origin = _DATA_LICENCES.get(data, '')
  provenance = {
    'source': f'`{source}`, {metadata.get("weights", "ema")} weights of step {trained:,}',
    'training data': f'`{data}`{f": {origin}" if origin else ""}',
    'parent runs': f'`{config["start"]}`' if config.get('start') else 'none',
    'commit': metadata.get('commit', _commit()),
    'licence': licence
    or f'not stated (--licence); see those of the data{" above" if origin else ""}',
  }
  stage = int(metadata.get('stage', len(config['stages']) - 1))
  contents = complete.Contents(params, config, provenance, stage, trained)
  return complete.write(to, contents)


def _with_settings(config: dict[str, Any], settings: Mapping[str, float | None]) -> dict[str, Any]:
  """The config of a run with other sampling settings.

  Raises:
    UserError: a setting is unknown or out of range.
  """
  changes = {name: value for name, value in settings.items() if value is not None}
  sample = config.get('sample', {}) | changes
  build_section(systems.sampling_sections()[config['system']], sample)
  return config | {'sample': sample}


def _commit() -> str:
  """The commit of the checkout that contains this file; `none` without a checkout or git."""
  command = ['git', '-C', str(pathlib.Path(__file__).parent), 'rev-parse', 'HEAD']
  try:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:
    return 'none'
  return result.stdout.strip() if result.returncode == 0 else 'none'
