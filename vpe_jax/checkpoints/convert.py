"""Converts published tensors to parameters and back, one tensor at a time.

The names and axes of a family's tensors are data (checkpoints/table.py and checkpoints/tables).
`match_tensors` checks before loading that every source key is used or ignored for a stated reason,
that every parameter is filled or absent for a stated reason, and that all shapes and dtypes fit. It
reads only tied tensors, to compare them. Then `load` streams tensors from the memory-mapped file to
parameters on their devices, where each layer is written in place.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
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
from vpe_jax.checkpoints.table import Destination, Table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.sharding import leaves_by_path

MAX_FILE_SIZE = 5 * 10**9  # bytes; transformers' default
MAX_LISTED = 6  # differences that an error lists
MAX_EXPECTED_RATIO = 1000  # tensors that a config may require, per tensor of the source
_WIDER = 'choose dtype float32 or bfloat16'  # cure of an overflow in float16
_Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class TensorMap:
  """The assignment of source tensors to the parameters that they fill.

  Attributes:
    table: the key layout of the source.
    destinations: source key -> destination of the tensor.
    ignored: source key -> reason why it isn't used.
    absent: path of a parameter that no tensor fills -> reason.
  """

  table: Table
  destinations: Mapping[str, Destination]
  ignored: Mapping[str, str]
  absent: Mapping[str, str]


def match_tensors(
  tensors: Mapping[str, Tensor], layouts: Sequence[Table], abstract: Params
) -> TensorMap:
  """Matches all source tensors with all parameters.

  Args:
    tensors: source key -> tensor.
    layouts: key layouts of the family; the one that matches most keys is used.
    abstract: tree of the parameters, whose leaves have `shape` and `dtype`.

  Raises:
    UserError: a key has no parameter, a parameter has no tensor, shapes or dtypes don't fit (the
      error lists the differences), or tied tensors differ.
  """
  table = max(layouts, key=lambda layout: _count_known(layout, tensors))
  prefix = _prefix(table, tensors)
  tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves_by_path(abstract).items()}
  expected = _expected(table, shapes, MAX_EXPECTED_RATIO * (len(tensors) + 1))
  tied = _check_ties(table, tensors, expected)
  ignored, destinations, problems = {prefix + key: tied[key] for key in tied}, {}, []
  for key in sorted(tensors):
    reason = tables.reason(table.ignored, key)
    if key in expected:
      destinations[prefix + key] = expected[key]
      problems += _misfits(key, tensors[key], expected[key], shapes)
    elif reason is not None:
      ignored[prefix + key] = reason
    elif key not in tied:
      problems.append(f"'{prefix}{key}' has no parameter")
  problems += [f"'{prefix}{key}' is missing" for key in sorted(expected.keys() - tensors.keys())]
  filled = {path for destination in expected.values() for path in destination.targets}
  absent = {path: tables.reason(table.absent, path) for path in sorted(shapes.keys() - filled)}
  problems += [f"no tensor fills our '{path}'" for path in absent if absent[path] is None]
  if problems:
    raise UserError(_differences(table, problems))
  return TensorMap(table, destinations, ignored, absent)


def load(
  tensors: Mapping[str, Tensor],
  tensor_map: TensorMap,
  abstract: Params,
  allow_nonfinite: bool = False,
) -> dict[str, Array]:
  """Loads all mapped tensors into parameters.

  In addition to the parameters, host memory holds only one source tensor and the layer it fills.

  Args:
    tensors: source key -> tensor.
    tensor_map: from `match_tensors`.
    abstract: tree of `jax.ShapeDtypeStruct` with the dtypes and shardings of the parameters.
    allow_nonfinite: whether to load NaN and infinity.

  Returns:
    Path -> array, for every parameter except those in `tensor_map.absent`.

  Raises:
    UserError: a tensor has values that are not finite in the dtype of its parameter.
  """
  targets = leaves_by_path(abstract)
  target_shapes = {path: tuple(leaf.shape) for path, leaf in targets.items()}
  loaded: dict[str, Array] = {}
  nonfinite: dict[str, int] = {}
  overflows = False
  for key, destination in tensor_map.destinations.items():
    shapes = _entry_shapes(destination, target_shapes)
    parts = tables.forward(destination, tensors[key].read(), shapes)
    for path, part in zip(destination.targets, parts, strict=True):
      target = targets[path]
      # A copy rather than a view of the file, because devices may alias a host array.
      original, part = part, _cast_copy(part, target.dtype)
      if not allow_nonfinite and (wrong := _count_nonfinite(part)):
        nonfinite[key] = nonfinite.get(key, 0) + wrong
        overflows |= wrong > _count_nonfinite(original)
      if destination.index is None:
        loaded[path] = _to_devices(part, target)
        continue
      if path not in loaded:
        loaded[path] = _zeros(target)
      updated = _set_entry(loaded[path], _entry_to_devices(part, target), destination.index)
      loaded[path] = updated.block_until_ready()  # So that host memory holds one layer.
  if nonfinite:
    raise UserError(_nonfinite_error(nonfinite, overflows))
  return loaded


def _cast_copy(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A row-major copy in another dtype; values out of range become infinite without a warning."""
  with np.errstate(over='ignore'):
    return np.array(array, dtype, order='C')  # ascontiguousarray would make a scalar a vector.


