"""Imports published networks as checkpoints, and exports trained networks.

An import is a folder in the format of a run: one checkpoint with checksums, whose config contains
the family and the sizes of the network. `weights.load` and other readers of a workdir can read it.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from vpe_jax import storage, systems
from vpe_jax.checkpoints import families, parity, sources, weights
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig, build_section, to_dict
from vpe_jax.contracts import Params, PretrainedWeights, UserError
from vpe_jax.sharding import leaves_by_path

# System that trains a network of a published family -> (family, config.model section with sizes).
_FAMILY_OF_SYSTEM = {'siglip': ('siglip', 'siglip')}


def import_weights(
  family: str,
  source: str,
  to: str,
  check: bool = False,
  dtype: str = 'float32',
  allow_nonfinite: bool = False,
) -> list[str]:
  """Imports published weights; the Python API of `vpe_jax.convert`.

  Args:
    family: a name in `families.FAMILIES`.
    source: see `sources.open_source`.
    to: output folder.
    check: whether to compare outputs with the reference library before anything is written.
    dtype: dtype of the saved parameters: float32, bfloat16 or float16.
    allow_nonfinite: whether to import NaN and infinity.

  Returns:
    The lines of the report.

  Raises:
    UserError: see `check_target`, `sources.open_source`, `families.load`, `parity.compare` and
      `write`; the dtype is unknown; or the comparison fails, or is requested in another dtype
      than float32.
  """
  check_target(to, source)
  if check and dtype != 'float32':
    raise UserError(f'--check compares in float32: import with --dtype=float32, not {dtype}')
  began = time.monotonic()
  opened = sources.open_source(source)
  source = opened.name  # with the commit of a model on the hub
  imported = families.load(family, opened, dtype=dtype, allow_nonfinite=allow_nonfinite)
  check_lines = []
  if check:
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    passed, line = parity.verdict(family, parity.compare(imported, folder))
    if not passed:
      raise UserError(line)
    check_lines = [line]
  write(imported, to, source)
  tensor_map = imported.tensor_map
  kinds = sorted({str(opened.tensors[key].dtype) for key in tensor_map.destinations})
  ignored, absent = sorted(tensor_map.ignored.items()), sorted(tensor_map.absent.items())
  tensors = f'{len(tensor_map.destinations)} tensors ({", ".join(kinds)})'
  return [
    f"{family}, layout '{tensor_map.table.name}': {tensors}, {_summary(imported.params, began)}",
    *(f'  {key}: not used, {why}' for key, why in ignored),
    *(f'  {path}: not in the source, {why}' for path, why in absent),
    *check_lines,
    f'wrote {to}',
  ]


def export_weights(family: str, source: str, to: str, dtype: str = 'float32') -> list[str]:
  """Exports weights for the reference library; the Python API of `vpe_jax.convert`.

  Args:
    family: a name in `families.FAMILIES`.
    source: see `read`.
    to: output folder.
    dtype: dtype of the written tensors: float32, bfloat16 or float16.

  Returns:
    The lines of the report.

  Raises:
    UserError: the folder is not local; see also `check_target`, `read` and `convert.export`.
  """
  if storage.is_remote(to):
    raise UserError(f'exports are written to a local folder, not to {to}: export, then upload it')
  check_target(to, source)
  began = time.monotonic()
  sizes, params, _ = read(source, family)
  keys = families.save(family, sizes, params, Path(storage.resolve(to)), dtype=dtype)
  summary = _summary(params, began)
  return [f'{family}: {len(keys)} tensors ({dtype}), {summary}', f'wrote {to}']


def _summary(params: object, began: float) -> str:
  count = sum(leaf.size for leaf in leaves_by_path(params).values())
  # ru_maxrss is in KiB on Linux and includes memory-mapped pages, which the system can reclaim.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  seconds = time.monotonic() - began
  return f'{count:,} parameters, {seconds:.1f} s, peak memory {peak:.2f} GiB'


def write(imported: families.Imported, folder: str, source: str) -> None:
  """Saves an import as a checkpoint.

  Args:
    imported: the network.
    folder: output folder, local or gs://; must not exist.
    source: name of the source, saved in the config.

  Raises:
    UserError: the folder exists or can't be written.
  """
  check_target(folder)
  config = {'family': imported.family, 'sizes': to_dict(imported.sizes), 'source': source}
  state = {'stage': 0, 'step': 0, 'stage_step': 0, 'examples_seen': 0}
  state |= {'params': imported.params, 'opt_state': {}, 'ema': {}}
  store = Store(str(storage.resolve(folder) / FOLDER), CheckpointConfig())
  try:
    with storage.writing(folder), storage.removed_on_error(folder):
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
    shard: adds shardings to the abstract parameters. Published tensors are loaded with these
      shardings; an import is loaded as numpy arrays.
    dtype: dtype of the parameters.

  Raises:
    UserError: weights are missing, don't fit, or have other sizes, or the dtype is unknown.
  """
  family, expected = pretrained.family, pretrained.sizes
  if not (epath.Path(pretrained.source).expanduser() / FOLDER).is_dir():
    source = sources.open_source(pretrained.source)
    return families.load(family, source, shard, expected, dtype).params
  sizes, params, _ = read(pretrained.source, family, dtype)
  families.check_equal_sizes(family, pretrained.source, sizes, expected)
  return params


def read(source: str, family: str, dtype: str = 'float32') -> tuple[Any, Params, Mapping[str, str]]:
  """Loads sizes, parameters and metadata of an import or of a network trained with vpe_jax.

  Args:
    source: the folder of an import, the workdir of a run, `assets:NAME` or a weight file.
    family: the expected family.
    dtype: dtype of the parameters.

  Raises:
    UserError: there are no weights, they are of another or no published family, or the dtype is
      unknown.
  """
  params, metadata = weights.load(source, dtype)
  config = json.loads(metadata.get('config', '{}'))
  if 'family' in config:
    actual, sizes = config['family'], config['sizes']
  elif config.get('system') in _FAMILY_OF_SYSTEM:
    actual, section = _FAMILY_OF_SYSTEM[config['system']]
    sizes = to_dict(getattr(systems.build(config).config.model, section))
  else:
    raise UserError(
      f"'{source}' is not an import, and system '{config.get('system')}' trains no network of a "
      f'published family (systems that do: {", ".join(_FAMILY_OF_SYSTEM)})'
    )
  if actual != family:
    raise UserError(f"'{source}' is of family {actual}, not {family}: set --family={actual}")
  return build_section(families.get(family).Sizes, sizes), params, metadata
