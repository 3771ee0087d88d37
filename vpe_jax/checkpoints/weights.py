"""Weight files: safetensors whose keys are parameter paths; loading never executes code."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vpe_jax import __version__, storage
from vpe_jax.checkpoints import sources
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig, nearest
from vpe_jax.contracts import Params, UserError
from vpe_jax.sharding import by_path
from vpe_jax.storage import reached

ASSETS = 'assets:'
ENDING = '.safetensors'
# Name of each file in vpe_jax/assets -> config of the run whose weights it contains.
ASSET_CONFIGS = {
  'siglip': 'configs/siglip.py',
  'judge': 'configs/siglip.py:judge',
  'feature_vq': 'configs/codec.py:tiny,stage=feature_vq',
  'image': 'configs/codec.py:tiny,stage=image',
  'image_codes': 'configs/codec.py:tiny,stage=image_codes',
  'tiny': 'configs/t2i.py',
}
_DTYPES = {'bfloat16': np.dtype(jnp.bfloat16), 'float16': np.float16, 'float32': np.float32}


def is_file(source: str) -> bool:
  """Whether a source of `load` is a single file (shipped or not) rather than a run."""
  return source.startswith(ASSETS) or source.endswith(ENDING)


def load(source: str) -> tuple[Params, dict[str, str]]:
  """Loads weights from a file, an asset or a run.

  Args:
    source: `assets:NAME` (shipped with the library), a path ending in `.safetensors`, or the
      workdir of a run (EMA weights of its newest checkpoint, raw weights where there is no EMA);
      `~` expands to the home folder.

  Returns:
    (nested dict of numpy arrays, floats as float32; metadata). The metadata of a run has `config`
    (JSON), `version`, `step`, `stage`, `weights` (ema or raw) and `source`.

  Raises:
    UserError: there are no weights, they can't be read, or they are damaged; names the cure.
  """
  if source.startswith(ASSETS):
    return _load_asset(source.removeprefix(ASSETS))
  path = storage.place(source)
  if reached(path, path.is_dir):
    return load_run(source)
  if not source.endswith(ENDING):
    raise UserError(
      f"no weights at '{source}': it is neither {ASSETS}NAME, nor a {ENDING} file, nor the workdir "
      'of a run (python -m vpe_jax.main --config=... --workdir=... makes one)'
    )
  if not path.exists():
    raise UserError(
      f"no file '{source}': name an existing file, or the workdir of a run of python -m "
      'vpe_jax.main'
    )
  return _parse(path.read_bytes(), source)


def load_run(workdir: str, which: str = 'ema') -> tuple[Params, dict[str, str]]:
  """Loads the weights of a run's newest intact checkpoint; returns the same as `load`.

  Args:
    workdir: of the run, local (`~` expands to the home folder) or gs://.
    which: `ema` (EMA weights, raw ones for parameters without an EMA) or `raw`. Parameters that
      trained only in an earlier stage have their EMA value in both.

  Raises:
    UserError: `which` is neither, the run has no intact checkpoint, or it can't be reached.
  """
  if which not in ('ema', 'raw'):
    raise UserError(f"--weights={which} is neither 'ema' nor 'raw'")
  leaves, meta = read_run(workdir, ('params/', 'ema/') if which == 'ema' else ('params/',))
  raw = _under('params/', leaves)
  ema = _under('ema/', leaves)
  metadata = {
    'config': json.dumps(meta['config'], sort_keys=True),
    'version': meta['version'],
    'step': str(meta['step']),
    'stage': str(meta['stage']),
    'weights': 'ema' if ema else 'raw',
    'source': str(workdir),
  }
  return _nested({path: _to_float32(leaf) for path, leaf in (raw | ema).items()}), metadata


def config_of(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
  """The config in the metadata of weights, from which `systems.build` builds their system.

  Args:
    metadata: from `load`.
    source: name of the weights in errors.

  Raises:
    UserError: the config is missing or damaged.
  """
  if 'config' not in metadata:
    raise UserError(f'the weights of {source} have no config: name the run that trained them')
  try:
    config = json.loads(metadata['config'])
  except (ValueError, RecursionError):
    config = None
  if not isinstance(config, dict):
    raise UserError(f'the config in {source} is damaged: get the weights again')
  return config


def read_run(
  workdir: str, prefixes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
  """Reads leaves of a run's state from its newest intact checkpoint.

  Args:
    workdir: of the run, local (`~` expands to the home folder) or gs://.
    prefixes: path prefixes of the leaves to read.

  Returns:
    ({path: array}, the checkpoint's record).

  Raises:
    UserError: the run has no intact checkpoint, or it can't be reached.
  """
  store = Store(str(storage.place(workdir) / FOLDER), CheckpointConfig())
  try:
    contents = store.read(lambda path: path.startswith(prefixes))
  finally:
    store.close()
  if contents is None:
    raise UserError(
      f'{workdir} has no checkpoint yet: python -m vpe_jax.main --config=... --workdir={workdir} '
      'makes one'
    )
  return contents


def save(
  path: str,
  tree: Params,
  metadata: Mapping[str, str],
  dtype: str = 'bfloat16',
  overwrite: bool = False,
) -> None:
  """Writes a nested dict of arrays as one safetensors file, its keys joined by `/`.

  Args:
    path: ends in `.safetensors`, local (`~` expands to the home folder) or gs://; written
      atomically.
    tree: float leaves are saved as `dtype`, others unchanged.
    metadata: strings, such as `config` (JSON); `version`, `dtype` and `fingerprint` (of the tree
      that `load` returns) are added.
    dtype: bfloat16, float16 or float32.
    overwrite: whether an existing file may be replaced.

  Raises:
    UserError: see `check_target`; or the dtype is unknown, or the file can't be written.
  """
  check_target(path, overwrite)
  if dtype not in _DTYPES:
    raise UserError(f"can't write '{path}' as {dtype}: dtypes are {', '.join(_DTYPES)}")
  flat = {name: np.asarray(jax.device_get(leaf)) for name, leaf in by_path(tree).items()}
  # safetensors writes the buffer of an array, which must be contiguous and in row-major order.
  arrays = {
    name: np.ascontiguousarray(_cast(leaf, dtype)).reshape(leaf.shape)
    for name, leaf in flat.items()
  }
  strings = {'version': __version__, **metadata, 'dtype': dtype}
  strings['fingerprint'] = fingerprint({name: _to_float32(leaf) for name, leaf in arrays.items()})
  with storage.writing(path):
    storage.write_atomic(storage.place(path), safetensors.numpy.save(arrays, metadata=strings))


def check_target(path: str, overwrite: bool = False) -> None:
  """Checks that `save` can write to a path; front doors call it before the work starts.

  Raises:
    UserError: the file exists (and `overwrite` is off), is a folder, or has another suffix.
  """
  target = storage.place(path)
  if not str(path).endswith(ENDING):
    raise UserError(f"can't write '{path}': name a file that ends in {ENDING}")
  if reached(target, target.is_dir):
    raise UserError(f"'{path}' is a folder: name another file")
  if target.exists() and not overwrite:
    raise UserError(f"'{path}' exists: name another file or replace it with --overwrite")


def round_to(tree: Params, dtype: str = 'bfloat16') -> Params:
  """Rounds float leaves to `dtype` and casts them back to float32, as `save` and `load` do."""
  return jax.tree.map(lambda leaf: _to_float32(_cast(np.asarray(leaf), dtype)), tree)


def mismatch(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
  """Finds the first path, in sorted order, whose shape differs or that only one tree has.

  Args:
    expected: path -> leaf.
    actual: path -> leaf.

  Returns:
    (path, expected shape, actual shape), with `absent` for a missing leaf; None if the trees agree.
  """
  for path in sorted(expected.keys() | actual.keys()):
    expected_shape, actual_shape = (
      list(leaves[path].shape) if path in leaves else 'absent' for leaves in (expected, actual)
    )
    if expected_shape != actual_shape:
      return path, expected_shape, actual_shape
  return None


def fingerprint(tree: Params) -> str:
  """Hash of a tree's paths, shapes, dtypes and bits: twelve hex digits."""
  digest = hashlib.sha256()
  for path, leaf in sorted(by_path(tree).items()):
    array = np.ascontiguousarray(jax.device_get(leaf))
    digest.update(f'{path} {np.shape(leaf)} {array.dtype}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:12]


def _load_asset(name: str) -> tuple[Params, dict[str, str]]:
  folder = importlib.resources.files('vpe_jax') / 'assets'
  resource = folder / f'{name}{ENDING}'
  if name not in ASSET_CONFIGS:
    raise UserError(f"unknown asset '{ASSETS}{name}'{nearest(name, ASSET_CONFIGS)}")
  if not resource.is_file():
    raise UserError(
      f"'{ASSETS}{name}' is not installed (vpe_jax/assets/{name}{ENDING}): install vpe_jax again, "
      f'or train it with python -m vpe_jax.main --config={ASSET_CONFIGS[name]}'
    )
  return _parse(resource.read_bytes(), f'{ASSETS}{name}')


def _parse(data: bytes, source: str) -> tuple[Params, dict[str, str]]:
  tensors, metadata = sources.parse(data, source)
  # Copied, because a tensor is read as a read-only view of the file.
  tree = _nested({name: _to_float32(tensor.read().copy()) for name, tensor in tensors.items()})
  # Only files written by `save` have a fingerprint.
  if metadata.get('fingerprint', actual := fingerprint(tree)) != actual:
    raise UserError(
      f"'{source}' is damaged: its fingerprint is {actual}, not {metadata['fingerprint']}: get it "
      'again, or export it again'
    )
  return tree, metadata


def _under(prefix: str, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {p.removeprefix(prefix): leaf for p, leaf in leaves.items() if p.startswith(prefix)}


def _cast(leaf: np.ndarray, dtype: str) -> np.ndarray:
  return leaf.astype(_DTYPES[dtype]) if _is_float(leaf) else leaf


def _to_float32(leaf: np.ndarray) -> np.ndarray:
  return leaf.astype(np.float32) if _is_float(leaf) else leaf


def _is_float(leaf: np.ndarray) -> bool:
  return jnp.issubdtype(leaf.dtype, np.floating)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path in sorted(flat):
    *parents, name = path.split('/')
    branch = tree
    for parent in parents:
      branch = branch.setdefault(parent, {})
    branch[name] = flat[path]
  return tree
