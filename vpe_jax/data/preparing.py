"""Writes a prepared folder (formats/array_record.py) from any input (vpe_jax.data.inputs).

The locations of an input are divided into chunks of equal length. A pool of processes writes each
chunk as one shard: first under a temporary name, then renamed, then described by a summary file.
After an interruption, complete shards have summaries, and the same command writes only the others.
The manifest, which marks the folder as prepared, is written last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vpe_jax import storage
from vpe_jax.config import FITS, FOLDER, TFDS, check, did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.array_record import (
  HASHES,
  MANIFEST,
  Content,
  Manifest,
  Shard,
  Writer,
  read_manifest,
)
from vpe_jax.data.formats.checks import content_hash, record_hash
from vpe_jax.data.formats.entries import FieldSpec, abbreviated, check_caption, check_text
from vpe_jax.data.formats.folder import ReadOptions
from vpe_jax.data.formats.parquet import open_parquet
from vpe_jax.data.formats.tfds import open_tfds
from vpe_jax.data.formats.webdataset import open_tars
from vpe_jax.data.inputs import (
  Input,
  Location,
  RawRecord,
  TfdsInput,
  UnusableRecord,
  open_folder_input,
)
from vpe_jax.data.transforms import Decoding

SKIPPED = 'skipped.jsonl'
WEBDATASET = 'webdataset:'
PARQUET = 'parquet:'
KINDS = (FOLDER, WEBDATASET, PARQUET, TFDS)
SHARD_RECORDS = 8192  # about 400 MB with images of 50 kB (512 pixels)
_WORK_FOLDER = 'preparing'  # folder of settings, summaries and unfinished shards
_SETTINGS = 'settings.json'
_QUEUED = 2  # shards submitted beyond the number of processes


@dataclasses.dataclass(frozen=True)
class Settings:
  """Options that determine the content of a prepared folder; see the flags of vpe_jax.prepare.

  Attributes:
    source: one of KINDS, followed by a path or name.
    root: folder of `tfds:` data sets.
    captions: whether each record must have a caption.
    image: field, column or ending of the image; '' for the default names of each kind.
    caption: the same for the caption.
    reference: the same for the source image of an edit; '' for none.
    language: see vpe_jax.data.filters for this and the next three.
    least_text_height: in pixels.
    image_size: side of the square in which `least_text_height` is measured.
    fit: how images become square.
    count: use only the first `count` input records, counted before filters; 0 for all.
    shard_records: number of input records for each shard.
    most_pixels: pixels of the largest image that is not unusable.
    most_bytes: size of its largest file.

  Raises:
    UserError: `fit` is unknown.
  """

  source: str
  root: str = 'data'
  captions: bool = True
  image: str = ''
  caption: str = ''
  reference: str = ''
  language: str = ''
  least_text_height: int = 0
  image_size: int = 64
  fit: str = 'pad'
  count: int = 0
  shard_records: int = SHARD_RECORDS
  most_pixels: int = Decoding.most_pixels
  most_bytes: int = Decoding.most_bytes

  def __post_init__(self) -> None:
    check(self, '', 'fit', self.fit in FITS, f'one of {", ".join(FITS)}')

  @property
  def record_filter(self) -> Filter:
    """The filter that records must pass."""
    return Filter(self.language, self.least_text_height, self.image_size, self.fit)

  @property
  def decoding(self) -> Decoding:
    """How image files are decoded."""
    return Decoding(self.fit, self.most_pixels, self.most_bytes)


def _why_none(summaries: Sequence[ShardSummary]) -> str:
  """Why no record was written, as the end of an error message; '' without any image."""
  skipped = [record for summary in summaries for record in summary.skipped]
  processed = sum(summary.locations for summary in summaries)
  if not processed:
    return ''
  if len(skipped) == processed:
    return f': none is usable; the first: {abbreviated(skipped[0][0])}: {skipped[0][1]}'
  return ': none passes --language and --least_text_height; relax them'


@dataclasses.dataclass(frozen=True)
class ShardSummary:
  """Summary of a shard and of the input records that are not in it.

  Attributes:
    shard: the file; None if no record was written.
    locations: number of input records.
    captionless: number of written records without a caption.
    skipped: id and reason of each unusable record.
    digest: hash of the locations, to detect that the input changed.
  """

  shard: Shard | None
  locations: int
  captionless: int
  skipped: tuple[tuple[str, str], ...]
  digest: str


def open_input(settings: Settings) -> Input:
  """The input that the settings name.

  Raises:
    UserError: the kind is unknown, or the input can't be read.
  """
  name, _, path = settings.source.partition(':')
  kind = f'{name}:'
  fields = FieldSpec(
    settings.captions,
    bool(settings.reference),
    settings.image,
    settings.caption,
    settings.reference,
  )
  if not path or kind not in KINDS:
    hint = '' if kind in KINDS else did_you_mean(kind, KINDS)
    raise UserError(
      f'--source={settings.source}: write {", ".join(KINDS)} followed by a path or name{hint}'
    )
  if kind == FOLDER:
    return open_folder_input(path, fields, settings.decoding)
  if kind == WEBDATASET:
    return open_tars(path, fields, settings.decoding)
  if kind == PARQUET:
    return open_parquet(path, fields, settings.decoding)
  return TfdsInput(open_tfds(path, settings.root, ReadOptions(fields, decoding=settings.decoding)))


def is_complete(to: str) -> bool:
  """Whether a folder is completely prepared."""
  return (storage.local_path(to) / MANIFEST).exists()


def prepare(settings: Settings, to: str, workers: int = 0, most_skipped: float = 0.01) -> Manifest:
  """Writes a prepared folder, or the missing shards of an unfinished one.

  Args:
    settings: options that determine the content.
    to: the folder: new, empty, or unfinished with the same settings.
    workers: number of processes that read and write; 0 uses this process only.
    most_skipped: maximum share of unusable records, which are listed in SKIPPED.

  Returns:
    The manifest.

  Raises:
    UserError: the input or the folder can't be used, or too many records are unusable.
  """
  folder = storage.local_path(to)
  if not is_complete(to):
    work = _create_work_folder(folder, settings)
    with _locked(work / _SETTINGS):
      try:
        _write(settings, folder, workers, most_skipped)
      except UserError:
        # No shard is written yet: clear the folder, so that a retry may have other settings.
        if {path.name for path in folder.iterdir()} == {_WORK_FOLDER}:
          for path in work.iterdir():
            if path.name != SKIPPED:  # The error refers to this file.
              path.unlink()
        raise
  manifest, _ = read_manifest(folder)
  _check_settings(folder, manifest.settings, settings)
  shutil.rmtree(folder / _WORK_FOLDER, ignore_errors=True)
  return manifest


def _create_work_folder(folder: Path, settings: Settings) -> Path:
  """Creates the work folder and stores the settings; rejects a folder with other files."""
  work = folder / _WORK_FOLDER
  settings_file = work / _SETTINGS
  if settings_file.exists():
    try:
      old = json.loads(settings_file.read_bytes())
    except (OSError, ValueError) as error:
      raise UserError(f'{settings_file} can not be read ({error}): choose another --to') from error
    _check_settings(folder, old, settings)
    return work
  with storage.writing(folder):
    if folder.exists() and {path.name for path in folder.iterdir()} - {_WORK_FOLDER}:
      raise UserError(f'{folder} has files that this command did not write: choose another --to')
    work.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(settings_file, json.dumps(dataclasses.asdict(settings), indent=1).encode())
  return work


def _check_settings(folder: Path, old: dict[str, Any], settings: Settings) -> None:
  """Rejects a folder that was started with other settings."""
  new = dataclasses.asdict(settings)
  # Settings that did not exist when the folder was started had their defaults.
  old = {f.name: f.default for f in dataclasses.fields(settings) if f.name != 'source'} | old
  if old == new:
    return
  changed = [f'{k}={old.get(k)!r}, now {new[k]!r}' for k in new if old.get(k) != new[k]]
  raise UserError(
    f'{folder} was started with other settings ({"; ".join(changed)}): choose another --to'
  )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Holds an exclusive file lock, which the system releases even if the process dies."""
  with path.open('rb') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f'another command is writing to {path.parent.parent}: wait for it') from error
    yield


