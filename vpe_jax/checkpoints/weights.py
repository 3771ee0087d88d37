"""Weight files: safetensors whose keys are parameter paths; loading never executes code."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from vpe_jax import __version__, storage, systems
from vpe_jax.checkpoints import convert, dtypes, sources
from vpe_jax.checkpoints.sources import Tensor
from vpe_jax.checkpoints.store import FOLDER, Store
from vpe_jax.config import CheckpointConfig, did_you_mean
from vpe_jax.contracts import Params, UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.storage import probe

ASSETS = 'assets:'
ENDING = '.safetensors'
# Name of each file in vpe_jax/assets -> config of the run whose weights it contains.
ASSET_CONFIGS = {
  'siglip': 'configs/siglip.py',
  'evaluator_network': 'configs/siglip.py:evaluator_network',
  'feature_vq': 'configs/codec.py:tiny,stage=feature_vq',
  'image': 'configs/codec.py:tiny,stage=image',
  'image_codes': 'configs/codec.py:tiny,stage=image_codes',
  'tiny': 'configs/t2i.py',
}
_PARAMS, _EMA = 'params/', 'ema/'  # prefixes of parameters and their EMA in a state
Targets = Mapping[str, jax.ShapeDtypeStruct]  # path -> shape and sharding
_HASH_CHUNK = 2**20  # elements that a fingerprint casts at a time


def is_file(source: str) -> bool:
  """Whether a source of `load` is a single file (shipped or not) rather than a run."""
  return source.startswith(ASSETS) or source.endswith(ENDING)


def load(
  source: str, dtype: str = 'float32', targets: Targets | None = None
) -> tuple[Params, dict[str, str]]:
  """Loads weights from a file, an asset or a run.

  Each leaf is cast when it is read, so host memory never holds a second copy of the tree at the
  saved dtype (except of assets, which are small).

  Args:
    source: `assets:NAME` (shipped with the library), a path ending in `.safetensors`, or the
      workdir of a run (EMA weights of its newest checkpoint, raw weights where there is no EMA);
      `~` expands to the home folder.
    dtype: dtype of the float leaves: float32, bfloat16 or float16.
    targets: path -> shape and sharding of leaves that are loaded onto their devices, shard by
      shard; leaves of other paths or shapes become numpy arrays.

  Returns:
    (nested dict of arrays; metadata). The metadata of a run has `config` (JSON), `version`,
    `step`, `stage`, `weights` (ema or raw) and `source`.

  Raises:
    UserError: there are no weights, they can't be read, they are damaged, or the dtype is unknown.
  """
  if not is_file(source):
    path = storage.resolve(source)
    if probe(path, path.is_dir):
      return load_run(source, dtype=dtype, targets=targets)
    raise UserError(
      f"no weights at '{source}': it is neither {ASSETS}NAME, nor a {ENDING} file, nor the workdir "
      'of a run (python -m vpe_jax.main --config=... --workdir=... makes one)'
    )
  return _read(*_open_file(source), source, dtype, targets or {})


def load_run(
  workdir: str,
  which: str = 'ema',
  dtype: str = 'float32',
  step: int | None = None,
  targets: Targets | None = None,
) -> tuple[Params, dict[str, str]]:
  """Loads the weights of a run's checkpoint; returns the same as `load`.

  Args:
    workdir: folder of the run, local (`~` expands to the home folder) or gs://.
    which: `ema` (EMA weights, raw ones for parameters without an EMA) or `raw`. Parameters that
      trained only in an earlier stage are the same in both: EMA weights if that stage had an EMA.
    dtype: dtype of the float leaves; see `load`.
    step: step of the checkpoint; None: the newest intact one.
    targets: see `load`.

  Raises:
    UserError: `which` or the dtype is unknown, the run has no intact checkpoint (of this step), or
      it can't be reached.
  """
  if which not in ('ema', 'raw'):
    raise UserError(f"--weights={which} is neither 'ema' nor 'raw'")
  kind = dtypes.parse(dtype)
  choose = functools.partial(_weight_paths, averaged=which == 'ema')
  rounded = lambda leaf: dtypes.cast(leaf, kind)
  place = lambda path, shape: _sharding(targets or {}, path.partition('/')[2], shape)
  leaves, record = _read_checkpoint(workdir, choose, rounded, step, place)
  averaged = any(path.startswith(_EMA) for path in leaves)
  metadata = {
    'config': json.dumps(record['config'], sort_keys=True),
    'version': record['version'],
    'step': str(record['step']),
    'stage': str(record['stage']),
    'weights': 'ema' if averaged else 'raw',
    'source': str(workdir),
  }
  return convert.tree({path.partition('/')[2]: leaves[path] for path in sorted(leaves)}), metadata


def read_config(source: str, step: int | None = None) -> dict[str, Any]:
  """Reads the config of a run, an asset or a weight file, without its weights.

  Raises:
    UserError: there is no checkpoint or file, or it has no config that builds a system.
  """
  if is_file(source):
    return config_of(read_metadata(source), source)
  _, record = _read_checkpoint(source, lambda paths: (), step=step)
  return _checked_config(record['config'], source)


def read_metadata(file: str) -> dict[str, str]:
  """Reads the metadata of an asset or a weight file, without its weights.

  Raises:
    UserError: there is no such file, or it is damaged.
  """
  return _open_file(file)[1]


def check_file(file: str, which: str, step: int | None) -> None:
  """Checks that an asset or a weight file has the requested weights; it has one kind and one step.

  Raises:
    UserError: a step is requested, or `raw` weights of a file of EMA weights.
  """
  if step is not None:
    raise UserError(f'{file} is a file of weights, not a run: leave --step={step} out')
  if which == 'raw' and read_metadata(file).get('weights') != 'raw':
    raise UserError(f"{file} has EMA weights only: use weights 'ema'")


def config_of(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
  """Parses the config in the metadata of weights; `systems.build` builds a system from it.

  Args:
    metadata: from `load`.
    source: name of the weights in errors.

  Raises:
    UserError: the config is missing or damaged, or that of a network that no system samples with.
  """
  return _checked_config(parse_config(metadata, source), source)


def parse_config(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
  """Parses the config in the metadata of weights, of a run or of an imported network.

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


