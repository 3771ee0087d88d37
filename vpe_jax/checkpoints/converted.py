"""Published networks kept as one of our checkpoints, and trained networks on their way out.

An import is a folder like a run's: one checkpoint with checksums, whose config names the family and
its sizes. `weights.load` and whatever reads a run's workdir reads it too.
"""

from __future__ import annotations

import dataclasses
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
from vpe_jax.sharding import by_path

# Systems that train a network of a published family, and the section of its sizes in their model.
_TRAINED = {'siglip': ('siglip', 'siglip')}


def bring_in(family: str, source: str, to: str, check: bool = False) -> list[str]:
  """Imports published weights: vpe_jax.convert as a call.

  With `check`, what the reference library computes from them is compared before anything is kept.

  Returns:
    The report, a line each.

  Raises:
    UserError: see `check_target`, `sources.open_source`, `families.load`, `parity.compare` and
      `write`; or the comparison fails.
  """
  check_target(to, source)
  began = time.monotonic()
  opened = sources.open_source(source)
  imported = families.load(family, opened)
  said = []
  if check:
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    good, line = parity.verdict(family, parity.compare(imported, folder))
    if not good:
      raise UserError(line)
    said = [line]
  write(imported, to, source)
  plan = imported.plan
  kinds = sorted({str(opened.tensors[key].dtype) for key in plan.places})
  left = [f'  {key}: not used, {why}' for key, why in sorted(plan.ignored.items())]
  left += [f'  {path}: not in the source, {why}' for path, why in sorted(plan.absent.items())]
  head = f"{family}, layout '{plan.table.name}': {len(plan.places)} tensors ({', '.join(kinds)})"
  return [f'{head}, {_summary(imported.params, began)}', *left, *said, f'wrote {to}']


def send_out(family: str, source: str, to: str, dtype: str = 'float32') -> list[str]:
  """Exports weights for the reference library: vpe_jax.convert as a call.

  Returns:
    The report, a line each.

  Raises:
    UserError: see `read` and `convert.export`.
  """
  check_target(to, source)
  began = time.monotonic()
  sizes, params, _ = read(source, family)
  keys = families.save(family, sizes, params, Path(storage.place(to)), dtype=dtype)
  summary = _summary(params, began)
  return [f'{family}: {len(keys)} tensors ({dtype}), {summary}', f'wrote {to}']


def _summary(params: object, began: float) -> str:
  count = sum(leaf.size for leaf in by_path(params).values())
  # Linux counts kilobytes. Mapped pages of the files are in it, which the system can take back.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  seconds = time.monotonic() - began
  return f'{count:,} parameters, {seconds:.1f} s, peak memory {peak:.2f} GB'


def write(imported: families.Imported, folder: str, source: str) -> None:
  """Keeps an import as a checkpoint.

  Args:
    imported: the network.
    folder: local or gs://; must not exist.
    source: where it came from, for the record.

  Raises:
    UserError: the folder exists or can't be written.
  """
  check_target(folder)
  config = {'family': imported.family, 'sizes': to_dict(imported.sizes), 'source': source}
  state = {'stage': 0, 'step': 0, 'stage_step': 0, 'examples_seen': 0}
  state |= {'params': imported.params, 'opt_state': {}, 'ema': {}}
  store = Store(str(storage.place(folder) / FOLDER), CheckpointConfig())
  try:
    with storage.writing(folder):
      store.save(state, config, force=True)
      store.wait()
  finally:
    store.close()


def check_target(folder: str, source: str = '') -> None:
  """Refuses what would be overwritten, or would lie among the weights that it is made from.

  Raises:
    UserError: something is there, or the folder is within the source.
  """
  place = storage.place(folder)
  if storage.reached(place, place.exists):
    raise UserError(f"'{folder}' exists: name another folder")
  if source and not storage.is_remote(folder):
    origin = Path(source).expanduser().resolve()
    if origin.is_dir() and Path(place).resolve().is_relative_to(origin):
      raise UserError(f"'{folder}' lies within the source '{source}': name a folder outside it")


def network(start: PretrainedWeights, place: Callable[[Params], Params]) -> Params:
  """The parameters of a published network, from where it was published or from an import.

  Args:
    start: what it is and where its weights lie.
    place: gives the abstract parameters their shardings. Published tensors go straight there; what
      an import holds comes back in numpy.

  Raises:
    UserError: weights are missing, don't fit, or are of another size.
  """
  if not (epath.Path(start.source).expanduser() / FOLDER).is_dir():
    source = sources.open_source(start.source)
    return families.load(start.family, source, place, start.sizes).params
  sizes, params, _ = read(start.source, start.family)
  free = getattr(families.get(start.family), 'FREE', ())
  if sizes != dataclasses.replace(start.sizes, **{name: getattr(sizes, name) for name in free}):
    raise UserError(
      f"'{start.source}' holds a {start.family} of other sizes than the config's: {sizes}, not "
      f'{start.sizes}'
    )
  return params


def read(source: str, family: str) -> tuple[Any, Params, Mapping[str, str]]:
  """Sizes, parameters and metadata of an import, or of a network that was trained here.

  Args:
    source: the folder of an import, the workdir of a run, `assets:NAME` or a file of weights.
    family: what it must be.

  Raises:
    UserError: nothing is there, or it is of another family.
  """
  params, metadata = weights.load(source)
  config = json.loads(metadata.get('config', '{}'))
  if 'family' in config:
    found, sizes = config['family'], config['sizes']
  elif config.get('system') in _TRAINED:
    found, section = _TRAINED[config['system']]
    sizes = to_dict(getattr(systems.build(config).config.model, section))
  else:
    raise UserError(
      f"'{source}' is no import, and a run of system '{config.get('system')}' trains no network of "
      f'a published family (those that do: {", ".join(_TRAINED)})'
    )
  if found != family:
    raise UserError(f"'{source}' is of family {found}, not {family}: give --family={found}")
  return build_section(families.get(family).Sizes, sizes), params, metadata
