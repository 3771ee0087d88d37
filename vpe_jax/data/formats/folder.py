"""Folders of user images, with a `captions.jsonl` or a `.txt` file for each image.

The name of a subfolder is the class of its images. Class-conditional models need no captions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from absl import logging

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import KEEP_ALL, Filter
from vpe_jax.data.formats.checks import check_images, record_hash
from vpe_jax.data.formats.entries import ENDINGS, FieldSpec, Names, find_entries, listed
from vpe_jax.data.records import BadRecord, Record, Split, caption_fields, digest_of
from vpe_jax.data.transforms import Decoding
from vpe_jax.storage import local_path


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """How the records of a user's data are read.

  Attributes:
    fields: fields that each record must have.
    record_filter: filter that each record must pass.
    decoding: how image files become arrays.
    most_skipped: see data.most_skipped.
    count: use only the first `count` records, and log a warning; 0 for all.
    held_out: see data.held_out.
    split: `train`, or any other name for the held-out part.
  """

  fields: FieldSpec = FieldSpec()
  record_filter: Filter = KEEP_ALL
  decoding: Decoding = Decoding()
  most_skipped: float = 0.0
  count: int = 0
  held_out: float = 0.0
  split: Split = 'train'


@dataclasses.dataclass(frozen=True)
class File:
  """An image file, made square by `decoding` when rendered."""

  path: str
  decoding: Decoding = Decoding()

  def render(self, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3].

    Raises:
      BadRecord: the file is not a readable image, or exceeds a limit; the message names it.
    """
    try:
      self.decoding.check_bytes(os.stat(self.path).st_size, self.path)
      content = Path(self.path).read_bytes()
    except OSError as error:
      raise BadRecord(
        f'unreadable image {self.path} ({error.strerror}); replace the file or leave it out'
      ) from error
    return self.decoding.render(content, size, self.path)


@dataclasses.dataclass(frozen=True)
class Bytes:
  """An encoded image in memory, made square by `decoding` when rendered.

  Attributes:
    content: bytes of the image file.
    name: name of the image in error messages.
    decoding: how it becomes an array.
  """

  content: bytes = dataclasses.field(repr=False)
  name: str
  decoding: Decoding = Decoding()

  def render(self, size: int) -> np.ndarray:
    """The image as uint8 [size, size, 3].

    Raises:
      BadRecord: the bytes are not a readable image, or exceed a limit.
    """
    return self.decoding.render(self.content, size, self.name)


@dataclasses.dataclass(frozen=True)
class Folder:
  """The image files of a folder as a source, sorted by file name.

  Attributes:
    path: the folder.
    entries: image file, captions and source image file of each record.
    contents: a hash of the image files of each record.
    decoding: how image files become arrays.
  """

  path: str
  entries: tuple[Names, ...]
  contents: tuple[int, ...] = dataclasses.field(repr=False)
  decoding: Decoding = Decoding()

  def __len__(self) -> int:
    return len(self.entries)

  def __getitem__(self, index: int) -> Record:
    name, captions, source_name = self.entries[index]
    return Record(
      id=record_id(name),
      group=group_of(name),
      split='train',
      image=self._file(name),
      reference=self._file(source_name) if source_name else None,
      **caption_fields(captions),
    )

  def _file(self, name: str) -> File:
    return File(str(Path(self.path) / name), self.decoding)

  def stamps(self) -> Iterator[str]:
    """Path, size and modification time of every image file; see StoredSource in records.py."""
    for name, _, source_name in self.entries:
      for path in [self._file(each).path for each in (name, source_name) if each]:
        stat = os.stat(path)
        yield f'{path} {stat.st_size} {stat.st_mtime_ns}'

  def hashes(self) -> np.ndarray:
    """A hash of the image files of each record; see HashedSource."""
    return np.asarray(self.contents, np.uint64)

  def digests(self) -> Mapping[str, str]:
    """Digests of images and of captions; see StoredSource."""
    captions = (captions for _, captions, _ in self.entries)
    return {
      'images': digest_of(len(self), *self.contents),
      'captions': digest_of(len(self), *captions),
    }


