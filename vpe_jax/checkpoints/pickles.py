"""Reads tensors from PyTorch's pickled files without executing code from the file.

A `.pt`, `.pth`, `.bin` or `.ckpt` file is a zip archive of a pickle, which describes the tensors,
and of their bytes. Unpickling calls any function that the pickle names. This reader maps a few
names to its own harmless functions and refuses all others. Tensors are views of the memory-mapped
file.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import UserError

_STORAGES = {
  'DoubleStorage': np.float64, 'FloatStorage': np.float32, 'HalfStorage': np.float16,
  'BFloat16Storage': np.dtype(jnp.bfloat16), 'LongStorage': np.int64, 'IntStorage': np.int32,
  'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}  # fmt: skip
# Keys under which training checkpoints store the weights, in order of preference.
_WEIGHT_KEYS = ('state_dict', 'model', 'module', 'model_state_dict')


@dataclasses.dataclass(frozen=True)
class _Storage:
  """A PyTorch storage that tensors share: `count` elements in `data/{name}`, not read yet."""

  dtype: np.dtype
  name: str
  count: int


@dataclasses.dataclass(frozen=True)
class Pickled:
  """A tensor in a pickled file; see `sources.Tensor`."""

  shape: tuple[int, ...]
  dtype: np.dtype
  _file: _File
  _storage: _Storage
  _offset: int  # in elements, as the strides
  _strides: tuple[int, ...]

  def read(self) -> np.ndarray:
    """The tensor as a read-only view of the memory-mapped file."""
    flat = self._file.numbers(self._storage)
    itemsize = flat.dtype.itemsize
    extent = sum((n - 1) * s for n, s in zip(self.shape, self._strides)) + 1
    if 0 in self.shape:
      return np.zeros(self.shape, flat.dtype)
    if self._offset < 0 or min(self._strides, default=0) < 0 or self._offset + extent > flat.size:
      raise UserError(f"'{self._file.path}' is damaged: a tensor exceeds its storage; get it again")
    strides = tuple(stride * itemsize for stride in self._strides)
    return np.lib.stride_tricks.as_strided(
      flat[self._offset :], self.shape, strides, writeable=False
    )


class _IgnoredNamespace:
  """Replaces argparse.Namespace (a trainer's command line) and drops its content."""

  def __setstate__(self, state: Any) -> None:
    del state


class _File:
  """The memory-mapped archive."""

  def __init__(self, path: Path):
    self.path = path
    with path.open('rb') as file:
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    self._zip = zipfile.ZipFile(path)
    self._verified: set[str] = set()  # storages whose checksum was verified; tensors may share one
    (self.pickle,) = [n for n in self._zip.namelist() if n.endswith('/data.pkl')][:1] or ('',)

  def text(self) -> bytes:
    return self._zip.read(self.pickle)

  def numbers(self, storage: _Storage) -> np.ndarray:
    member = f'{self.pickle.removesuffix("data.pkl")}data/{storage.name}'
    try:
      info = self._zip.getinfo(member)
    except KeyError as error:
      raise UserError(f"'{self.path}' is damaged: it lacks {member}; get it again") from error
    if info.compress_type != zipfile.ZIP_STORED:
      raise UserError(f"'{self.path}' is compressed, which PyTorch never does: get it again")
    # A member's local header has 30 bytes, then a name and an extra field. Their lengths, at byte
    # 26, may differ from those in the central directory.
    name, extra = struct.unpack_from('<HH', self._map, info.header_offset + 26)
    start = info.header_offset + 30 + name + extra
    size = storage.count * np.dtype(storage.dtype).itemsize
    if size > info.file_size or start + size > len(self._map):
      raise UserError(f"'{self.path}' is damaged: bytes of a tensor are missing; get it again")
    if member not in self._verified:
      with memoryview(self._map) as view, view[start : start + info.file_size] as content:
        if zlib.crc32(content) != info.CRC:
          raise UserError(f"'{self.path}' is damaged: wrong checksum of {member}; get it again")
      self._verified.add(member)
    return np.frombuffer(self._map, storage.dtype, storage.count, start)


class _Reader(pickle.Unpickler):
  """An unpickler that builds only containers and descriptions of tensors."""

  def __init__(self, file: _File, stream: Any):
    super().__init__(stream)
    self._file = file

  def find_class(self, module: str, name: str) -> Any:
    allowed = {
      ('argparse', 'Namespace'): _IgnoredNamespace,
      ('collections', 'OrderedDict'): collections.OrderedDict,
      ('torch._utils', '_rebuild_tensor_v2'): self._tensor,
      ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
    }
    if (module, name) in allowed:
      return allowed[module, name]
    if module in ('torch', 'torch.storage') and name in _STORAGES:
      return np.dtype(_STORAGES[name])
    raise UserError(
      f"'{self._file.path}' is refused: it refers to {module}.{name}, and reading it would execute "
      'code; get the weights as safetensors'
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, name, _, count = pid
    if kind != 'storage' or not isinstance(dtype, np.dtype):
      raise UserError(
        f"'{self._file.path}' is refused: it contains an object that is not a tensor; get the "
        'weights as safetensors'
      )
    return _Storage(dtype, str(name), int(count))

  def _tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Pickled:
    if not isinstance(storage, _Storage):
      raise UserError(f"'{self._file.path}' is damaged: a tensor has no storage; get it again")
    shape = tuple(int(n) for n in shape)
    strides = tuple(int(n) for n in strides)
    return Pickled(shape, storage.dtype, self._file, storage, int(offset), strides)


def read(path: Path) -> dict[str, Pickled]:
  """Reads the tensors of a pickled file by key; drops entries that are not tensors.

  Raises:
    UserError: the file is not a complete PyTorch file of version 1.6 or later, refers to objects
      other than tensors and containers, or contains no tensor.
  """
  try:
    file = _File(path)
    if not file.pickle:
      raise zipfile.BadZipFile('no data.pkl in it')
    content = _Reader(file, io.BytesIO(file.text())).load()
  except UserError:
    raise
  except (zipfile.BadZipFile, ValueError) as error:
    raise UserError(
      f"'{path}' is not a complete PyTorch file of version 1.6 or later ({error}): get it again, "
      'or as safetensors'
    ) from error
  # A damaged pickle can raise nearly any exception.
  except Exception as error:
    raise UserError(
      f"'{path}' can't be read ({type(error).__name__}: {error}): get it again"
    ) from error
  for key in _WEIGHT_KEYS:
    if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
      content = content[key]
      break
  tensors = {}
  if _has_string_keys(content):
    tensors = {key: value for key, value in content.items() if isinstance(value, Pickled)}
  if not tensors:
    raise UserError(f"'{path}' contains no named tensors: name a file of weights")
  return tensors


def _has_string_keys(content: Any) -> bool:
  return isinstance(content, Mapping) and all(isinstance(key, str) for key in content)