def _write(settings: Settings, folder: Path, workers: int, most_skipped: float) -> None:
  """Writes all shards, the list of unusable records, and the manifest."""
  source = open_input(settings)
  total = source.count()
  if settings.count and total:
    total = min(total, settings.count)
  summaries: list[ShardSummary] = []
  processed = skipped = 0
  with tqdm(total=total, desc='preparing', unit='image') as bar:
    for summary in _summaries(settings, source, folder, workers):
      summaries.append(summary)
      processed, skipped = processed + summary.locations, skipped + len(summary.skipped)
      bar.update(summary.locations)
      # Fail early: if no record is usable so far, or if the limit is certain to be exceeded.
      none_usable = len(summary.skipped) == processed and most_skipped < 1
      if none_usable or skipped > most_skipped * (total or math.inf):
        break
  # Without a shard, the list goes to the work folder: the output folder stays free for other
  # settings.
  list_folder = folder if any(summary.shard for summary in summaries) else folder / _WORK_FOLDER
  _write_skipped(list_folder, summaries)
  if skipped > most_skipped * processed:
    name, reason = next(bad for summary in summaries for bad in summary.skipped)
    raise UserError(
      f'{skipped:,} of {processed:,} images are unusable, more than --most_skipped={most_skipped}; '
      f'the first: {abbreviated(name)}: {reason} (all: {list_folder / SKIPPED})'
    )
  shards = tuple(summary.shard for summary in summaries if summary.shard is not None)
  records = sum(shard.records for shard in shards)
  if not records:
    raise UserError(f'{settings.source} has {processed:,} images{_why_none(summaries)}')
  manifest = Manifest(
    shards,
    captions=not any(summary.captionless for summary in summaries),
    references=bool(settings.reference),
    language=settings.language,
    least_text_height=settings.least_text_height,
    image_size=settings.image_size,
    fit=settings.fit,
    settings=dataclasses.asdict(settings),
    left_out=processed - skipped - records,
    skipped=skipped,
    hashes_crc32=_join_hashes(folder, summaries),
  )
  with storage.writing(folder):
    storage.write_atomic(folder / MANIFEST, manifest.to_json().encode())


