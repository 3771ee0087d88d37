"""Published weights on disk or on the hub: tensors by key, read one at a time.

Safetensors first; PyTorch's pickled files only through checkpoints/pickles.py. A file is mapped
into memory, so that a tensor costs nothing until its bytes are used.
"""

from __future__ import annotations

import dataclasses
import json
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
  """A tensor whose numbers are still in its file."""

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
  _bytes: mmap.mmap
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
  if not path.exists():
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
    length = int.from_bytes(held[:8], 'little')
    if len(held) < 8 or not 0 < length <= min(_HEADER, len(held) - 8):
      raise ValueError('its header is cut off')
    header = json.loads(held[8 : 8 + length])
    header.pop('__metadata__', None)
    return {key: _mapped(held, 8 + length, entry) for key, entry in header.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"'{path}' is no whole safetensors file ({error}): get it again") from error


def _mapped(held: mmap.mmap, base: int, entry: Mapping[str, Any]) -> _Mapped:
  shape, dtype = tuple(entry['shape']), np.dtype(DTYPES[entry['dtype']])
  start, stop = entry['data_offsets']
  if stop - start != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize or start < 0:
    raise ValueError('a tensor has more or fewer bytes than its shape says')
  if base + stop > len(held):
    raise ValueError('bytes are missing at its end')
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
    try:
      named = json.loads(indices[0].read_text())['weight_map']
      files = [folder / name for name in sorted(set(named.values()))]
    except (ValueError, KeyError, AttributeError) as error:
      raise UserError(f"'{indices[0]}' is no index of weights ({error}): get it again") from error
  else:
    files = sorted(file for e in (ending, *others) for file in folder.glob(f'*{e}'))
  tensors: dict[str, Tensor] = {}
  for file in files:
    if not file.exists():
      raise UserError(f"'{folder}' lacks {file.name}, which its index names: get it again")
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


def _config(folder: Path) -> Mapping[str, Any]:
  for name, kind, parse in zip(_CONFIGS, ('JSON', 'YAML'), (json.loads, yaml.safe_load)):
    path = folder / name
    if not path.exists():
      continue
    try:
      found = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
      reason = ' '.join(str(error).split())
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