def _checked_config(config: dict[str, Any], source: str) -> dict[str, Any]:
  """The config of a run; that of the import of a single network is an error."""
  if 'system' not in config and (family := config.get('family')):
    cure = ': import it again without --network_only' if family in systems.releases() else ''
    raise UserError(f'{source} is an import of the network {family} alone, not a run{cure}')
  return config


def steps_of(workdir: str) -> list[int]:
  """Steps of the checkpoints of a run, in ascending order.

  Args:
    workdir: folder of the run, local (`~` expands to the home folder) or gs://.

  Raises:
    UserError: it is a file of weights, has no checkpoint, or can't be reached.
  """
  if is_file(workdir):
    raise UserError(f'{workdir} is a file of weights, not a run: it has no steps to choose from')
  store = Store(str(storage.resolve(workdir) / FOLDER), CheckpointConfig())
  try:
    steps = store.steps()
  finally:
    store.close()
  if not steps:
    raise _no_checkpoint(workdir)
  return steps


def read_run(
  workdir: str, prefixes: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
  """Reads leaves of a run's state from its newest intact checkpoint.

  Args:
    workdir: folder of the run, local (`~` expands to the home folder) or gs://.
    prefixes: path prefixes of the leaves to read.

  Returns:
    ({path: array}, the checkpoint's record).

  Raises:
    UserError: the run has no intact checkpoint, or it can't be reached.
  """
  return _read_checkpoint(workdir, lambda paths: [p for p in paths if p.startswith(prefixes)])


def newest_record(workdir: str) -> Mapping[str, Any] | None:
  """The record of a run's newest intact checkpoint; None without a checkpoint.

  Reads and verifies every leaf, and keeps none.

  Raises:
    UserError: every checkpoint is damaged, or the folder can't be reached.
  """
  store = Store(str(storage.resolve(workdir) / FOLDER), CheckpointConfig())
  try:
    contents = store.read(lambda paths: paths, transform=lambda leaf: None)
  finally:
    store.close()
  return None if contents is None else contents[1]


def _read_checkpoint(
  workdir: str,
  choose: Callable[[Collection[str]], Iterable[str]],
  transform: Callable[[np.ndarray], np.ndarray] = lambda leaf: leaf,
  step: int | None = None,
  place: Callable[[str, tuple[int, ...]], Any] = lambda *_: None,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
  """Calls `Store.read` on the checkpoints of a run; a run without a checkpoint is an error."""
  store = Store(str(storage.resolve(workdir) / FOLDER), CheckpointConfig())
  try:
    contents = store.read(choose, transform, step, place)
  finally:
    store.close()
  if contents is None:
    raise _no_checkpoint(workdir)
  return contents


def _no_checkpoint(workdir: str) -> UserError:
  return UserError(
    f'{workdir} has no checkpoint yet: python -m vpe_jax.main --config=... --workdir={workdir} '
    'makes one'
  )


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
    tree: nested dict of arrays; float leaves are saved as `dtype`, others unchanged.
    metadata: strings, such as `config` (JSON). `save` adds `version`, `dtype` and `fingerprint`,
      the fingerprint of the tree that `load` returns in float32.
    dtype: dtype of the saved float leaves: bfloat16, float16 or float32.
    overwrite: whether an existing file may be replaced.

  Raises:
    UserError: see `check_target`; or the dtype is unknown, or the file can't be written.
  """
  check_target(path, overwrite)
  kind = dtypes.parse(dtype)
  flat = {name: np.asarray(jax.device_get(leaf)) for name, leaf in leaves_by_path(tree).items()}
  # safetensors writes the buffer of an array, which must be contiguous and in row-major order.
  arrays = {
    name: np.ascontiguousarray(dtypes.cast(leaf, kind)).reshape(leaf.shape)
    for name, leaf in flat.items()
  }
  strings = {'version': __version__, **metadata, 'dtype': dtype}
  strings['fingerprint'] = fingerprint(arrays, 'float32')
  with storage.writing(path):
    storage.write_atomic(storage.resolve(path), safetensors.numpy.save(arrays, metadata=strings))


def check_target(path: str, overwrite: bool = False) -> None:
  """Checks that `save` can write to a path; front doors call it before the work starts.

  Raises:
    UserError: the file exists (and `overwrite` is off), is a folder, or has another suffix.
  """
  target = storage.resolve(path)
  if not str(path).endswith(ENDING):
    raise UserError(f"can't write '{path}': name a file that ends in {ENDING}")
  if probe(target, target.is_dir):
    raise UserError(f"'{path}' is a folder: name another file")
  if target.exists() and not overwrite:
    raise UserError(f"'{path}' exists: name another file or replace it with --overwrite")


def round_to(tree: Params, dtype: str = 'bfloat16') -> Params:
  """Rounds float leaves to `dtype` and casts them back to float32, as `save` and `load` do."""
  kind, wide = dtypes.parse(dtype), dtypes.FLOATS['float32']
  return jax.tree.map(lambda leaf: dtypes.cast(dtypes.cast(np.asarray(leaf), kind), wide), tree)


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


def fingerprint(tree: Params, dtype: str | None = None) -> str:
  """Hash of a tree's paths, shapes, dtypes and bits: twelve hex digits.

  Args:
    tree: nested dict of arrays.
    dtype: float leaves are cast to this dtype before hashing, a part at a time (None: not cast).
  """
  digest = hashlib.sha256()
  for path, leaf in sorted(leaves_by_path(tree).items()):
    _hash_leaf(digest, path, np.asarray(jax.device_get(leaf)), dtype)
  return digest.hexdigest()[:12]


def _hash_leaf(digest: Any, path: str, leaf: np.ndarray, dtype: str | None) -> None:
  kind = dtypes.FLOATS[dtype] if dtype and dtypes.is_float(leaf) else leaf.dtype
  digest.update(f'{path} {leaf.shape} {kind}\n'.encode())
  flat = leaf.reshape(-1)
  for start in range(0, flat.size, _HASH_CHUNK):
    part = np.ascontiguousarray(flat[start : start + _HASH_CHUNK].astype(kind, copy=False))
    digest.update(part.view(np.uint8))


def _open_file(source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Opens an asset or a weight file: (tensors by key, metadata)."""
  if not source.startswith(ASSETS):
    path = storage.resolve(source)
    if not probe(path, path.exists):
      raise UserError(
        f"no file '{source}': name an existing file, or the workdir of a run of python -m "
        'vpe_jax.main'
      )
    return sources.open_file(path, source)
  name = source.removeprefix(ASSETS)
  if name not in ASSET_CONFIGS:
    raise UserError(f"unknown asset '{source}'{did_you_mean(name, ASSET_CONFIGS)}")
  resource = importlib.resources.files('vpe_jax') / 'assets' / f'{name}{ENDING}'
  if not resource.is_file():
    raise UserError(
      f"'{source}' is not installed (vpe_jax/assets/{name}{ENDING}): install vpe_jax again, "
      f'or train it with python -m vpe_jax.main --config={ASSET_CONFIGS[name]}'
    )
  return sources.parse(resource.read_bytes(), source)


def _read(
  tensors: Mapping[str, Tensor],
  metadata: dict[str, str],
  source: str,
  dtype: str,
  targets: Targets,
) -> tuple[Params, dict[str, str]]:
  """Reads, verifies and casts the tensors of a weight file, one at a time."""
  kind, digest, leaves = dtypes.parse(dtype), hashlib.sha256(), {}
  for path in sorted(tensors):
    leaf = tensors[path].read()
    _hash_leaf(digest, path, leaf, 'float32')
    leaf_kind = kind if dtypes.is_float(leaf) else leaf.dtype
    leaves[path] = _placed(leaf, leaf_kind, _sharding(targets, path, leaf.shape))
  # Only files written by `save` have a fingerprint.
  actual = digest.hexdigest()[:12]
  if metadata.get('fingerprint', actual) != actual:
    raise UserError(
      f"'{source}' is damaged: its fingerprint is {actual}, not {metadata['fingerprint']}: get it "
      'again, or export it again'
    )
  return convert.tree(leaves), metadata


def _sharding(targets: Targets, path: str, shape: tuple[int, ...]) -> Any:
  """The sharding of a leaf; None if `targets` has none of this path and shape."""
  target = targets.get(path)
  return target.sharding if target is not None and tuple(target.shape) == shape else None


def _placed(leaf: np.ndarray, dtype: np.dtype, sharding: Any) -> Any:
  """A copy of a leaf in another dtype; with a sharding, each shard is copied to its device."""
  # A copy, because the array that a tensor's `read` returns may be a view of the file.
  copied = lambda index: np.array(leaf[index], dtype)
  if sharding is None:
    return copied(...)
  return jax.make_array_from_callback(leaf.shape, sharding, copied)


def _weight_paths(paths: Collection[str], averaged: bool) -> list[str]:
  """Paths of a state's parameters; if `averaged`, those with an EMA are replaced by it."""
  ema = {path for path in paths if averaged and path.startswith(_EMA)}
  raw = [path for path in paths if path.startswith(_PARAMS)]
  return [*ema, *(path for path in raw if _EMA + path.removeprefix(_PARAMS) not in ema)]
