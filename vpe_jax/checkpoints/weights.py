"""Files of weights: safetensors with flat paths, read and written without running any code."""

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
# What makes each file in vpe_jax/assets: a run of this config, whose weights `save` then writes.
MADE_BY = {
  'siglip': 'configs/siglip.py',
  'judge': 'configs/siglip.py:judge',
  'visual_prompt': 'configs/codec.py:tiny,stage=visual_prompt',
  'image': 'configs/codec.py:tiny,stage=image',
  'image_codes': 'configs/codec.py:tiny,stage=image_codes',
  'tiny': 'configs/t2i.py',
}
_DTYPES = {'bfloat16': np.dtype(jnp.bfloat16), 'float16': np.float16, 'float32': np.float32}


def is_file(source: str) -> bool:
  """Whether a source that `load` reads is one file, shipped or not, and no run."""
  return source.startswith(ASSETS) or source.endswith(ENDING)


def load(source: str) -> tuple[Params, dict[str, str]]:
  """Reads weights from wherever they are.

  Args:
    source: `assets:NAME` (shipped with the library), a path ending in `.safetensors`, or the
      workdir of a run (its newest checkpoint, averaged weights before raw ones); `~` is the home
      folder.

  Returns:
    (nested dict of numpy arrays, floats as float32; metadata). The metadata of a run has `config`
    (JSON), `version`, `step`, `stage`, `weights` (ema or raw) and `source`.

  Raises:
    UserError: nothing is there, it can't be read, or its numbers were changed; names the cure.
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
      f"no file '{source}': python -m vpe_jax.main trains weights, and the workdir of a run can be "
      'given in place of a file'
    )
  return _parse(path.read_bytes(), source)


def load_run(workdir: str, which: str = 'ema') -> tuple[Params, dict[str, str]]:
  """Reads the newest good checkpoint of a run; see `load` for what comes back.

  Args:
    workdir: of the run, local (`~` is the home folder) or gs://.
    which: `ema` (averaged weights where the stage keeps an average, the others as they are) or
      `raw`. What trained in an earlier stage only is at its average in both.

  Raises:
    UserError: `which` is another word, the run has no (good) checkpoint, or is out of reach.
  """
  if which not in ('ema', 'raw'):
    raise UserError(f"--weights={which} is neither 'ema' nor 'raw'")
  leaves, meta = read_run(workdir, ('params/', 'ema/') if which == 'ema' else ('params/',))
  raw = _under('params/', leaves)
  averaged = _under('ema/', leaves)
  metadata = {
    'config': json.dumps(meta['config'], sort_keys=True),
    'version': meta['version'],
    'step': str(meta['step']),
    'stage': str(meta['stage']),
    'weights': 'ema' if averaged else 'raw',
    'source': str(workdir),
  }
  return _nested({path: _widened(leaf) for path, leaf in (raw | averaged).items()}), metadata


def config_of(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
  """The config in the metadata of weights, with which `systems.build` builds what they are for.

  Raises:
    UserError: there is none, or it is damaged; the message calls the weights `source`.
  """
  if 'config' not in metadata:
    raise UserError(f'{source} holds weights without a config: name a run that trained them')
  try:
    found = json.loads(metadata['config'])
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise UserError(f'the config in {source} is damaged: get the weights again')
  return found


def read_run(
  workdir: str, beginnings: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
  """Leaves of a run's state, from its newest good checkpoint, and what that says of itself.

  Args:
    workdir: of the run, local (`~` is the home folder) or gs://.
    beginnings: of the paths of the leaves that are read.

  Raises:
    UserError: the run has no (good) checkpoint, or is out of reach.
  """
  store = Store(str(storage.place(workdir) / FOLDER), CheckpointConfig())
  try:
    found = store.read(lambda path: path.startswith(beginnings))
  finally:
    store.close()
  if found is None:
    raise UserError(
      f'{workdir} has no checkpoint yet: python -m vpe_jax.main --config=... --workdir={workdir} '
      'makes one'
    )
  return found


def save(
  path: str,
  tree: Params,
  metadata: Mapping[str, str],
  dtype: str = 'bfloat16',
  overwrite: bool = False,
) -> None:
  """Writes a nested dict of arrays as one safetensors file, its keys joined by `/`.

  Args:
    path: ends in `.safetensors`, local (`~` is the home folder) or gs://; never half there.
    tree: float leaves are stored as `dtype`, others as they are.
    metadata: strings, such as `config` (JSON); `version`, `dtype` and `fingerprint` (of what a
      reader will get) are added.
    dtype: bfloat16, float16 or float32.
    overwrite: whether a file that is there may be replaced.

  Raises:
    UserError: see `check_target`; or another dtype, or the file can't be written.
  """
  check_target(path, overwrite)
  if dtype not in _DTYPES:
    raise UserError(f"can't write '{path}' as {dtype}: dtypes are {', '.join(_DTYPES)}")
  flat = {name: np.asarray(jax.device_get(leaf)) for name, leaf in by_path(tree).items()}
  # The format takes arrays by their buffer: they have to be contiguous, in row-major order.
  stored = {
    name: np.ascontiguousarray(_narrowed(leaf, dtype)).reshape(leaf.shape)
    for name, leaf in flat.items()
  }
  strings = {'version': __version__, **metadata, 'dtype': dtype}
  strings['fingerprint'] = fingerprint({name: _widened(leaf) for name, leaf in stored.items()})
  with storage.writing(path):
    storage.write_atomic(storage.place(path), safetensors.numpy.save(stored, metadata=strings))


def check_target(path: str, overwrite: bool = False) -> None:
  """Refuses what `save` wouldn't write to; front doors ask before the work starts.

  Raises:
    UserError: the file exists (and `overwrite` is off), is a folder, or ends in something else.
  """
  target = storage.place(path)
  if not str(path).endswith(ENDING):
    raise UserError(f"can't write '{path}': files end in {ENDING}")
  if reached(target, target.is_dir):
    raise UserError(f"'{path}' is a folder: name another file")
  if target.exists() and not overwrite:
    raise UserError(f"'{path}' exists: name another file or replace it with --overwrite")


def rounded(tree: Params, dtype: str = 'bfloat16') -> Params:
  """What `load` returns after `save` wrote the tree as `dtype`: float32 of fewer digits."""
  return jax.tree.map(lambda leaf: _widened(_narrowed(np.asarray(leaf), dtype)), tree)


def mismatch(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
  """The first path, in order, at which two trees differ in shape, or that only one of them has.

  Returns:
    The path, and the shape that is wanted and the one that is found, `absent` where there is none;
    None where the trees agree.
  """
  for path in sorted(wanted.keys() | found.keys()):
    ours, theirs = (
      list(leaves[path].shape) if path in leaves else 'absent' for leaves in (wanted, found)
    )
    if ours != theirs:
      return path, ours, theirs
  return None


def fingerprint(tree: Params) -> str:
  """Twelve hex digits that stand for paths, shapes, dtypes and every bit of a tree."""
  digest = hashlib.sha256()
  for path, leaf in sorted(by_path(tree).items()):
    array = np.ascontiguousarray(jax.device_get(leaf))
    digest.update(f'{path} {np.shape(leaf)} {array.dtype}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()[:12]


def _load_asset(name: str) -> tuple[Params, dict[str, str]]:
  folder = importlib.resources.files('vpe_jax') / 'assets'
  resource = folder / f'{name}{ENDING}'
  if name not in MADE_BY:
    raise UserError(f"no shipped weights are called '{ASSETS}{name}'{nearest(name, MADE_BY)}")
  if not resource.is_file():
    raise UserError(
      f"'{ASSETS}{name}' is not installed (vpe_jax/assets/{name}{ENDING}): install vpe_jax again, "
      f'or train it with python -m vpe_jax.main --config={MADE_BY[name]}'
    )
  return _parse(resource.read_bytes(), f'{ASSETS}{name}')


def _parse(data: bytes, source: str) -> tuple[Params, dict[str, str]]:
  tensors, metadata = sources.parse(data, source)
  # Copies, as what is read is a view of the file that nothing can write to.
  tree = _nested({name: _widened(tensor.read().copy()) for name, tensor in tensors.items()})
  # What `save` wrote says what a reader must find; other files say nothing.
  if metadata.get('fingerprint', found := fingerprint(tree)) != found:
    raise UserError(
      f"'{source}' is damaged: its numbers are not those that were written (fingerprint {found}, "
      f'not {metadata["fingerprint"]}): get it again, or export it again'
    )
  return tree, metadata


def _under(prefix: str, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {p.removeprefix(prefix): leaf for p, leaf in leaves.items() if p.startswith(prefix)}


def _narrowed(leaf: np.ndarray, dtype: str) -> np.ndarray:
  return leaf.astype(_DTYPES[dtype]) if _is_float(leaf) else leaf


def _widened(leaf: np.ndarray) -> np.ndarray:
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