def record_id(name: str) -> str:
  """The record id of an image file in the folder."""
  return f'folder/{name}'


def group_of(name: str) -> str:
  """The class of an image file: the name of its subfolder; `folder` outside all subfolders."""
  return PurePosixPath(name).parent.name or 'folder'


def open_folder(path: str, options: ReadOptions = ReadOptions()) -> Folder:
  """Lists the images and captions of a folder, and checks its image files.

  See vpe_jax.data.formats.entries for the form of the folder. For edits, the caption of an image is
  the instruction. Hidden files are ignored.

  Args:
    path: the folder.
    options: how records are read; `open_image_folder` applies `held_out` and `split`. If `fields`
      requires no captions, text files are optional. Unusable records up to the share `most_skipped`
      are left out, with a warning that names them.

  Raises:
    UserError: the folder is missing or empty, too many records are unusable (the message names the
      first ones), or no record passes the filter.
  """
  folder = local_path(path)
  places, reasons, total = _accepted(folder, options)
  if not total:
    raise UserError(f'data folder {folder} has no images ({", ".join(sorted(ENDINGS))})')
  used = sorted(places)[: limited_count(len(places), options.count, path)]
  files = dict.fromkeys(name for image, _, source in used for name in (image, source) if name)
  criteria = options.record_filter
  is_filtered = bool(criteria.language or criteria.least_text_height)
  is_whole = len(used) == len(places) and not is_filtered
  checked = check_images(folder, list(files), options.decoding, is_whole)
  intact = []
  for names in used:
    bad = [name for name in (names[0], names[2]) if name in checked.reasons]
    if bad:
      reasons.append(_located(checked.reasons[bad[0]], places[names]))
    else:
      intact.append(names)
  _report_skipped(folder, reasons, total, options.most_skipped)
  if not intact:
    section = options.record_filter.section
    relax = f'passes {section}language and {section}least_text_height; relax them'
    cure = 'can be used' if reasons else relax
    raise UserError(f'data folder {folder}: none of its {total} records {cure}')
  contents = tuple(_content(entry, checked.contents) for entry in intact)
  return Folder(str(folder), tuple(intact), contents, options.decoding)


def _accepted(folder: Path, options: ReadOptions) -> tuple[dict[Names, str], list[str], int]:
  """Names and location of each record that passes, reasons of unusable ones, and the total."""
  accepted, reasons, total = {}, [], 0
  for names, values, where, reason in find_entries(folder, options.fields):
    total += 1
    try:
      if reason:
        raise BadRecord(reason)
      captions = ' '.join(names[1])
      if options.record_filter.passes(values, captions, folder / names[0], where):
        accepted.setdefault(names, where)
    except UserError as error:
      reasons.append(str(error))
  return accepted, reasons, total


def _located(reason: str, where: str) -> str:
  """The reason, after the line of the list that names the image.

  In a folder without a list, `where` is `image PATH`, which the reason names already.
  """
  return reason if where in reason else f'{where}: {reason}'


def _report_skipped(folder: Path, reasons: list[str], total: int, most_skipped: float) -> None:
  """Warns of unusable records.

  Raises:
    UserError: there are more than the share `most_skipped`.
  """
  if not reasons:
    return
  text = f'{len(reasons):,} of {total:,} records of data folder {folder} can not be used'
  if len(reasons) > most_skipped * total:
    raise UserError(f'{text}, more than data.most_skipped={most_skipped:g}: {listed(reasons)}')
  logging.warning('%s and are skipped: %s', text, listed(reasons))


def _content(names: Names, contents: Mapping[str, int]) -> int:
  """A hash of the image files of a record."""
  image, _, source = names
  return record_hash(contents[image], contents[source] if source else None)


def limited_count(total: int, count: int, path: str) -> int:
  """Number of records used of `total` with `data.examples=count` (0: all); warns if fewer."""
  if not 0 < count < total:
    return total
  logging.warning(
    'data folder %s: using only the first %d of %d images; --config.data.examples=0 uses all',
    path,
    count,
    total,
  )
  return count
