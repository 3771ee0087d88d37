"""Reads tensors out of PyTorch's pickled files without running anything that they say.

A `.pt`, `.pth`, `.bin` or `.ckpt` file is a zip archive: a pickle that describes tensors, and
their bytes. Unpickling calls whatever functions the pickle names, so this reader knows a handful of
names, all of them its own inert stand-ins, and refuses every other. Tensors are views of the mapped
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
_NESTED = ('state_dict', 'model', 'module', 'model_state_dict')  # where trainers put their weights


@dataclasses.dataclass(frozen=True)
class _Storage:
  """The bytes of one or more tensors: `count` numbers of a dtype, not read yet."""

  dtype: np.dtype
  name: str
  count: int


@dataclasses.dataclass(frozen=True)
class Pickled:
  """A tensor in a pickled file; nothing is read until `read`.

  Attributes:
    shape: its shape.
    dtype: its dtype.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  _file: _File
  _storage: _Storage
  _offset: int
  _strides: tuple[int, ...]

  def read(self) -> np.ndarray:
    """The tensor, a read-only view of the mapped file."""
    flat = self._file.numbers(self._storage)
    item = flat.dtype.itemsize
    reach = sum((n - 1) * s for n, s in zip(self.shape, self._strides)) + 1
    if 0 in self.shape:
      return np.zeros(self.shape, flat.dtype)
    if self._offset < 0 or min(self._strides, default=0) < 0 or self._offset + reach > flat.size:
      raise UserError(f"'{self._file.path}' is damaged: a tensor lies outside its bytes")
    strides = tuple(step * item for step in self._strides)
    return np.lib.stride_tricks.as_strided(
      flat[self._offset :], self.shape, strides, writeable=False
    )


class _Arguments:
  """Stands in for a trainer's command line (argparse.Namespace), of which nothing is kept."""

  def __setstate__(self, state: Any) -> None:
    del state


class _File:
  """The archive, mapped into memory."""

  def __init__(self, path: Path):
    self.path = path
    with path.open('rb') as file:
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    self._zip = zipfile.ZipFile(path)
    self._checked: set[str] = set()  # storages whose checksum is right: several tensors share one
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
    # The local header repeats name and extra field, whose lengths may differ from the directory's.
    name, extra = struct.unpack_from('<HH', self._map, info.header_offset + 26)
    start = info.header_offset + 30 + name + extra
    size = storage.count * np.dtype(storage.dtype).itemsize
    if size > info.file_size or start + size > len(self._map):
      raise UserError(f"'{self.path}' is damaged: bytes of a tensor are missing")
    if member not in self._checked:
      with memoryview(self._map) as held, held[start : start + info.file_size] as content:
        if zlib.crc32(content) != info.CRC:
          raise UserError(f"'{self.path}' is damaged: wrong checksum of {member}; get it again")
      self._checked.add(member)
    return np.frombuffer(self._map, storage.dtype, storage.count, start)


class _Reader(pickle.Unpickler):
  """An unpickler that can build containers and descriptions of tensors, and nothing else."""

  def __init__(self, file: _File, stream: Any):
    super().__init__(stream)
    self._file = file

  def find_class(self, module: str, name: str) -> Any:
    known = {
      ('argparse', 'Namespace'): _Arguments,
      ('collections', 'OrderedDict'): collections.OrderedDict,
      ('torch._utils', '_rebuild_tensor_v2'): self._tensor,
      ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
    }
    if (module, name) in known:
      return known[module, name]
    if module in ('torch', 'torch.storage') and name in _STORAGES:
      return np.dtype(_STORAGES[name])
    raise UserError(
      f"'{self._file.path}' asks for {module}.{name}, which is no tensor: the file is refused, as "
      'reading it would run code; get the weights as safetensors'
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, name, _, count = pid
    if kind != 'storage' or not isinstance(dtype, np.dtype):
      raise UserError(f"'{self._file.path}' holds something that is no tensor: it is refused")
    return _Storage(dtype, str(name), int(count))

  def _tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Pickled:
    if not isinstance(storage, _Storage):
      raise UserError(f"'{self._file.path}' is damaged: a tensor has no bytes")
    sizes = tuple(int(n) for n in shape)
    steps = tuple(int(n) for n in strides)
    return Pickled(sizes, storage.dtype, self._file, storage, int(offset), steps)


def read(path: Path) -> dict[str, Pickled]:
  """The tensors of a pickled file by key; entries that are no tensors are left out.

  Raises:
    UserError: the file is no whole PyTorch file of version 1.6 or later, names anything but
      tensors and containers, or holds no tensor.
  """
  try:
    file = _File(path)
    if not file.pickle:
      raise zipfile.BadZipFile('no data.pkl in it')
    found = _Reader(file, io.BytesIO(file.text())).load()
  except UserError:
    raise
  except (zipfile.BadZipFile, ValueError) as error:
    raise UserError(
      f"'{path}' is no whole PyTorch file of version 1.6 or later ({error}): get it again, or as "
      'safetensors'
    ) from error
  # A damaged pickle can end in nearly any exception.
  except Exception as error:
    raise UserError(f"'{path}' can't be read ({type(error).__name__}: {error})") from error
  for name in _NESTED:
    if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
      found = found[name]
      break
  tensors = {k: v for k, v in found.items() if isinstance(v, Pickled)} if _maps(found) else {}
  if not tensors:
    raise UserError(f"'{path}' holds no tensors by name")
  return tensors


def _maps(found: Any) -> bool:
  return isinstance(found, Mapping) and all(isinstance(key, str) for key in found)