def _join_hashes(folder: Path, summaries: Sequence[ShardSummary]) -> int:
  """Joins the hashes of all shards in one file; returns its CRC-32."""
  with storage.writing(folder), (folder / HASHES).open('wb') as file:
    for number, summary in enumerate(summaries):
      if summary.shard is not None:
        file.write(_hashes_path(folder, number).read_bytes())
  return storage.checksum(folder / HASHES)


def _write_skipped(folder: Path, summaries: Sequence[ShardSummary]) -> None:
  """Writes the list of unusable records, if any."""
  lines = [
    {'id': name, 'reason': reason} for summary in summaries for name, reason in summary.skipped
  ]
  with storage.writing(folder):
    if lines:
      content = ''.join(json.dumps(line) + '\n' for line in lines)
      storage.write_atomic(folder / SKIPPED, content.encode())
    else:
      (folder / SKIPPED).unlink(missing_ok=True)  # of an earlier call


def _summaries(
  settings: Settings, source: Input, folder: Path, workers: int
) -> Iterator[ShardSummary]:
  """Yields the summary of each shard, in order, once the shard is complete."""
  jobs = (
    (number, locations, _digest(locations))
    for number, locations in _shard_locations(settings, source, folder / _WORK_FOLDER)
  )
  if not workers:
    for number, locations, digest in jobs:
      yield _read_summary(folder, number, digest) or _write_shard(
        settings, source, folder, number, locations
      )
    return
  context = multiprocessing.get_context('spawn')
  pool = ProcessPoolExecutor(
    workers, context, initializer=_exit_with_parent, initargs=(os.getpid(),)
  )
  pending: deque[Future[ShardSummary]] = deque()
  try:
    for number, locations, digest in jobs:
      if summary := _read_summary(folder, number, digest):
        pending.append(Future())
        pending[-1].set_result(summary)
      else:
        pending.append(pool.submit(_write_shard, settings, source, folder, number, locations))
      if len(pending) >= workers + _QUEUED:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  except BrokenProcessPool as error:
    raise UserError(
      'a worker process was killed, probably for lack of memory: repeat the command with fewer '
      '--workers; it continues where it stopped'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _exit_with_parent(parent: int) -> None:
  """Initializes a pool process: it exits silently on Ctrl-C, and when its parent process ends.

  The parent reports the error; once it is gone, nothing uses the shards of the pool.
  """
  signal.signal(signal.SIGINT, signal.SIG_DFL)

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1.0)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _shard_locations(
  settings: Settings, source: Input, work: Path
) -> Iterator[tuple[int, list[Location]]]:
  """(number, locations of the records) of each shard."""
  locations = itertools.islice(source.locations(work), settings.count or None)
  for number in itertools.count():
    run = list(itertools.islice(locations, settings.shard_records))
    if not run:
      return
    yield number, run


