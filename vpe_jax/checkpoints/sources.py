"""Published weights on disk or on the hub: tensors by key, read one at a time.

Safetensors first; PyTorch's pickled files only through checkpoints/pickles.py. A file is mapped
into memory, so that a tensor costs nothing until its bytes are used.
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

from vpe_jax.checkpoints import pickles
from vpe_jax.contracts import UserError

# Names of dtypes in a safetensors header.
DTYPES = {
  'BOOL': np.bool_, 'U8': np.uint8, 'I8': np.int8, 'U16': np.uint16, 'I16': np.int16,
  'U32': np.uint32, 'I32': np.int32, 'U64': np.uint64, 'I64': np.int64,
  'F16': np.float16, 'BF16': np.dtype(jnp.bfloat16), 'F32': np.float32, 'F64': np.float64,
}  # fmt: skip
PICKLED = ('.bin', '.pth', '.pt', '.ckpt')
_HEADER = 100 * 2**20  # bytes; the format's own limit
_CONFIGS = ('config.json', 'config.yaml')  # the first that is there counts
_FETCHED = ('*.safetensors', '*.safetensors.index.json', *_CONFIGS)
_FETCHED_PICKLES = ('*.bin', '*.bin.index.json', '*.pth', '*.ckpt', *_CONFIGS)


class Tensor(Protocol):
  """A tensor whose numbers are still in its file, with a numpy array's `shape` and `dtype`."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def read(self) -> np.ndarray:
    """The numbers, a read-only view of the file."""
    ...


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights as they were published.

  Attributes:
    path: where they lie.
    tensors: key -> tensor.
    config: config.json beside them, or config.yaml; empty where there is neither.
  """

  path: Path
  tensors: Mapping[str, Tensor]
  config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Mapped:
  """A tensor of a safetensors file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  _bytes: bytes | mmap.mmap
  _start: int

  def read(self) -> np.ndarray:
    count = int(np.prod(self.shape, dtype=np.int64))
    return np.frombuffer(self._bytes, self.dtype, count, self._start).reshape(self.shape)


