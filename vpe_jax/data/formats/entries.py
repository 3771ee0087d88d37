"""Lists the records of a folder of image files: image names and captions.

`captions.jsonl`, or `metadata.jsonl` as Hugging Face's `imagefolder` names it, has a line such as
`{"file": "fox.png", "caption": "a red fox"}` for each image. Without either, a text file beside
each image holds its caption. This module opens no image.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vpe_jax.contracts import UserError
from vpe_jax.data.records import BadRecord
from vpe_jax.storage import files_below, read_text

ENDINGS = frozenset(
  {'.png', '.jpg', '.jpeg', '.jfif', '.webp', '.avif', '.bmp', '.gif', '.tif', '.tiff'}
)
# Images of formats that are not read: named, so that they are not missed silently.
_OTHER_ENDINGS = frozenset({'.heic', '.heif', '.jp2', '.jxl', '.svg', '.psd', '.tga', '.dng'})
CAPTIONS, METADATA = 'captions.jsonl', 'metadata.jsonl'
MAX_CAPTION = 100_000  # characters; a longer caption is a mistake, and slow to read
_FILE_NAME = 'file_name'  # field of the image in Hugging Face's metadata.jsonl
_IMAGES = ('file', 'image', _FILE_NAME)
_MAX_SHOWN = 80  # characters of a name or value in an error message

Names = tuple[str, tuple[str, ...], str]  # image file, captions, source image of an edit or ''


@dataclasses.dataclass(frozen=True)
class FieldSpec:
  """Fields that each record of a user's data must have, and their names.

  Attributes:
    captions: whether each record must have a caption.
    references: whether each record must have a source image (edits).
    image: name of the image field; '' for the default names of each format.
    caption: name of the caption field; likewise.
    reference: name of the field of the source image; likewise.
  """

  captions: bool = True
  references: bool = False
  image: str = ''
  caption: str = ''
  reference: str = ''


class Entry(NamedTuple):
  """An entry of a folder.

  Attributes:
    names: file names and captions.
    values: other fields of its line.
    where: location, for error messages.
    reason: why the entry can't be used; '' if it can. The `names` of an unusable entry only
      distinguish it from others.
  """

  names: Names
  values: Mapping[str, Any]
  where: str
  reason: str = ''


def find_entries(folder: Path, fields: FieldSpec) -> Iterator[Entry]:
  """Entries of a folder, in no particular order, including those that can't be used.

  Args:
    folder: the folder.
    fields: fields that each entry must have. Default names: `file`, `image` or `file_name`;
      `caption` or `text`; `reference`.

  Raises:
    UserError: the folder is missing, its list can't be read or is empty beside images, or it has
      no list although source images must be named.
  """
  if not folder.is_dir():
    raise UserError(f'data folder {folder} does not exist: folder:PATH needs an existing folder')
  if (path := _list_file(folder, fields.image)) is not None:
    yield from _from_list(folder, path, fields)
  elif fields.references:
    raise UserError(f'data folder {folder} has no {CAPTIONS}: source images must be named there')
  else:
    yield from _from_text_files(folder, fields)


def _list_file(folder: Path, image: str) -> Path | None:
  """The file that lists the images, in the field `image` or a default one; None if none does."""
  path, metadata = folder / CAPTIONS, folder / METADATA
  if path.exists():
    return path
  if not metadata.is_file():
    return None
  # Other tools write files of this name too: the first line must have a field of image names.
  first = next((line for _, line in _lines(metadata) if line.strip()), b'')
  names = {_FILE_NAME, image or _FILE_NAME}
  return metadata if any(json.dumps(name).encode() in first for name in names) else None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
  """(number, content) of each line of a file, without a byte order mark.

  Raises:
    UserError: the file can't be read.
  """
  try:
    with path.open('rb') as file:
      for number, line in enumerate(file, 1):
        yield number, line.removeprefix(b'\xef\xbb\xbf') if number == 1 else line
  except OSError as error:
    raise UserError(f'cannot read {path} ({error.strerror}): check its permissions') from error


def _from_list(folder: Path, path: Path, fields: FieldSpec) -> Iterator[Entry]:
  is_empty = True
  for number, line in _lines(path):
    if not line.strip():
      continue
    is_empty, where = False, f'{path} line {number}'
    try:
      values = _parsed(line, where)
      names = _names(folder, values, fields, where)
    except BadRecord as error:
      yield _bad(where, error)
    else:
      yield Entry(names, values, where)
  if is_empty and (image := next(_image_files(folder), None)) is not None:
    raise UserError(
      f'{path} is empty, but {folder} has images such as {image.name}: write a line {{"file": ..., '
      f'"caption": ...}} for each image, or delete {path.name} to read captions from .txt files'
    )


def _bad(where: str, error: BadRecord) -> Entry:
  return Entry((where, (), ''), {}, where, str(error))


def _parsed(line: bytes, where: str) -> Any:
  """The JSON value of a line."""
  try:
    return json.loads(line.decode())
  except UnicodeDecodeError as error:
    raise BadRecord(
      f'{where} is not valid text ({error.reason} at byte {error.start}): write it in UTF-8'
    ) from error
  except (ValueError, RecursionError) as error:  # ValueError also for too many digits.
    raise BadRecord(
      f'{where} is not JSON ({abbreviated(str(error))}): write it as {{...}}'
    ) from error


def _names(folder: Path, values: Any, fields: FieldSpec, where: str) -> Names:
  """File names and captions of a line.

  Raises:
    BadRecord: the line lacks a field, or one is malformed.
  """
  images = [fields.image] if fields.image else _IMAGES
  captions = [fields.caption] if fields.caption else ['caption', 'text']
  name = first_text(values, *images)
  if name is None:
    raise BadRecord(f'{where} names no image: add "{images[0]}"')
  texts = captions_of(values, where, *captions)
  if fields.captions and not texts:
    raise BadRecord(f'{where}: image {abbreviated(name)} has no caption: add "{captions[0]}"')
  reference = ''
  if fields.references:
    field = fields.reference or 'reference'
    if (source := first_text(values, field)) is None:
      raise BadRecord(f'{where} names no source image: add "{field}"')
    reference = _within(folder, source, where)
  return _within(folder, name, where), texts, reference


def _within(folder: Path, name: str, where: str) -> str:
  """The normalized name of a file; rejects names outside the folder."""
  path = PurePosixPath(check_text(name, where, 'file name'))
  if path.is_absolute() or '..' in path.parts:
    raise BadRecord(
      f'{where}: image {abbreviated(name)} is outside the folder: copy it into {folder}'
    )
  return str(path)


def _from_text_files(folder: Path, fields: FieldSpec) -> Iterator[Entry]:
  for image in _image_files(folder, ENDINGS | _OTHER_ENDINGS):
    text, where = image.with_suffix('.txt'), f'image {printable(image)}'
    try:
      check_text(str(image), where, 'file name')
      if image.suffix.lower() in _OTHER_ENDINGS:
        raise BadRecord(f'{where} has a format that is not read: convert it to PNG or JPEG')
      caption = ' '.join(_text(text).split()) if text.is_file() else ''
      if fields.captions and not caption:
        raise BadRecord(f'image {image} has no caption: write one to {text.name} next to it')
    except BadRecord as error:
      yield _bad(where, error)
    else:
      names = (image.relative_to(folder).as_posix(), (caption,) if caption else (), '')
      yield Entry(names, {}, where)


def _text(path: Path) -> str:
  """The content of a text file.

  Raises:
    BadRecord: it can't be read.
  """
  try:
    return read_text(path)
  except UserError as error:
    raise BadRecord(str(error)) from error


def _image_files(folder: Path, endings: frozenset[str] = ENDINGS) -> Iterator[Path]:
  """Files of a folder and its subfolders, also linked ones, that have one of the endings.

  Hidden ones are left out.
  """
  for path in files_below(folder):
    hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)
    if not hidden and path.suffix.lower() in endings and path.is_file():
      yield path


def first_text(values: Any, *names: str) -> str | None:
  """The first of the named fields that holds text; None if none does."""
  texts = [values.get(name) for name in names] if isinstance(values, Mapping) else []
  return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)


def captions_of(values: Any, where: str, *names: str) -> tuple[str, ...]:
  """The captions in the first of the named fields that has any; () if none does.

  A field holds a text, or a list of texts that all describe the image.

  Raises:
    BadRecord: a field holds something else and no other field has captions, or a caption is too
      long or can't be encoded as UTF-8.
  """
  wrong = ''
  for name in names:
    value = values.get(name) if isinstance(values, Mapping) else None
    items = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    if not all(isinstance(item, str) for item in items):
      wrong = (
        wrong or f'{where}: "{name}" is {abbreviated(repr(value))}: write it as text, in "..."'
      )
    elif texts := tuple(filter(None, map(str.strip, items))):
      return tuple(check_caption(text, where) for text in texts)
  if wrong:
    raise BadRecord(wrong)
  return ()


def check_caption(text: str, where: str) -> str:
  """Returns the caption if it is short enough and can be encoded as UTF-8.

  Raises:
    BadRecord: it is longer than MAX_CAPTION, or can't be encoded.
  """
  if len(text) > MAX_CAPTION:
    raise BadRecord(
      f'{where}: the caption "{abbreviated(text)}" has {len(text):,} characters: shorten it to '
      f'{MAX_CAPTION:,}'
    )
  return check_text(text, where)


def check_text(text: str, where: str, kind: str = 'caption') -> str:
  """Returns the text if it can be encoded as UTF-8.

  Raises:
    BadRecord: it can't; the message names `where` and `kind`.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise BadRecord(
      f'{where}: the {kind} is not valid text ({error.reason}): write it in UTF-8'
    ) from error
  return text


def printable(path: Path) -> str:
  """A path for messages; bytes that are not UTF-8 are escaped, because terminals refuse them."""
  return str(path).encode(errors='backslashreplace').decode()


def abbreviated(text: str) -> str:
  """The beginning of a long text, for messages."""
  return text if len(text) <= _MAX_SHOWN else f'{text[:_MAX_SHOWN]}...'


def listed(reasons: list[str], shown: int = 8) -> str:
  """The first reasons and the number of others, for a message."""
  more = f'; and {len(reasons) - shown:,} more' if len(reasons) > shown else ''
  return '; '.join(reasons[:shown]) + more


def first_line(error: Exception) -> str:
  """The first line of an error message; the name of the error type if the message is empty."""
  return next(iter(str(error).splitlines()), '') or type(error).__name__