def _digest(locations: Sequence[Location]) -> str:
  return hashlib.blake2b(json.dumps(locations).encode(), digest_size=16).hexdigest()


def _read_summary(folder: Path, number: int, digest: str) -> ShardSummary | None:
  """The summary of a complete shard with these locations; None if there is none."""
  try:
    values = json.loads(_summary_path(folder, number).read_bytes())
    shard = values.pop('shard')
    summary = ShardSummary(Shard(**shard) if shard else None, **values)
    size = summary.shard and (folder / summary.shard.file).stat().st_size
    hashes = summary.shard and _hashes_path(folder, number).stat().st_size // 8
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
  ):  # Absent or incomplete: the shard is written again.
    return None
  shard = summary.shard
  complete = shard is None or (size, hashes) == (shard.bytes, shard.records)
  return summary if complete and summary.digest == digest else None


def _summary_path(folder: Path, number: int) -> Path:
  return folder / _WORK_FOLDER / f'{number:05d}.json'


def _hashes_path(folder: Path, number: int) -> Path:
  return folder / _WORK_FOLDER / f'{number:05d}.u64'


def _write_shard(
  settings: Settings, source: Input, folder: Path, number: int, locations: Sequence[Location]
) -> ShardSummary:
  """Writes a shard and its summary.

  Raises:
    UserError: a file can't be written.
  """
  name = f'images-{number:05d}.array_record'
  part = folder / _WORK_FOLDER / f'{name}.{os.getpid()}.part'
  skipped: list[tuple[str, str]] = []
  captionless, hashes = 0, []
  with storage.writing(folder), Writer(part) as writer:
    for record in source.read(locations):
      try:
        if isinstance(record, UnusableRecord):
          skipped.append((record.id, record.reason))
        elif _passes_filters(settings, record):
          writer.write(record.content)
          captionless += not record.content.caption
          hashes.append(_hash(record.content))
      except UserError as error:
        skipped.append((record.content.id, str(error)))
  with storage.writing(folder):
    shard = None
    if writer.records:
      shard = Shard(name, writer.records, part.stat().st_size, storage.checksum(part))
      part.replace(folder / name)
      storage.write_atomic(_hashes_path(folder, number), np.asarray(hashes, '<u8').tobytes())
    else:
      part.unlink()
    summary = ShardSummary(shard, len(locations), captionless, tuple(skipped), _digest(locations))
    values = json.dumps(dataclasses.asdict(summary))
    storage.write_atomic(_summary_path(folder, number), values.encode())
  return summary


def _hash(content: Content) -> int:
  reference = content_hash(content.reference) if content.reference else None
  return record_hash(content_hash(content.image), reference)


def _passes_filters(settings: Settings, record: RawRecord) -> bool:
  """Checks a record completely; returns whether the filters accept it.

  Raises:
    UserError: the record is unusable.
  """
  content, decoding, where = record.content, settings.decoding, record.where
  captions = ' '.join(content.captions or [content.caption])
  check_text(content.id, where, 'name')
  if settings.captions and not content.caption:
    raise UserError(
      f'{where} has no caption (--caption=NAME names its field; --nocaptions allows none)'
    )
  for caption in content.captions or [content.caption]:
    check_caption(caption, where)
  if not any(
    settings.record_filter.passes(values, captions, io.BytesIO(content.image), where)
    for values in record.values
  ):
    return False
  decoding.check(content.image, where)
  if settings.reference:
    decoding.check(content.reference, f'{where}, source image')
  return True