def _count_nonfinite(array: np.ndarray) -> int:
  return array.size - int(np.count_nonzero(np.isfinite(array)))


def _nonfinite_error(counts: Mapping[str, int], overflows: bool) -> str:
  listed = [f"{count} of '{key}'" for key, count in itertools.islice(counts.items(), MAX_LISTED)]
  more = f' and {len(counts) - MAX_LISTED} more tensors' if len(counts) > MAX_LISTED else ''
  tensors = ', '.join(listed) + more
  if overflows:
    return f'the weights have values beyond the range of the dtype: {tensors}: {_WIDER}'
  return (
    f'the weights have values that are NaN or infinite: {tensors}: get them again, or import them '
    'as they are (vpe_jax.convert --allow_nonfinite)'
  )


def tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Nests leaves by path: {'a/b': leaf} -> {'a': {'b': leaf}}."""
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
  max_file_size: int = MAX_FILE_SIZE,
) -> list[str]:
  """Writes parameters as published tensors: safetensors, with an index for several files.

  The folder is written atomically.

  Args:
    params: every leaf of the model.
    table: the key layout to write.
    folder: output folder, which must not exist.
    config: content of config.json.
    axes: axis letter -> size, for axes whose size can't be inferred from our leaves, such as the
      side of a patch.
    stem: stem of file names (`diffusion_pytorch_model` for diffusers).
    dtype: dtype of the written tensors: float32, bfloat16 or float16.
    max_file_size: largest size of a file in bytes; a larger tensor gets a file of its own.

  Returns:
    The keys of the written tensors.

  Raises:
    UserError: the folder exists or can't be written, the layout can't be exported, the dtype is
      unknown, or a finite value is not finite in it.
  """
  if folder.exists():
    raise UserError(f"'{folder}' exists: name another folder")
  leaves = leaves_by_path(params)
  shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
  destinations = _expected(table, shapes)
  _check_exportable(table, destinations, shapes)
  kind = dtypes.parse(dtype)
  files = _files(destinations, shapes, kind.itemsize, max_file_size)
  names = _file_names(stem, len(files))
  with storage.writing(folder), storage.new_folder(folder) as unfinished:
    for name, keys in zip(names, files, strict=True):
      tensors = {key: _source_tensor(key, destinations[key], leaves, axes, kind) for key in keys}
      # transformers and diffusers check `format`.
      _save_file(tensors, unfinished / name, {'format': 'pt'})
    if len(names) > 1:
      total = sum(_size(one, shapes) for one in destinations.values()) * kind.itemsize
      file_of = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
      index = {'metadata': {'total_size': total}, 'weight_map': file_of}
      _write_json(unfinished / f'{stem}.safetensors.index.json', index)
    _write_json(unfinished / 'config.json', config)
  return sorted(destinations)


def _save_file(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
  """Writes a safetensors file; an error of the file system, such as a full disk, is an OSError."""
  try:
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
  except safetensors.SafetensorError as error:
    code = re.search(r'os error (\d+)', str(error))
    if code is None:
      raise
    raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _count_known(table: Table, keys: Mapping[str, Any]) -> int:
  """Number of source keys that the table uses or ignores."""
  prefix = _prefix(table, keys)
  names = [key.removeprefix(prefix) for key in keys]
  return sum(
    tables.destination(table, name) is not None or tables.reason(table.ignored, name) is not None
    for name in names
  )


def _prefix(table: Table, keys: Mapping[str, Any]) -> str:
  """The table's prefix that all keys share; '' without one."""
  return next((p for p in table.prefixes if all(key.startswith(p) for key in keys)), '')


def _expected(table: Table, shapes: _Shapes, limit: int | None = None) -> dict[str, Destination]:
  """All source keys that fill these parameters, and their destinations.

  Raises:
    UserError: there are more than `limit` keys, as for a config with a billion layers.
  """
  items = (item for row in table.rows for item in tables.keys(row, shapes))
  expected = dict(itertools.islice(items, limit))
  if limit is not None and next(items, None):
    raise UserError(
      f"the weights don't fit the layout '{table.name}' of this configuration, which needs over "
      f'{limit} tensors: does config.json belong to another model?'
    )
  return expected


def _entry_shapes(destination: Destination, shapes: _Shapes) -> list[tuple[int, ...]]:
  """Shapes of the targets of a source tensor, without the stacked axis."""
  whole = [shapes[path] for path in destination.targets]
  return whole if destination.index is None else [shape[1:] for shape in whole]


def _size(destination: Destination, shapes: _Shapes) -> int:
  """Number of elements of the source tensor."""
  return sum(int(np.prod(shape, dtype=np.int64)) for shape in _entry_shapes(destination, shapes))


