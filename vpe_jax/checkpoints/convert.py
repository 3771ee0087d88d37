"""Published tensors into parameters, and back: strict in both directions, one tensor at a time.

What a family's tensors are called and how their axes lie is data (checkpoints/table.py and
checkpoints/tables). This engine matches all of it before it reads a single number: every source
key is used or ignored for a stated reason, every parameter is filled or absent for one, all shapes
and dtypes fit. Then tensors stream from the mapped file into parameters that lie on their devices
already, where each layer is written in place.
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
from vpe_jax.checkpoints import table as tables
from vpe_jax.checkpoints.sources import Tensor
from vpe_jax.checkpoints.table import Place, Table
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.sharding import by_path

SHARD = 5 * 10**9  # bytes of a file, as transformers' default
_LISTED = 6  # differences that an error lists
_FEWER = 1000  # times fewer tensors than a config asks for: they aren't listed
_FLOATS = tuple(np.dtype(name) for name in (np.float16, jnp.bfloat16, np.float32))
_Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything about an import that doesn't need the tensors' numbers.

  Attributes:
    table: the key layout that fits.
    places: source key -> where it goes.
    ignored: source key -> why it isn't used.
    absent: path of a parameter that no tensor fills -> why.
  """

  table: Table
  places: Mapping[str, Place]
  ignored: Mapping[str, str]
  absent: Mapping[str, str]


def plan(tensors: Mapping[str, Tensor], layouts: Sequence[Table], abstract: Params) -> Plan:
  """Matches source tensors with parameters, strictly both ways.

  Args:
    tensors: the source.
    layouts: key layouts of the family; the one that knows most of the keys is taken.
    abstract: the parameters, with `shape` and `dtype`.

  Raises:
    UserError: keys without a place, parameters without a tensor, or shapes and dtypes that don't
      fit: one line with all of it.
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
      problems.append(f"'{prefix}{key}' has no place here")
  problems += [f"'{prefix}{key}' is missing" for key in sorted(expected.keys() - tensors.keys())]
  filled = {path for place in expected.values() for path in place.targets}
  absent = {path: tables.reason(table.absent, path) for path in sorted(shapes.keys() - filled)}
  problems += [f"nothing fills our '{path}'" for path, why in absent.items() if why is None]
  if problems:
    raise UserError(_differences(table, problems))
  return Plan(table, places, ignored, absent)


def load(tensors: Mapping[str, Tensor], plan: Plan, abstract: Params) -> dict[str, Array]:
  """Reads all tensors of a plan into parameters.

  Host memory beyond the parameters themselves is that of one source tensor and of the layer it
  fills, whatever the size of the model.

  Args:
    tensors: the source that the plan was made for.
    plan: from `plan`.
    abstract: the parameters, as `jax.ShapeDtypeStruct`; leaves with a sharding are made there.

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
      # A copy, never a view of the file: devices may keep a host array as it is.
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
  """Nested parameters from leaves by path."""
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
  """Writes parameters as published tensors: safetensors, an index if there are several files.

  The folder appears whole or not at all.

  Args:
    params: every leaf of the model.
    table: the key layout to write.
    folder: to be made.
    config: becomes config.json.
    axes: sizes of axes that our leaves don't show, such as the side of a patch.
    stem: how the files' names begin (`diffusion_pytorch_model` for diffusers).
    dtype: float32, bfloat16 or float16.
    shard: bytes of a file at most, unless one tensor is larger.

  Returns:
    The keys that were written.

  Raises:
    UserError: the folder exists, can't be written, or the layout can't be exported.
  """
  if folder.exists():
    raise UserError(f"'{folder}' exists: name another folder")
  leaves = by_path(params)
  shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}
  places = _expected(table, shapes)
  _check_exportable(table, places, shapes)
  kind = np.dtype(getattr(jnp, dtype))
  files = _files(places, shapes, kind.itemsize, shard)
  names = _file_names(stem, len(files))
  with storage.writing(folder), _made_whole(folder) as unfinished:
    for name, keys in zip(names, files, strict=True):
      tensors = {key: _source_tensor(places[key], leaves, axes, kind) for key in keys}
      # `format` is what transformers and diffusers look for.
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
  """A folder of our own beside another, whose name it gets once all is in it."""
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
  """The beginning that all keys share, if the table knows it."""
  return next((p for p in table.prefixes if all(key.startswith(p) for key in keys)), '')


