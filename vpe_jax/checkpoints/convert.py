"""Converts published tensors to parameters and back, one tensor at a time.

The names and axes of a family's tensors are data (checkpoints/table.py and checkpoints/tables).
Before any tensor is read, every source key must be used or ignored for a stated reason, every
parameter must be filled or absent for a stated reason, and all shapes and dtypes must fit. Then
tensors stream from the memory-mapped file to parameters on their devices, where each layer is
written in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vpe_jax import storage
from vpe_jax.checkpoints import dtypes
from vpe_jax.checkpoints import table as tables
from vpe_jax.checkpoints.sources import Tensor
from vpe_jax.checkpoints.table import Place, Table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.sharding import by_path

SHARD = 5 * 10**9  # bytes of a file; transformers' default
_LISTED = 6  # differences that an error lists
_FEWER = 1000  # a config may expect this many times the source's tensors before it is refused
_Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """An import, determined from keys, shapes and dtypes alone.

  Attributes:
    table: the key layout of the source.
    places: source key -> its destination.
    ignored: source key -> reason why it isn't used.
    absent: path of a parameter that no tensor fills -> reason.
  """

  table: Table
  places: Mapping[str, Place]
  ignored: Mapping[str, str]
  absent: Mapping[str, str]


def plan(tensors: Mapping[str, Tensor], layouts: Sequence[Table], abstract: Params) -> Plan:
  """Matches all source tensors with all parameters.

  Args:
    tensors: the source.
    layouts: key layouts of the family; the one that matches most keys is used.
    abstract: the parameters, with `shape` and `dtype`.

  Raises:
    UserError: a key has no parameter, a parameter has no tensor, or shapes or dtypes don't fit;
      lists the differences.
  """
  table = max(layouts, key=lambda one: sum(_known(one, key) for key in _bare(one, tensors)))
  prefix = _prefix(table, tensors)
  tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
  shapes = {path: tuple(leaf.shape) for path, leaf in by_path(abstract).items()}
  expected = _expected(table, shapes, _FEWER * len(tensors) + _FEWER)
  tied = _check_ties(table, tensors, expected)
  ignored, places, problems = {prefix + key: why for key, why in tied.items()}, {}, []
  for key in sorted(tensors):
    why = tables.reason(table.ignored, key)
    if key in expected:
      places[prefix + key] = expected[key]
      problems += _misfits(key, tensors[key], expected[key], shapes)
    elif why is not None:
      ignored[prefix + key] = why
    elif key not in tied:
      problems.append(f"'{prefix}{key}' has no parameter")
  problems += [f"'{prefix}{key}' is missing" for key in sorted(expected.keys() - tensors.keys())]
  filled = {path for place in expected.values() for path in place.targets}
  absent = {path: tables.reason(table.absent, path) for path in sorted(shapes.keys() - filled)}
  problems += [f"no tensor fills our '{path}'" for path, why in absent.items() if why is None]
  if problems:
    raise UserError(_differences(table, problems))
  return Plan(table, places, ignored, absent)


def load(tensors: Mapping[str, Tensor], plan: Plan, abstract: Params) -> dict[str, Array]:
  """Loads all tensors of a plan into parameters.

  In addition to the parameters, host memory holds only one source tensor and the layer it fills.

  Args:
    tensors: the source of the plan.
    plan: from `plan`.
    abstract: the parameters, as `jax.ShapeDtypeStruct`; shardings are applied.

  Returns:
    Path -> array, for every leaf that is not absent.
  """
  leaves = by_path(abstract)
  made: dict[str, Array] = {}
  for key, place in plan.places.items():
    shapes = _parts(place, {path: tuple(leaf.shape) for path, leaf in leaves.items()})
    parts = tables.forward(place, tensors[key].read(), shapes)
    for path, part in zip(place.targets, parts, strict=True):
      leaf = leaves[path]
      # A copy rather than a view of the file, because devices may alias a host array.
      part = np.array(part, leaf.dtype, order='C')
      if place.index is None:
        made[path] = _placed(part, leaf)
        continue
      if path not in made:
        made[path] = _zeros(leaf)
      written = _written(made[path], _placed_entry(part, leaf), place.index)
      made[path] = written.block_until_ready()  # One layer in flight, not as many as fit.
  return made


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nests leaves by path."""
  nested: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    branch = nested
    for parent in parents:
      branch = branch.setdefault(parent, {})
    branch[name] = leaf
  return nested


