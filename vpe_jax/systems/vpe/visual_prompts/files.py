"""Visual prompts that users save, edit and mix: arrays of codes, and files of them.

A file names the codebook that its codes index, so that a model never renders codes of another
codebook. A `.json` file is meant to be read and edited; each line is one row of the grid:

  {
   "format": "vpe_jax visual prompts 1",
   "codebook": "0f3a5c7e9b1d",
   "codes": 512,
   "side": 2,
   "made": {"by": "sampled", "seed": "0"},
   "plans": [
    {"prompt": "a red fox", "index": 0, "grid": [
     [ 12, 507],
     [  3,  44]
    ]}
   ]
  }

An `.npz` file has the same content as plain arrays: `codes` [n, P], `prompts` [n], `index` [n] and
`head`, the JSON of the fields before `plans`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vpe_jax import storage
from vpe_jax.contracts import UserError

ENDINGS = ('.json', '.npz')
_FORMAT = 'vpe_jax visual prompts 1'
_ZIP = (zipfile.BadZipFile, zlib.error)
_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Codebook:
  """Identity of a codebook.

  Attributes:
    size: number of entries.
    fingerprint: hash of its values, independent of the file (vpe_jax.checkpoints.weights).
  """

  size: int
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class VisualPrompts:
  """Visual prompts, the text prompts they belong to, and their provenance.

  Attributes:
    codes: int32 [n, P], each a square grid in raster order.
    prompts: n text prompts; '' where a visual prompt has none.
    index: n indices among the images of a text prompt. Prompt, index and seed key the noise that a
      visual prompt is rendered from, so the same index gives the same image again.
    codebook: of the codes.
    provenance: `by` (such as `sampled`, `read from an image`, `mixed`), seed, settings, checkpoint
      and the like.

  Raises:
    UserError: there is no visual prompt, a grid isn't square, a code is outside the codebook, or
      the numbers of visual prompts, text prompts and indices differ.
  """

  codes: np.ndarray
  prompts: tuple[str, ...]
  index: tuple[int, ...]
  codebook: Codebook
  provenance: Mapping[str, str]

  def __post_init__(self) -> None:
    n, P = self.codes.shape
    if not n or not P or math.isqrt(P) ** 2 != P:
      raise UserError(
        f'{n} visual prompts of {P} codes: at least one is needed, each a square grid'
      )
    if len(self.prompts) != n or len(self.index) != n:
      raise UserError(
        f'{n} visual prompts with {len(self.prompts)} prompts and {len(self.index)} indices'
      )
    least, most, last = self.codes.min(), self.codes.max(), self.codebook.size - 1
    if least < 0 or most > last:
      raise UserError(f'codes go from {least} to {most}: the codebook has 0 to {last}')

  def __len__(self) -> int:
    return len(self.codes)

  @property
  def side(self) -> int:
    """Codes per side of a grid."""
    return math.isqrt(self.codes.shape[1])

  @property
  def grids(self) -> np.ndarray:
    """The codes as grids [n, side, side]: a view, so assignments also change `codes`."""
    return self.codes.reshape(-1, self.side, self.side)

  def take(self, positions: Sequence[int] | np.ndarray) -> VisualPrompts:
    """The visual prompts at these positions, in this order."""
    pick = lambda items: tuple(items[position] for position in positions)
    codes = self.codes[np.asarray(positions, int)]
    return dataclasses.replace(
      self, codes=codes, prompts=pick(self.prompts), index=pick(self.index)
    )

  def with_prompts(self, prompts: Sequence[str]) -> VisualPrompts:
    """The same visual prompts with other text prompts: one for all, or one for each.

    Raises:
      UserError: the number of text prompts is neither 1 nor that of the visual prompts.
    """
    prompts = tuple(prompts)
    if len(prompts) not in (1, len(self)):
      raise UserError(
        f'{len(prompts)} prompts for {len(self)} visual prompts: give one for all, or one for each'
      )
    return dataclasses.replace(self, prompts=prompts * (len(self) // len(prompts)))

  def check(self, codebook: Codebook, side: int, name: str = 'these visual prompts') -> None:
    """Checks that a model with this codebook and grid can render the visual prompts.

    Raises:
      UserError: the codebook or the grid differs; the message names both.
    """
    ours, theirs = codebook, self.codebook
    if theirs != ours:
      raise UserError(
        f'{name} index another codebook ({theirs.fingerprint}, {theirs.size} codes) than this '
        f"model's ({ours.fingerprint}, {ours.size} codes): render them with the model that they "
        'were made with'
      )
    if self.side != side:
      raise UserError(
        f'{name} have {self.side} x {self.side} codes and those of this model {side} x {side}: '
        'render them with the model that they were made with'
      )

  def save(self, path: str, overwrite: bool = False) -> None:
    """Writes a file, whole or not at all.

    Args:
      path: ends in .json or .npz, local (`~` is the home folder) or gs://.
      overwrite: whether an existing file may be replaced.

    Raises:
      UserError: see `check_target`; or the file can't be written.
    """
    check_target(path, overwrite)
    content = _json(self) if path.endswith('.json') else _npz(self)
    with storage.writing(path):
      storage.write_atomic(storage.resolve(path), content)


def load(path: str) -> VisualPrompts:
  """Reads a file that `VisualPrompts.save` or a person wrote.

  Args:
    path: ends in .json or .npz, local (`~` is the home folder) or gs://.

  Raises:
    UserError: the file is absent or damaged; the message names the first error.
  """
  _check_ending(path)
  place = storage.resolve(path)
  try:
    content = place.read_bytes()
  except OSError as error:
    raise UserError(
      f'cannot read {path} ({error.strerror or error}): name a file that --save_visual_prompt wrote'
    ) from error
  try:
    return _from_json(content) if path.endswith('.json') else _from_npz(content)
  except UserError as error:
    raise UserError(f'{path} is no whole file of visual prompts: {error}') from error


def check_target(path: str, overwrite: bool = False) -> None:
  """Checks the path of `VisualPrompts.save`; front doors call it before the work starts.

  Raises:
    UserError: the file exists (and `overwrite` is off), is a folder, or has another suffix.
  """
  _check_ending(path)
  place = storage.resolve(path)
  if storage.probe(place, place.is_dir):
    raise UserError(f'{path} is a folder: name a file')
  if place.exists() and not overwrite:
    raise UserError(
      f'{path} exists: name another file, or replace it (--overwrite, overwrite=True)'
    )


def mixed(upper: VisualPrompts, lower: VisualPrompts, rows: int | None = None) -> VisualPrompts:
  """Visual prompts whose top rows come from `upper` and the others from `lower`, pair by pair.

  Args:
    upper: n visual prompts; the mixes keep their text prompts and indices.
    lower: n visual prompts.
    rows: number of rows from `upper` (None: half of them).

  Raises:
    UserError: codebooks, grids or numbers of visual prompts differ, or `rows` is out of range.
  """
  lower.check(upper.codebook, upper.side, 'the lower visual prompts')
  rows = upper.side // 2 if rows is None else rows
  if len(upper) != len(lower) or not 0 <= rows <= upper.side:
    raise UserError(
      f'cannot mix the top {rows} rows of {len(upper)} visual prompts with {len(lower)} others: '
      f'mix as many of each, and 0 to {upper.side} rows'
    )
  grids = np.concatenate([upper.grids[:, :rows], lower.grids[:, rows:]], axis=1)
  provenance = {'by': 'mixed', 'rows': str(rows)}
  codes = grids.reshape(upper.codes.shape)
  return dataclasses.replace(upper, codes=codes, provenance=provenance)


def best(scores: np.ndarray, count: int) -> np.ndarray:
  """Indices [B, count] of the highest scores [B, n], best first; ties keep their order."""
  return np.argsort(-scores, axis=1, kind='stable')[:, :count]


def _check_ending(path: str) -> None:
  if not path.endswith(ENDINGS):
    raise UserError(f"'{path}' is no file of visual prompts: these end in {' or '.join(ENDINGS)}")


def _head(visual_prompts: VisualPrompts) -> dict[str, Any]:
  """The fields of a file other than its visual prompts."""
  return {
    'format': _FORMAT,
    'codebook': visual_prompts.codebook.fingerprint,
    'codes': visual_prompts.codebook.size,
    'side': visual_prompts.side,
    'made': dict(visual_prompts.provenance),
  }


def _json(visual_prompts: VisualPrompts) -> bytes:
  width = len(str(visual_prompts.codebook.size - 1))
  line = lambda row: f'   [{", ".join(f"{code:{width}d}" for code in row)}]'
  entries = []
  v = visual_prompts
  for prompt, index, grid in zip(v.prompts, v.index, v.grids, strict=True):
    text = json.dumps(prompt, ensure_ascii=False)
    rows = ',\n'.join(map(line, grid.tolist()))
    entries.append(f'  {{"prompt": {text}, "index": {index}, "grid": [\n{rows}\n  ]}}')
  head = json.dumps(_head(visual_prompts), indent=1, ensure_ascii=False).removesuffix('\n}')
  listed = ',\n'.join(entries)
  return f'{head},\n "plans": [\n{listed}\n ]\n}}\n'.encode()


def _npz(visual_prompts: VisualPrompts) -> bytes:
  buffer = io.BytesIO()
  np.savez(
    buffer,
    codes=visual_prompts.codes.astype(np.int32),
    prompts=np.asarray(visual_prompts.prompts, np.str_),
    index=np.asarray(visual_prompts.index, np.int32),
    head=np.asarray(json.dumps(_head(visual_prompts))),
  )
  return buffer.getvalue()


def _from_json(content: bytes) -> VisualPrompts:
  values = _parsed(content)
  head = _read_head(values)
  entries = _field(values, 'plans', list)
  prompts, index, grids, side = [], [], [], head['side']
  counts: dict[str, int] = {}  # entries of each prompt so far
  for number, entry in enumerate(entries):
    where = f'plan {number}: '
    if not isinstance(entry, dict):
      raise UserError(f'{where}it must be {{"prompt": ..., "grid": ...}}')
    prompt = _field(entry, 'prompt', str, where) if 'prompt' in entry else ''
    default = counts.get(prompt, 0)
    index.append(_number(entry, 'index', where) if 'index' in entry else default)
    counts[prompt] = default + 1
    grids.append(_grid(_field(entry, 'grid', list, where), side, head['codes'], where))
    prompts.append(prompt)
  codes = np.asarray(grids, np.int32).reshape(len(grids), side * side)
  return _visual_prompts(head, codes, prompts, index)


def _from_npz(content: bytes) -> VisualPrompts:
  kinds = {'codes': 'i', 'prompts': 'U', 'index': 'i', 'head': 'U'}
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in kinds}
  # The exception depends on where the archive is damaged; TypeError: a single array (.npy).
  except (KeyError, ValueError, TypeError, OSError, EOFError, *_ZIP) as error:
    reason = (' '.join(str(error).split()) or 'it is cut off').rstrip('.')
    raise UserError(f'{reason}; save the visual prompts again') from error
  for name, kind in kinds.items():
    if arrays[name].dtype.kind != kind:
      raise UserError(f"'{name}' holds {arrays[name].dtype}; save the visual prompts again")
  head = _read_head(_parsed(str(arrays['head']).encode()))
  codes, prompts, side = arrays['codes'], arrays['prompts'].reshape(-1), head['side']
  n = len(prompts)
  if codes.shape != (n, side * side) or arrays['index'].shape != (n,):
    raise UserError(
      f'codes {list(codes.shape)}, {n} prompts and side {side} do not fit; save the visual prompts '
      'again'
    )
  return _visual_prompts(head, codes, prompts.tolist(), arrays['index'].tolist())


def _visual_prompts(
  head: Mapping[str, Any], codes: np.ndarray, prompts: Sequence[str], index: Sequence[int]
) -> VisualPrompts:
  if min(index, default=0) < 0:
    raise UserError(f'an index is {min(index)}: indices count from 0')
  codebook = Codebook(head['codes'], head['codebook'])
  if codes.size and not 0 <= codes.min() <= codes.max() < codebook.size:
    raise UserError(f'codes go from {codes.min()} to {codes.max()}: 0 to {codebook.size - 1} exist')
  return VisualPrompts(codes.astype(np.int32), tuple(prompts), tuple(index), codebook, head['made'])


def _parsed(content: bytes) -> dict[str, Any]:
  """A JSON object."""
  try:
    values = json.loads(content.decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:  # Truncated, not UTF-8, too deep, too many digits.
    raise UserError(f'it is not JSON ({error}); fix it or save the visual prompts again') from error
  if not isinstance(values, dict):
    raise UserError('it is JSON, but not an object; save the visual prompts again')
  return values


def _read_head(values: Mapping[str, Any]) -> dict[str, Any]:
  if values.get('format') != _FORMAT:
    format_ = values.get('format')
    raise UserError(f'"format" is {format_!r}, not {_FORMAT!r}; save the visual prompts again')
  made = _field(values, 'made', dict) if 'made' in values else {}
  return {
    'codebook': _field(values, 'codebook', str),
    'codes': _number(values, 'codes', least=1),
    'side': _number(values, 'side', least=1),
    'made': {str(key): str(value) for key, value in made.items()},
  }


def _field(values: Mapping[str, Any], name: str, kind: type, where: str = '') -> Any:
  """A field of one type."""
  noun = {str: 'a text', list: 'a list', dict: 'an object'}[kind]
  if not isinstance(value := values.get(name), kind):
    shown = 'absent' if name not in values else f'{value!r:.40}'
    raise UserError(f'{where}"{name}" is {shown}: it must be {noun}')
  return value


def _number(values: Mapping[str, Any], name: str, where: str = '', least: int = 0) -> int:
  """A field that is a whole number."""
  if not _whole(value := values.get(name)) or not least <= value <= _INT32_MAX:
    raise UserError(f'{where}"{name}" is {value!r:.40}: it must be a whole number from {least}')
  return value


def _grid(rows: list[Any], side: int, codes: int, where: str) -> list[list[int]]:
  """The codes of one visual prompt, row by row."""
  if len(rows) != side:
    raise UserError(f'{where}its grid has {len(rows)} rows: "side" says {side}')
  for number, row in enumerate(rows):
    if not isinstance(row, list) or len(row) != side:
      count = len(row) if isinstance(row, list) else f'{row!r:.40}, not'
      raise UserError(f'{where}row {number} has {count} codes: "side" says {side}')
    for code in row:
      if not _whole(code) or not 0 <= code < codes:
        raise UserError(
          f'{where}row {number} has the code {code!r:.40}: the codebook has 0 to {codes - 1}'
        )
  return rows


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
