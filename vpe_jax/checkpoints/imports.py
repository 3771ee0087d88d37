"""Imports of published networks: folders in the format of a run, with one checkpoint.

A generator imported with its codec and tokenizer is a run, with the config that builds its system.
Any other import (another network, or a generator's network alone) has a config with only its
family, sizes and source. `weights.load` and other readers of a workdir can read both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpe_jax import storage, systems
from vpe_jax.checkpoints import families, sources, weights
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig, Config, build_section, to_dict
from vpe_jax.contracts import Params, PretrainedWeights, UserError
from vpe_jax.sharding import leaves_by_path


def write(family: str, sizes: Any, params: Params, folder: str, source: str) -> None:
  """Saves the import of a single network.

  Args:
    family: a name in `families.FAMILIES`.
    sizes: sizes of the network, as the family's `Sizes`.
    params: its parameters.
    folder: output folder, local or gs://; must not exist.
    source: name of the source, saved in the config.

  Raises:
    UserError: the folder exists or can't be written.
  """
  check_target(folder)
  write_checkpoint(folder, params, {'family': family, 'sizes': to_dict(sizes), 'source': source})


def write_checkpoint(
  folder: str, params: Params, config: Mapping[str, Any], stage: int = 0, step: int = 0
) -> None:
  """Saves parameters as the only checkpoint of a run, without optimizer state and EMA.

  If the save fails, what it wrote is deleted; other files in the folder are kept.

  Args:
    folder: folder of the run, local or gs://; may exist, but without checkpoints.
    params: the parameters.
    config: config of the run.
    stage: index of the stage in which they were trained.
    step: their step.

  Raises:
    UserError: the folder has checkpoints, or can't be written.
  """
  state = {'stage': stage, 'step': step, 'stage_step': 0, 'examples_seen': 0}
  state |= {'params': params, 'opt_state': {}, 'ema': {}}
  path = storage.resolve(folder)
  written = path / FOLDER if storage.probe(path, path.exists) else path
  if written != path:
    check_target(str(written))
  store = Store(str(path / FOLDER), CheckpointConfig())
  try:
    with storage.writing(folder), storage.removed_on_error(written):
      store.save(state, config, force=True)
      store.wait()
  finally:
    store.close()


def check_target(folder: str, source: str = '') -> None:
  """Checks that an output folder doesn't exist and is not inside the source.

  Raises:
    UserError: it exists, or is inside the source.
  """
  target = storage.resolve(folder)
  if storage.probe(target, target.exists):
    raise UserError(f"'{folder}' exists: name another folder")
  if source and not storage.is_remote(folder):
    origin = Path(source).expanduser().resolve()
    if origin.is_dir() and Path(target).resolve().is_relative_to(origin):
      raise UserError(f"'{folder}' is inside the source '{source}': name a folder outside it")


def network(
  pretrained: PretrainedWeights, shard: Callable[[Params], Params], dtype: str = 'float32'
) -> Params:
  """Loads the parameters of a published network from published weights or from an import.

  Args:
    pretrained: family, source and sizes of the network.
    shard: maps abstract parameters to the same ones with shardings, to which each parameter is
      loaded. An import's leaves without a sharding are loaded as numpy arrays.
    dtype: dtype of the parameters.

  Raises:
    UserError: weights are missing, out of reach, don't fit, or have other sizes, or the dtype is
      unknown.
  """
  family, expected = pretrained.family, pretrained.sizes
  checkpoints = storage.resolve(pretrained.source) / FOLDER
  if not storage.probe(checkpoints, checkpoints.is_dir):
    source = sources.open_source(pretrained.source)
    return families.load(family, source, shard, expected, dtype).params
  targets = leaves_by_path(shard(families.abstract(family, expected, dtype)))
  targets = {path: leaf for path, leaf in targets.items() if leaf.sharding is not None}
  sizes, params, _ = read(pretrained.source, family, dtype, targets)
  families.check_equal_sizes(family, pretrained.source, sizes, expected)
  return params


def read(
  source: str, family: str, dtype: str = 'float32', targets: weights.Targets | None = None
) -> tuple[Any, Params, Mapping[str, str]]:
  """Loads sizes, parameters and metadata of an import or of a network trained with vpe_jax.

  Args:
    source: the folder of an import, the workdir of a run, `assets:NAME` or a weight file.
    family: the expected family.
    dtype: dtype of the parameters.
    targets: see `weights.load`.

  Raises:
    UserError: there are no weights, they have no config, they are of another or no published
      family, or the dtype is unknown.
  """
  params, metadata = weights.load(source, dtype, targets)
  actual, sizes = _family_of(weights.parse_config(metadata, source), source)
  if actual != family:
    raise UserError(
      f"'{source}' is of family {actual}, not {family}: name weights of {family}, or export these "
      f'with --family={actual}'
    )
  return sizes, params, metadata


def _family_of(config: Mapping[str, Any], source: str) -> tuple[str, Any]:
  """Family and sizes of an import, or of a network that a run has trained."""
  if 'family' in config:
    sizes = families.get(config['family']).Sizes
    return config['family'], build_section(sizes, config['sizes'])
  if 'system' in config:
    built = systems.build(config).config
    for family, sizes_of in _families_of_runs().items():
      if (sizes := sizes_of(built)) is not None:
        return family, sizes
  raise UserError(
    f"'{source}' is not an import, and its system '{config.get('system')}' trains no network of a "
    f'published family with this config (families: {", ".join(_families_of_runs())}): name an '
    'import, or a run of such a system'
  )


def _families_of_runs() -> dict[str, Callable[[Config], Any]]:
  """Maps each published family that a run can train to a function of the run's config.

  The function returns the sizes of the network, or None, as systems.package.Release.sizes.
  """
  siglip = lambda config: config.model.siglip if config.system == 'siglip' else None
  return {'siglip': siglip} | {name: one.sizes for name, one in systems.releases().items()}