def export(
  params: Params,
  table: Table,
  folder: Path,
  config: Mapping[str, Any],
  axes: Mapping[str, int],
  stem: str = 'model',
  dtype: str = 'float32',
  shard: int = SHARD,
) -> list[str]:
  """Writes parameters as published tensors: safetensors, with an index for several files.

  The folder is written atomically.

  Args:
    params: every leaf of the model.
    table: the key layout to write.
    folder: output folder, which must not exist.
    config: content of config.json.
    axes: sizes of axes that can't be inferred from our leaves, such as the side of a patch.
    stem: stem of file names (`diffusion_pytorch_model` for diffusers).
    dtype: float32, bfloat16 or float16.
    shard: maximum bytes of a file, unless one tensor is larger.

  Returns:
    The keys of the written tensors.

  Raises:
    UserError: the folder exists, can't be written, or the layout can't be exported.
  """
  if folder.exists():
    raise UserError(f"'{folder}' exists: name another folder")
  leaves = by_path(params)
  shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
  places = _expected(table, shapes)
  _check_exportable(table, places, shapes)
  kind = dtypes.parse(dtype)
  files = _files(places, shapes, kind.itemsize, shard)
  names = _file_names(stem, len(files))
  with storage.writing(folder), _made_whole(folder) as unfinished:
    for name, keys in zip(names, files, strict=True):
      tensors = {key: _source_tensor(places[key], leaves, axes, kind) for key in keys}
      # transformers and diffusers check `format`.
      safetensors.numpy.save_file(tensors, unfinished / name, metadata={'format': 'pt'})
    if len(names) > 1:
      total = sum(_size(place, shapes) for place in places.values()) * kind.itemsize
      where = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
      index = {'metadata': {'total_size': total}, 'weight_map': where}
      _write_json(unfinished / f'{stem}.safetensors.index.json', index)
    _write_json(unfinished / 'config.json', config)
  return sorted(places)


@contextlib.contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
  """A temporary folder next to `folder`, renamed to it if the block succeeds."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix='.', suffix='.part'))
  try:
    yield unfinished
    unfinished.chmod(0o755)  # temporary folders are private
    unfinished.rename(folder)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def _known(table: Table, key: str) -> bool:
  return tables.place(table, key) is not None or tables.reason(table.ignored, key) is not None


def _prefix(table: Table, keys: Iterator[str] | Mapping[str, Any]) -> str:
  """The table's prefix that all keys share; '' without one."""
  return next((p for p in table.prefixes if all(key.startswith(p) for key in keys)), '')


def _bare(table: Table, keys: Mapping[str, Any]) -> list[str]:
  prefix = _prefix(table, keys)
  return [key.removeprefix(prefix) for key in keys]


def _expected(table: Table, shapes: _Shapes, most: int | None = None) -> dict[str, Place]:
  """All source keys that fill these parameters, and their destinations.

  Raises:
    UserError: there are more than `most`, as for a config with a billion layers.
  """
  found = (item for row in table.rows for item in tables.keys(row, shapes))
  expected = dict(itertools.islice(found, most))
  if most is not None and next(found, None):
    raise UserError(
      f"the weights don't fit the layout '{table.name}' of this configuration, which needs over "
      f'{most} tensors: is the config of another model?'
    )
  return expected


def _parts(place: Place, shapes: _Shapes) -> list[tuple[int, ...]]:
  """Shapes of the targets of a source tensor, without the stacked axis."""
  whole = [shapes[path] for path in place.targets]
  return whole if place.index is None else [shape[1:] for shape in whole]


def _size(place: Place, shapes: _Shapes) -> int:
  """Number of elements of the source tensor."""
  return sum(int(np.prod(shape, dtype=np.int64)) for shape in _parts(place, shapes))