def _misfits(key: str, tensor: Tensor, destination: Destination, shapes: _Shapes) -> list[str]:
  """Reasons why a tensor can't fill its parameters."""
  problems = []
  if absent := [path for path in destination.targets if path not in shapes]:
    return [f"'{key}' has no parameter: there is no '{absent[0]}'"]
  if reason := tables.misfit(destination, tensor.shape, _entry_shapes(destination, shapes)):
    problems.append(f"'{key}' has the wrong shape: {reason}")
  if tensor.dtype not in dtypes.FLOATS.values():
    problems.append(f"'{key}' is {tensor.dtype}, not a 16- or 32-bit floating-point dtype")
  return problems


def _check_ties(
  table: Table, tensors: Mapping[str, Tensor], expected: Mapping[str, Destination]
) -> dict[str, str]:
  """Checks that tied tensors are equal; returns, for each copy, the reason why it isn't loaded."""
  reasons = {}
  for copy, original in table.ties:
    if copy in tensors and original in tensors and copy not in expected:
      if not np.array_equal(tensors[copy].read(), tensors[original].read()):
        raise UserError(
          f"'{copy}' and '{original}' should be one tensor, but their values differ: the weights "
          'belong to another model'
        )
      reasons[copy] = f'the same tensor as {original}'
  return reasons


def _differences(table: Table, problems: Sequence[str]) -> str:
  more = f'; and {len(problems) - MAX_LISTED} more' if len(problems) > MAX_LISTED else ''
  return (
    f"the weights don't fit the layout '{table.name}' of this configuration: "
    f'{"; ".join(problems[:MAX_LISTED])}{more}'
  )


def _check_exportable(
  table: Table, destinations: Mapping[str, Destination], shapes: _Shapes
) -> None:
  partial = sorted(key for key, destination in destinations.items() if destination.row.last)
  if partial:
    raise UserError(
      f"layout '{table.name}' is for import only: {len(partial)} tensors, such as '{partial[0]}', "
      'are only imported in part'
    )
  used = {path for destination in destinations.values() for path in destination.targets}
  unused = [p for p in shapes if p not in used and tables.reason(table.absent, p) is None]
  if unused:
    raise UserError(
      f"layout '{table.name}' has no tensor for '{min(unused)}': choose the layout of this model"
    )


def _files(
  destinations: Mapping[str, Destination], shapes: _Shapes, itemsize: int, max_size: int
) -> list[list[str]]:
  """Assigns keys to files of at most `max_size` bytes, or of a single larger tensor."""
  files: list[list[str]] = [[]]
  file_size = 0
  for key in sorted(destinations):
    size = itemsize * _size(destinations[key], shapes)
    if files[-1] and file_size + size > max_size:
      files.append([])
      file_size = 0
    files[-1].append(key)
    file_size += size
  return files


def _file_names(stem: str, count: int) -> list[str]:
  if count == 1:
    return [f'{stem}.safetensors']
  return [f'{stem}-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]


def _source_tensor(
  key: str,
  destination: Destination,
  leaves: Mapping[str, Any],
  axes: Mapping[str, int],
  dtype: np.dtype,
) -> np.ndarray:
  """The tensor of a key in `dtype`, row-major, from the leaves that it fills.

  Raises:
    UserError: a finite value is not finite in the dtype.
  """
  targets = [leaves[path] for path in destination.targets]
  if destination.index is not None:
    targets = [leaf[destination.index] for leaf in targets]
  parts = [np.asarray(jax.device_get(leaf)) for leaf in targets]
  original = tables.backward(destination, parts, axes)
  tensor = _cast_copy(original, dtype)
  if wrong := _count_nonfinite(tensor):
    if count := wrong - _count_nonfinite(original):
      raise UserError(f"{count} values of '{key}' are beyond the range of {dtype}: {_WIDER}")
  return tensor


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')


def _to_devices(part: np.ndarray, target: jax.ShapeDtypeStruct) -> Array:
  sharding = target.sharding
  if sharding is None:
    return jnp.asarray(part)
  return jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])


def _entry_to_devices(part: np.ndarray, target: jax.ShapeDtypeStruct) -> Array:
  """Copies an entry of a stacked leaf to the devices, sharded as the leaf's other axes."""
  sharding = target.sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  return _to_devices(part, jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding))


def _zeros(target: jax.ShapeDtypeStruct) -> Array:
  return _zeros_program(tuple(target.shape), np.dtype(target.dtype), target.sharding)()


@functools.cache
def _zeros_program(
  shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> Callable[[], Array]:
  """A function that makes zeros, compiled once for each shape, dtype and sharding."""
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _set_entry(leaf: Array, entry: Array, index: Array | int) -> Array:
  """Replaces one entry of the leaf's first axis in place."""
  return jax.lax.dynamic_update_index_in_dim(leaf, entry, index, 0)