def open_source(name: str) -> Source:
  """Opens published weights.

  Args:
    name: a folder as `save_pretrained` writes it (one file, or several and an index), a single
      file (.safetensors, .bin, .pth, .pt, .ckpt), or the id of a model on the Hugging Face hub,
      `OWNER/NAME`, which is downloaded; `OWNER/NAME:FOLDER` takes a folder of it.

  Raises:
    UserError: nothing is there, a file is damaged or refused, or the hub is out of reach.
  """
  path = Path(name).expanduser()
  if not name or not path.exists():
    path = _downloaded(name)
  if path.is_file():
    return Source(path, _read(path), _config(path.parent))
  for ending, others in (('.safetensors', ()), ('.bin', PICKLED[1:])):
    tensors = _from_folder(path, ending, others)
    if tensors:
      return Source(path, tensors, _config(path))
  raise UserError(f"'{name}' holds no weights: no *.safetensors, and no *{' *'.join(PICKLED)}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
  """The tensors of one file.

  Raises:
    UserError: it is no whole safetensors file.
  """
  try:
    with path.open('rb') as file:
      held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (ValueError, OSError) as error:  # An empty file can't be mapped.
    raise UserError(f"'{path}' can't be read ({error}): get it again") from error
  return parse(held, str(path))[0]


def parse(content: bytes | mmap.mmap, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
  """The tensors in the bytes of a safetensors file, and its metadata.

  Raises:
    UserError: they are no whole safetensors file, which `name` is called.
  """
  try:
    length = int.from_bytes(content[:8], 'little')
    if len(content) < 8 or not 0 < length <= min(_HEADER, len(content) - 8):
      raise ValueError('its header is cut off')
    header, metadata = _header(content[8 : 8 + length])
    _check_offsets(header, len(content) - 8 - length)
    tensors = {key: _mapped(content, 8 + length, entry) for key, entry in header.items()}
  except ValueError as error:
    raise UserError(f"'{name}' is no whole safetensors file ({error}): get it again") from error
  return tensors, metadata


def _header(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
  """Entries and metadata of a header, in which every field is of its kind."""
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
    if not all(isinstance(word, str) for word in strings):
      raise TypeError('no text')
    if not all(type(number) is int and number >= 0 for number in numbers):
      raise TypeError('no size')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError('its header is damaged') from error
  return header, metadata


def _check_offsets(header: Mapping[str, Any], size: int) -> None:
  """Tensors lie one after the other and fill the file: none share bytes, none are left over."""
  end = 0
  for start, stop in sorted(entry['data_offsets'] for entry in header.values()):
    if start != end:
      raise ValueError('its tensors overlap, or leave bytes out')
    end = stop
  if end > size:
    raise ValueError('bytes are missing at its end')
  if end < size:
    raise ValueError('it has bytes that belong to no tensor')


def _mapped(held: bytes | mmap.mmap, base: int, entry: Mapping[str, Any]) -> _Mapped:
  shape, dtype = tuple(entry['shape']), np.dtype(DTYPES[entry['dtype']])
  start, stop = entry['data_offsets']
  if stop - start != math.prod(shape) * dtype.itemsize:
    raise ValueError('a tensor has more or fewer bytes than its shape says')
  return _Mapped(shape, dtype, held, base + start)


def _read(path: Path) -> Mapping[str, Tensor]:
  if path.suffix == '.safetensors':
    return read_safetensors(path)
  if path.suffix in PICKLED:
    return pickles.read(path)
  endings = ', '.join(('.safetensors', *PICKLED))
  raise UserError(f"'{path}' is no file of weights: their names end in {endings}")


def _from_folder(folder: Path, ending: str, others: Sequence[str]) -> dict[str, Tensor]:
  """All tensors of the files that an index names, or of all files with this ending."""
  indices = sorted(folder.glob(f'*{ending}.index.json'))
  if len(indices) > 1:
    names = ', '.join(index.name for index in indices)
    raise UserError(f"'{folder}' has several indices ({names}): name one file, or another folder")
  if indices:
    named = _weight_map(indices[0])
    files = [folder / name for name in sorted(set(named.values()))]
  else:
    files = sorted(file for e in (ending, *others) for file in folder.glob(f'*{e}'))
  tensors: dict[str, Tensor] = {}
  for file in files:
    if not file.is_file():
      lacks = 'has a folder in place of' if file.exists() else 'lacks'
      raise UserError(f"'{folder}' {lacks} {file.name}, a file of its weights: get it again")
    found = _read(file)
    twice = tensors.keys() & found.keys()
    if twice:
      raise UserError(f"'{folder}' has '{min(twice)}' in two files: name one file of them")
    tensors |= found
  if indices:
    missing = sorted(named.keys() - tensors.keys())
    if missing:
      raise UserError(f"'{folder}' lacks '{missing[0]}', which its index names: get it again")
  return tensors


def _weight_map(index: Path) -> dict[str, str]:
  """Tensor -> name of its file, from an index."""
  try:
    named = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    if not all(isinstance(name, str) for name in named.values()):
      raise TypeError('a tensor has no file name')
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
    raise UserError(f"'{index}' is no index of weights: get it again") from error
  for name in named.values():
    if Path(name).name != name:
      raise UserError(f"'{index}' names '{name}', which lies outside its folder: it is refused")
  return named


def _config(folder: Path) -> Mapping[str, Any]:
  for name, kind, parse in zip(_CONFIGS, ('JSON', 'YAML'), (json.loads, yaml.safe_load)):
    path = folder / name
    if not path.exists():
      continue
    try:
      found = parse(path.read_text(encoding='utf-8'))
    except (ValueError, yaml.YAMLError, RecursionError, OSError) as error:
      reason = ' '.join(str(getattr(error, 'strerror', None) or error).split())
      raise UserError(f"'{path}' is no {kind} ({reason}): get it again") from error
    if not isinstance(found, dict):
      raise UserError(f"'{path}' holds no fields by name: get it again")
    return found
  return {}


def _downloaded(name: str) -> Path:
  """A model of the hub, on this machine."""
  repo, _, folder = name.partition(':')
  if name.startswith(('/', '.', '~')) or repo.count('/') != 1 or not all(repo.split('/')):
    raise UserError(f"no weights at '{name}': no such file or folder, and no hub id (OWNER/NAME)")
  import huggingface_hub  # Only where it is needed: nothing else here touches a network.

  try:
    for patterns in (_FETCHED, _FETCHED_PICKLES):
      wanted = [f'{folder}/{pattern}' if folder else pattern for pattern in patterns]
      path = Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted)) / folder
      if any(path.glob('*.safetensors')) or patterns is _FETCHED_PICKLES:
        return path
  except Exception as error:  # The hub's client raises its own and its transport's.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"no weights at '{name}': no such file or folder here, and the hub can't be reached or has "
      f'no such model ({reason}); download it elsewhere and name the folder'
    ) from error
  raise AssertionError('unreachable')