def _misfits(key: str, tensor: Tensor, place: Place, shapes: _Shapes) -> list[str]:
  found = []
  if absent := [path for path in place.targets if path not in shapes]:
    return [f"'{key}' has no parameter: there is no '{absent[0]}'"]
  if words := tables.misfit(place, tensor.shape, _parts(place, shapes)):
    found.append(f"'{key}' has the wrong shape: {words}")
  if tensor.dtype not in dtypes.FLOATS.values():
    found.append(f"'{key}' is {tensor.dtype}, not a 16- or 32-bit floating-point dtype")
  return found


def _check_ties(
  table: Table, tensors: Mapping[str, Tensor], expected: Mapping[str, Place]
) -> dict[str, str]:
  dropped = {}
  for copy, original in table.ties:
    if copy in tensors and original in tensors and copy not in expected:
      if not np.array_equal(tensors[copy].read(), tensors[original].read()):
        raise UserError(
          f"'{copy}' and '{original}' should be one tensor, but their values differ: these weights "
          'are of another model'
        )
      dropped[copy] = f'the same tensor as {original}'
  return dropped


def _differences(table: Table, problems: Sequence[str]) -> str:
  more = f'; and {len(problems) - _LISTED} more' if len(problems) > _LISTED else ''
  return (
    f"the weights don't fit the layout '{table.name}' of this configuration: "
    f'{"; ".join(problems[:_LISTED])}{more}'
  )


def _check_exportable(table: Table, places: Mapping[str, Place], shapes: _Shapes) -> None:
  partial = sorted(key for key, place in places.items() if place.row.last)
  if partial:
    raise UserError(
      f"layout '{table.name}' is for import only: '{partial[0]}' and {len(partial) - 1} other "
      'tensors are only imported in part'
    )
  used = {path for place in places.values() for path in place.targets}
  unsaid = [p for p in shapes if p not in used and tables.reason(table.absent, p) is None]
  if unsaid:
    raise UserError(
      f"layout '{table.name}' has no tensor for '{min(unsaid)}': it is of another model"
    )


def _files(
  places: Mapping[str, Place], shapes: _Shapes, itemsize: int, shard: int
) -> list[list[str]]:
  """Assigns keys to files of at most `shard` bytes."""
  files: list[list[str]] = [[]]
  held = 0
  for key in sorted(places):
    size = itemsize * _size(places[key], shapes)
    if files[-1] and held + size > shard:
      files.append([])
      held = 0
    files[-1].append(key)
    held += size
  return files


def _file_names(stem: str, count: int) -> list[str]:
  if count == 1:
    return [f'{stem}.safetensors']
  return [f'{stem}-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]


def _source_tensor(
  place: Place, leaves: Mapping[str, Any], axes: Mapping[str, int], dtype: np.dtype
) -> np.ndarray:
  chosen = [leaves[path] for path in place.targets]
  if place.index is not None:
    chosen = [leaf[place.index] for leaf in chosen]
  parts = [np.asarray(jax.device_get(leaf)) for leaf in chosen]
  # Not ascontiguousarray, which turns a scalar into a vector.
  return np.array(tables.backward(place, parts, axes), dtype, order='C')


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')


def _placed(part: np.ndarray, leaf: Any) -> Array:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return jnp.asarray(part)
  return jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])


def _placed_entry(part: np.ndarray, leaf: Any) -> Array:
  """One entry of a stacked leaf, with the leaf's sharding."""
  sharding = getattr(leaf, 'sharding', None)
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  return _placed(part, jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding))


def _zeros(leaf: Any) -> Array:
  return _maker(tuple(leaf.shape), np.dtype(leaf.dtype), getattr(leaf, 'sharding', None))()


@functools.cache
def _maker(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> Any:
  """Compiled once for all leaves of equal shape, dtype and sharding."""
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _written(leaf: Array, entry: Array, index: Array | int) -> Array:
  """Replaces one entry of the leaf's first axis in place."""
  return jax.lax.dynamic_update_index_in_dim(leaf, entry, index, 0)
