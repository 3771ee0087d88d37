"""Published weights on disk or on the Hugging Face hub: tensors by key, read one at a time.

Safetensors are preferred; PyTorch's pickled files are read through checkpoints/pickles.py. Local
files are memory-mapped, so a tensor takes no memory until its bytes are used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import yaml
from etils import epath

from vpe_jax import storage
from vpe_jax.checkpoints import pickles
from vpe_jax.contracts import UserError
from vpe_jax.storage import HubName, hub_name

# Name of a dtype in a safetensors header -> numpy dtype.
DTYPES = {
  'BOOL': np.bool_, 'U8': np.uint8, 'I8': np.int8, 'U16': np.uint16, 'I16': np.int16,
  'U32': np.uint32, 'I32': np.int32, 'U64': np.uint64, 'I64': np.int64,
  'F16': np.float16, 'BF16': np.dtype(jnp.bfloat16), 'F32': np.float32, 'F64': np.float64,
}  # fmt: skip
PICKLED = ('.bin', '.pth', '.pt', '.ckpt')
_MAX_HEADER = 100 * 2**20  # bytes; the limit of the safetensors format
_CONFIGS = ('config.json', 'config.yaml')  # in order of preference
# Patterns of the files that a download fetches; pickled files only without safetensors.
_SAFETENSORS_FILES = ('*.safetensors', '*.safetensors.index.json', *_CONFIGS)
_PICKLED_FILES = ('*.bin.index.json', *(f'*{suffix}' for suffix in PICKLED), *_CONFIGS)


class Tensor(Protocol):
  """A tensor that is read from its file on demand."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def read(self) -> np.ndarray:
    """The tensor, read-only; a view of the file if the file is local."""
    ...


@dataclasses.dataclass(frozen=True)
class Source:
  """Published weights.

  Attributes:
    path: file or folder of the weights.
    tensors: key -> tensor.
    config: content of config.json or config.yaml in the same folder; empty without either.
    name: its name; that of a model on the hub has its commit.
  """

  path: Path
  tensors: Mapping[str, Tensor]
  config: Mapping[str, Any]
  name: str = ''


