"""One network of a run as a file of weights, such as those in vpe_jax/assets."""

from __future__ import annotations

import json
import pathlib
import subprocess

from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import build_section
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline

_MEASURED = 1024  # training pictures from which the moments of latents are measured


def export(
  workdir: str,
  to: str,
  network: str = '',
  which: str = 'ema',
  overwrite: bool = False,
  **settings: float | None,
) -> dict[str, str]:
  """Writes a run's weights in bfloat16; what is measured from them is measured after rounding.

  Args:
    workdir: the run.
    to: file to write, ending in `.safetensors`.
    network: `visual_prompt`, `image` or `image_codes` of a codec run, which needs it; '' for all
      parameters.
    which: `ema` or `raw`.
    overwrite: whether an existing file is replaced.
    settings: of the drawing, in place of the run's own; None keeps the run's.

  Returns:
    The file's metadata: the run's config (JSON), step, commit, and what `weights.save` adds.

  Raises:
    UserError: no such run or network, a setting is out of range, or the file exists or can't be
      written.
  """
  weights.check_target(to, overwrite)
  params, metadata = weights.load_run(workdir, which)
  config, known = json.loads(metadata['config']), ', '.join(sorted(params))
  config['sample'] |= {name: value for name, value in settings.items() if value is not None}
  # Refuses settings that the system doesn't have, or could not sample with.
  build_section(systems.sampling_sections()[config['system']], config['sample'])
  if network and network not in params:
    raise UserError(f"{workdir} holds no network '{network}', only {known}")
  if not network and config['system'] == 'codec':  # Its networks are read one by one.
    raise UserError(f'{workdir} holds several networks: choose one with --network, of {known}')
  tree = params[network] if network else params
  if network == 'image':
    # Before anything is written: a run's pictures may be gone.
    system = systems.build(config)
    data = Pipeline.of(system)
    images = data.examples(range(min(_MEASURED, len(data)))).inputs['image']
    tree = system.normalised(weights.rounded(tree), images)
  said = {'config': json.dumps(config, sort_keys=True), 'network': network, 'commit': _commit()}
  weights.save(to, tree, metadata | said, overwrite=overwrite)
  return weights.load(to)[1]


def _commit() -> str:
  """The commit of the checkout that this runs from; `none` without one, or without git."""
  command = ['git', '-C', str(pathlib.Path(__file__).parent), 'rev-parse', 'HEAD']
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError:
    return 'none'
  return found.stdout.strip() if found.returncode == 0 else 'none'