def _bare(table: Table, keys: Mapping[str, Any]) -> list[str]:
  prefix = _prefix(table, keys)
  return [key.removeprefix(prefix) for key in keys]


def _expected(table: Table, shapes: _Shapes, most: int | None = None) -> dict[str, Place]:
  """All source keys that fill these parameters, and where they go.

  Raises:
    UserError: there are more than `most`: a config that asks for a billion layers ends here.
  """
  found = (item for row in table.rows for item in tables.keys(row, shapes))
  expected = dict(itertools.islice(found, most))
  if most is not None and next(found, None):
    raise UserError(
      f"the weights don't fit the layout '{table.name}' of this configuration, which asks for over "
      f'{most} tensors: is the config of another model?'
    )
  return expected


def _parts(place: Place, shapes: _Shapes) -> list[tuple[int, ...]]:
  """The shapes that a source tensor fills: of its targets, or of one entry of each."""
  whole = [shapes[path] for path in place.targets]
  return whole if place.index is None else [shape[1:] for shape in whole]


def _size(place: Place, shapes: _Shapes) -> int:
  """How many numbers the source tensor holds."""
  return sum(int(np.prod(shape, dtype=np.int64)) for shape in _parts(place, shapes))


def _misfits(key: str, tensor: Tensor, place: Place, shapes: _Shapes) -> list[str]:
  found = []
  if absent := [path for path in place.targets if path not in shapes]:
    return [f"'{key}' has no place here: there is no '{absent[0]}'"]
  if words := tables.misfit(place, tensor.shape, _parts(place, shapes)):
    found.append(f"'{key}' has the wrong shape: {words}")
  if tensor.dtype not in _FLOATS:
    found.append(f"'{key}' holds {tensor.dtype}, not floating-point numbers of 16 or 32 bits")
  return found


def _check_ties(
  table: Table, tensors: Mapping[str, Tensor], expected: Mapping[str, Place]
) -> dict[str, str]:
  dropped = {}
  for copy, original in table.ties:
    if copy in tensors and original in tensors and copy not in expected:
      if not np.array_equal(tensors[copy].read(), tensors[original].read()):
        raise UserError(
          f"'{copy}' and '{original}' should be one tensor, but hold different numbers: these "
          'weights are of another model'
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
      f"layout '{table.name}' is for import only: of '{partial[0]}' and {len(partial) - 1} other "
      'tensors we keep a part'
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
  """Keys of each file, in order."""
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
  # Not ascontiguousarray, which makes a vector of a scalar.
  return np.array(tables.backward(place, parts, axes), dtype, order='C')


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')


def _placed(part: np.ndarray, leaf: Any) -> Array:
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    return jnp.asarray(part)
  return jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])


def _placed_entry(part: np.ndarray, leaf: Any) -> Array:
  """One entry of a stacked leaf, split as the leaf is."""
  sharding = getattr(leaf, 'sharding', None)
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  return _placed(part, jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding))


def _zeros(leaf: Any) -> Array:
  return _maker(tuple(leaf.shape), np.dtype(leaf.dtype), getattr(leaf, 'sharding', None))()


@functools.cache
def _maker(shape: tuple[int, ...], dtype: np.dtype, sharding: Any) -> Any:
  """Compiled once for all leaves of a kind."""
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _written(leaf: Array, entry: Array, index: Array | int) -> Array:
  """The leaf with one entry of its first axis replaced, in the same memory."""
  return jax.lax.dynamic_update_index_in_dim(leaf, entry, index, 0)