@dataclasses.dataclass(frozen=True)
class _Mapped:
  """A tensor of a safetensors file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  _content: _Content
  _start: int

  def read(self) -> np.ndarray:
    count = math.prod(self.shape)
    content = self._content[self._start : self._start + count * self.dtype.itemsize]
    return np.frombuffer(content, self.dtype, count).reshape(self.shape)


class _RemoteFile:
  """A file on an object store, of which only the requested ranges are read."""

  def __init__(self, path: epath.Path):
    self._path = path
    self._size = path.stat().length

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, part: slice) -> bytes:
    start, stop, _ = part.indices(self._size)
    with self._path.open('rb') as file:
      file.seek(start)
      return file.read(stop - start)


_Content = memoryview | _RemoteFile


def open_source(name: str) -> Source:
  """Opens published weights.

  Args:
    name: a folder in the format of `save_pretrained` (one file, or several and an index), a single
      file (.safetensors, .bin, .pth, .pt, .ckpt), or a model id on the Hugging Face hub,
      `OWNER/NAME`, which is downloaded; `OWNER/NAME@REVISION` selects a branch, tag or commit, and
      `OWNER/NAME:FOLDER` a folder of the model.

  Raises:
    UserError: there are no weights, a file is damaged or refused, or the hub can't be reached.
  """
  path = Path(name).expanduser()
  if not name or not path.exists():
    model = hub_name(name)
    if model is None:
      raise UserError(
        f"no weights at '{name}': no such file or folder, and not a hub id (OWNER/NAME)"
      )
    path = download(model)
    name = str(dataclasses.replace(model, revision=commit_of(model, path)))
  if path.is_file():
    return Source(path, _read(path), _config(path.parent), name)
  for suffix, others in (('.safetensors', ()), ('.bin', PICKLED[1:])):
    tensors = _from_folder(path, suffix, others)
    if tensors:
      return Source(path, tensors, _config(path), name)
  raise UserError(
    f"'{name}' contains no weights (*.safetensors, *{', *'.join(PICKLED)}): name their folder"
  )


def open_file(path: epath.PathLike, name: str = '') -> tuple[dict[str, Tensor], dict[str, str]]:
  """Opens a safetensors file, local or on an object store; see `parse`.

  Raises:
    UserError: the file can't be read, or is not a complete safetensors file.
  """
  name = name or str(path)
  if storage.is_remote(path):
    return parse(_RemoteFile(epath.Path(path)), name)
  try:
    with open(path, 'rb') as file:
      content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (ValueError, OSError) as error:  # An empty file can't be mapped.
    raise UserError(f"'{name}' can't be read ({error}): get it again") from error
  return parse(memoryview(content), name)


def parse(content: bytes | _Content, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
  """Parses a safetensors file.

  Args:
    content: bytes of the file; each tensor reads its part on demand.
    name: name of the file in errors.

  Returns:
    (tensors by key, metadata).

  Raises:
    UserError: the content is not a complete safetensors file.
  """
  content = memoryview(content) if isinstance(content, bytes) else content
  try:
    length = int.from_bytes(content[:8], 'little')
    if len(content) < 8 or not 0 < length <= min(_MAX_HEADER, len(content) - 8):
      raise ValueError('its header is truncated')
    header, metadata = _header(bytes(content[8 : 8 + length]))
    _check_offsets(header, len(content) - 8 - length)
    tensors = {key: _mapped(content, 8 + length, entry) for key, entry in header.items()}
  except ValueError as error:
    raise UserError(
      f"'{name}' is not a complete safetensors file ({error}): get it again"
    ) from error
  return tensors, metadata


def _header(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
  """Parses a header into entries and metadata, and checks the type of every field."""
  try:
    header = json.loads(text)
    metadata = header.pop('__metadata__', None) or {}
    strings = [*metadata.keys(), *metadata.values()]
    numbers = []
    for entry in header.values():
      start, stop = entry['data_offsets']
      strings.append(entry['dtype'])
      numbers += [start, stop, *entry['shape']]
      DTYPES[entry['dtype']]
    if not all(isinstance(string, str) for string in strings):
      raise TypeError('not a string')
    if not all(type(number) is int and number >= 0 for number in numbers):
      raise TypeError('not a size')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError('its header is damaged') from error
  return header, metadata


def _check_offsets(header: Mapping[str, Any], size: int) -> None:
  """Checks that the tensors fill the file without gaps or overlaps."""
  end = 0
  for start, stop in sorted(entry['data_offsets'] for entry in header.values()):
    if start != end:
      raise ValueError('its tensors overlap or have gaps between them')
    end = stop
  if end > size:
    raise ValueError('bytes are missing at its end')
  if end < size:
    raise ValueError('it has bytes that belong to no tensor')


def _mapped(content: _Content, base: int, entry: Mapping[str, Any]) -> _Mapped:
  shape, dtype = tuple(entry['shape']), np.dtype(DTYPES[entry['dtype']])
  start, stop = entry['data_offsets']
  if stop - start != math.prod(shape) * dtype.itemsize:
    raise ValueError("the size of a tensor doesn't match its shape")
  return _Mapped(shape, dtype, content, base + start)


def _read(path: Path) -> Mapping[str, Tensor]:
  if path.suffix == '.safetensors':
    return open_file(path)[0]
  if path.suffix in PICKLED:
    return pickles.read(path)
  suffixes = ', '.join(('.safetensors', *PICKLED))
  raise UserError(f"'{path}' is not a weight file: name a file that ends in {suffixes}")


def _from_folder(folder: Path, suffix: str, others: Sequence[str]) -> dict[str, Tensor]:
  """Reads the files of the index; without one, all files with `suffix` or one of `others`."""
  indices = sorted(folder.glob(f'*{suffix}.index.json'))
  if len(indices) > 1:
    names = ', '.join(index.name for index in indices)
    raise UserError(f"'{folder}' has several indices ({names}): name one file, or another folder")
  if indices:
    weight_map = _weight_map(indices[0])
    files = [folder / name for name in sorted(set(weight_map.values()))]
  else:
    files = sorted(file for s in (suffix, *others) for file in folder.glob(f'*{s}'))
  tensors: dict[str, Tensor] = {}
  for file in files:
    if not file.is_file():
      lacks = 'has a folder in place of' if file.exists() else 'lacks'
      raise UserError(f"'{folder}' {lacks} {file.name}, a file of its weights: get it again")
    file_tensors = _read(file)
    duplicates = tensors.keys() & file_tensors.keys()
    if duplicates:
      raise UserError(f"'{folder}' has '{min(duplicates)}' in two files: name one of the files")
    tensors |= file_tensors
  if indices:
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
      raise UserError(f"'{folder}' lacks '{missing[0]}', which its index lists: get it again")
  return tensors


def _weight_map(index: Path) -> dict[str, str]:
  """Reads an index: tensor key -> file name."""
  try:
    weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    if not all(isinstance(name, str) for name in weight_map.values()):
      raise TypeError('a tensor has no file name')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
    raise UserError(f"'{index}' is not a weight index: get it again") from error
  for name in weight_map.values():
    if Path(name).name != name:
      raise UserError(f"'{index}' is refused: it names '{name}', a file outside its folder")
  return weight_map


def _config(folder: Path) -> Mapping[str, Any]:
  for name, kind, parse in zip(_CONFIGS, ('JSON', 'YAML'), (json.loads, yaml.safe_load)):
    path = folder / name
    if not path.exists():
      continue
    try:
      config = parse(path.read_text(encoding='utf-8'))
    except (ValueError, yaml.YAMLError, RecursionError, OSError) as error:
      reason = ' '.join(str(getattr(error, 'strerror', None) or error).split())
      raise UserError(f"'{path}' is not valid {kind} ({reason}): get it again") from error
    if not isinstance(config, dict):
      raise UserError(f"'{path}' contains no named fields: get it again")
    return config
  return {}


def download(name: HubName) -> Path:
  """Downloads the weights of a model and their config; returns their local folder.

  Raises:
    UserError: see `snapshot`.
  """
  below = f'{name.folder}/' if name.folder else ''
  for patterns in (_SAFETENSORS_FILES, _PICKLED_FILES):
    # The patterns also match files in subfolders, which are other models.
    path = snapshot(name, [f'{below}{pattern}' for pattern in patterns], (f'{below}*/*',))
    path = path / name.folder
    if any(path.glob('*.safetensors')):
      break
  return path


def commit_of(name: HubName, path: Path) -> str:
  """The commit of a model, from the folder that `download` returned."""
  return (path.parents[name.folder.count('/')] if name.folder else path).name


def snapshot(name: HubName, patterns: Sequence[str], ignored: Sequence[str]) -> Path:
  """Downloads files of a model; returns the folder of the snapshot, whose name is its commit.

  Args:
    name: the model and its revision.
    patterns: glob patterns of the files.
    ignored: glob patterns of files that match `patterns` and are left out.

  Raises:
    UserError: the hub can't be reached, or has no such model or revision.
  """
  import huggingface_hub  # Imported here because only published models need a network.

  try:
    path = huggingface_hub.snapshot_download(
      name.repo,
      revision=name.revision or None,
      allow_patterns=list(patterns),
      ignore_patterns=list(ignored),
    )
  except Exception as error:  # The hub's client also raises errors of its HTTP library.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"no weights at '{name}': no such file or folder, and the hub can't be reached or has no "
      f'such model or revision ({reason}); download it elsewhere and name the folder'
    ) from error
  return Path(path)
