"""Writes a prepared folder (formats/array_record.py) from any input (vpe_jax.data.inputs).

The places of an input are cut into runs of equal length, each of which becomes a shard, in a
process of its own. A shard is written beside and renamed when it is whole; then a note is written
of what it holds. A call that is killed leaves whole shards and their notes, and the next one with
the same settings writes the others. The manifest, by which a folder is a prepared one, comes last.
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

from tqdm import tqdm

from vpe_jax import storage
from vpe_jax.config import FOLDER, TFDS, nearest
from vpe_jax.contracts import UserError
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats.array_record import MANIFEST, Manifest, Shard, Writer, read_manifest
from vpe_jax.data.formats.folder import FieldSpec, valid
from vpe_jax.data.formats.parquet import open_parquet
from vpe_jax.data.formats.tfds import open_tfds
from vpe_jax.data.formats.webdataset import open_tars
from vpe_jax.data.inputs import RawRecord, Input, Location, TfdsInput, UnusableRecord, open_folder_input
from vpe_jax.data.transforms import read_image

SKIPPED = 'skipped.jsonl'
WEBDATASET = 'webdataset:'
PARQUET = 'parquet:'
KINDS = (FOLDER, WEBDATASET, PARQUET, TFDS)
SHARD_RECORDS = 8192  # pictures of some 512 pixels and 50 kB: 400 MB
_WORK = 'preparing'  # folder of settings, notes and files that aren't whole
_SETTINGS = 'settings.json'
_AHEAD = 2  # shards that wait for a process
_LONGEST = 100_000  # letters of a caption; a longer one is a mistake, and slow to read each time


@dataclasses.dataclass(frozen=True)
class Settings:
  """Options that decide the content of a prepared folder; see the flags of vpe_jax.prepare.

  Attributes:
    source: one of KINDS and where it is.
    root: where the data sets of `tfds:` are.
    captions: whether each picture must have a caption.
    image: field, column or ending of the picture; '' for the usual ones, which each kind names.
    caption: of the caption.
    reference: of the picture before an edit; '' for none.
    language: see vpe_jax.data.filters for this and the next three.
    least_text_height: in pixels.
    image_size: side of the square that `least_text_height` is measured in.
    fit: how a picture becomes that square.
    count: pictures that are taken from the input, the first ones, before filters; 0 for all.
    shard_records: pictures of the input that make a shard.
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

  @property
  def keep(self) -> Filter:
    """Which records are kept."""
    return Filter(self.language, self.least_text_height, self.image_size, self.fit)


@dataclasses.dataclass(frozen=True)
class ShardNote:
  """Content of a shard, and the records left out of it.

  Attributes:
    shard: the file; None where none of its pictures is kept.
    places: pictures of the input that it was made from.
    captionless: records without a caption.
    skipped: id and reason of each picture that can't be used.
    digest: of the places, which another input would change.
  """

  shard: Shard | None
  places: int
  captionless: int
  skipped: tuple[tuple[str, str], ...]
  digest: str


def open_input(settings: Settings) -> Input:
  """The input that settings name.

  Raises:
    UserError: there is none of that kind, or it can't be read.
  """
  kind, _, place = settings.source.partition(':')
  fields = FieldSpec(
    settings.captions,
    bool(settings.reference),
    settings.image,
    settings.caption,
    settings.reference,
  )
  if not place or f'{kind}:' not in KINDS:
    hint = '' if f'{kind}:' in KINDS else nearest(f'{kind}:', KINDS)
    raise UserError(
      f'--source={settings.source}: write {", ".join(KINDS)} and where the pictures are{hint}'
    )
  if f'{kind}:' == FOLDER:
    return open_folder_input(place, fields)
  if f'{kind}:' == WEBDATASET:
    return open_tars(place, fields)
  if f'{kind}:' == PARQUET:
    return open_parquet(place, fields)
  return TfdsInput(open_tfds(place, settings.root, 0, fields, settings.fit))


def prepare(settings: Settings, to: str, workers: int = 0, max_skipped: float = 0.01) -> Manifest:
  """Writes a prepared folder, or what is still missing of one.

  Args:
    settings: what to write.
    to: the folder: new, empty, or left by an earlier call with the same settings.
    workers: processes that read and write; 0 for this one alone.
    max_skipped: share of the pictures that may be unusable. They are listed in SKIPPED.

  Returns:
    What it holds.

  Raises:
    UserError: the input or the folder can't be used, or too many pictures can't.
  """
  folder = storage.local(to)
  if not (folder / MANIFEST).exists():
    work = _claim(folder, settings)
    with _locked(work / _SETTINGS):
      try:
        _write(settings, folder, workers, max_skipped)
      except UserError:
        # No picture is written yet, so the corrected call may have other settings.
        if {path.name for path in folder.iterdir()} == {_WORK}:
          for path in work.iterdir():
            if path.name != SKIPPED:  # Which the error names.
              path.unlink()
        raise
  manifest, _ = read_manifest(folder)
  _check_same(folder, manifest.settings, settings)
  shutil.rmtree(folder / _WORK, ignore_errors=True)
  return manifest


def _claim(folder: Path, settings: Settings) -> Path:
  """Makes the folder ours, if nobody else's files are in it; returns where unfinished files go."""
  work = folder / _WORK
  stored = work / _SETTINGS
  if stored.exists():
    try:
      begun = json.loads(stored.read_bytes())
    except (OSError, ValueError) as error:
      raise UserError(f'{stored} can not be read ({error}): choose another --to') from error
    _check_same(folder, begun, settings)
    return work
  with storage.writing(folder):
    if folder.exists() and {path.name for path in folder.iterdir()} - {_WORK}:
      raise UserError(f'{folder} has files that are not of this command: choose another --to')
    work.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(stored, json.dumps(dataclasses.asdict(settings), indent=1).encode())
  return work


def _check_same(folder: Path, old: dict[str, Any], settings: Settings) -> None:
  """Refuses to go on, or to be done already, with other settings."""
  new = dataclasses.asdict(settings)
  if old == new:
    return
  changed = [f'{k}={old.get(k)!r}, now {new[k]!r}' for k in new if old.get(k) != new[k]]
  raise UserError(
    f'{folder} was begun with other settings ({"; ".join(changed)}): choose another --to'
  )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Keeps a second call out while the block runs, however it ends."""
  with path.open('rb') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f'another call is writing to {path.parent.parent}: wait for it') from error
    yield


def _write(settings: Settings, folder: Path, workers: int, max_skipped: float) -> None:
  """Writes all shards, the list of what was skipped, and the manifest."""
  source = open_input(settings)
  total = source.count()
  if settings.count and total:
    total = min(total, settings.count)
  notes: list[ShardNote] = []
  seen = skipped = 0
  with tqdm(total=total, desc='preparing', unit='picture') as bar:
    for note in _notes(settings, source, folder, workers):
      notes.append(note)
      seen, skipped = seen + note.places, skipped + len(note.skipped)
      bar.update(note.places)
      # Not after a night: where it is certain already, or looks like a mistake in the flags.
      hopeless = len(note.skipped) == seen and max_skipped < 1
      if hopeless or skipped > max_skipped * (total or math.inf):
        break
  # A list alone would take the folder for these settings; one that is there is the user's.
  listed = folder if any(note.shard for note in notes) else folder / _WORK
  _write_skipped(listed, notes)
  if skipped > max_skipped * seen:
    name, reason = next(bad for note in notes for bad in note.skipped)
    raise UserError(
      f'{skipped:,} of {seen:,} pictures can not be used, more than --max_skipped={max_skipped}; '
      f'the first: {name}: {reason} (all: {listed / SKIPPED})'
    )
  shards = tuple(note.shard for note in notes if note.shard is not None)
  records = sum(shard.records for shard in shards)
  if not records:
    filters = 'none passes --language and --least_text_height; ask for less'
    raise UserError(f'{settings.source} has {seen:,} pictures{seen and ": " + filters or ""}')
  manifest = Manifest(
    shards,
    captions=not any(note.captionless for note in notes),
    references=bool(settings.reference),
    language=settings.language,
    least_text_height=settings.least_text_height,
    image_size=settings.image_size,
    fit=settings.fit,
    settings=dataclasses.asdict(settings),
    left_out=seen - skipped - records,
    skipped=skipped,
  )
  with storage.writing(folder):
    storage.write_atomic(folder / MANIFEST, manifest.to_json().encode())


def _write_skipped(folder: Path, notes: Sequence[ShardNote]) -> None:
  """Lists what can't be used, if anything."""
  listed = [{'id': name, 'reason': reason} for note in notes for name, reason in note.skipped]
  with storage.writing(folder):
    if listed:
      content = ''.join(json.dumps(line) + '\n' for line in listed)
      storage.write_atomic(folder / SKIPPED, content.encode())
    else:
      (folder / SKIPPED).unlink(missing_ok=True)  # of an earlier call


def _notes(settings: Settings, source: Input, folder: Path, workers: int) -> Iterator[ShardNote]:
  """A note of each shard in turn, once it is whole."""
  jobs = (
    (number, places, _digest(places)) for number, places in _runs(settings, source, folder / _WORK)
  )
  if not workers:
    for number, places, digest in jobs:
      yield _note(folder, number, digest) or _write_shard(settings, source, folder, number, places)
    return
  context = multiprocessing.get_context('spawn')
  pool = ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(os.getpid(),))
  waiting: deque[Future[ShardNote]] = deque()
  try:
    for number, places, digest in jobs:
      if whole := _note(folder, number, digest):
        waiting.append(Future())
        waiting[-1].set_result(whole)
      else:
        waiting.append(pool.submit(_write_shard, settings, source, folder, number, places))
      if len(waiting) >= workers + _AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  except BrokenProcessPool as error:
    raise UserError(
      'a process that writes shards was killed, for want of memory as a rule: the same command '
      'goes on from there; give it fewer --workers'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _end_with(first: int) -> None:
  """Lets a process of the pool end with Ctrl-C, without a word, and with the first process.

  That says what there is to say; where it was killed, nobody waits for what the others write.
  """
  signal.signal(signal.SIGINT, signal.SIG_DFL)

  def watch() -> None:
    while os.getppid() == first:
      time.sleep(1.0)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _runs(settings: Settings, source: Input, work: Path) -> Iterator[tuple[int, list[Location]]]:
  """The places of each shard, numbered."""
  places = itertools.islice(source.places(work), settings.count or None)
  for number in itertools.count():
    run = list(itertools.islice(places, settings.shard_records))
    if not run:
      return
    yield number, run


def _digest(places: Sequence[Location]) -> str:
  return hashlib.blake2b(json.dumps(places).encode(), digest_size=16).hexdigest()


def _note(folder: Path, number: int, digest: str) -> ShardNote | None:
  """The note of a shard that is whole and of these places, if it is."""
  try:
    values = json.loads(_note_path(folder, number).read_bytes())
    shard = values.pop('shard')
    note = ShardNote(Shard(**shard) if shard else None, **values)
    size = note.shard and (folder / note.shard.file).stat().st_size
  except (OSError, ValueError, KeyError, TypeError):  # Absent, or not whole: written again.
    return None
  whole = note.shard is None or size == note.shard.bytes
  return note if whole and note.digest == digest else None


def _note_path(folder: Path, number: int) -> Path:
  return folder / _WORK / f'{number:05d}.json'


def _write_shard(
  settings: Settings, source: Input, folder: Path, number: int, places: Sequence[Location]
) -> ShardNote:
  """Writes a shard and its note.

  Raises:
    UserError: it can't be written.
  """
  name = f'pictures-{number:05d}.array_record'
  part = folder / _WORK / f'{name}.{os.getpid()}.part'
  skipped: list[tuple[str, str]] = []
  captionless = 0
  with storage.writing(folder), Writer(part) as writer:
    for found in source.read(places):
      try:
        if isinstance(found, UnusableRecord):
          skipped.append((found.id, found.reason))
        elif _is_kept(settings, found):
          writer.write(found.content)
          captionless += not found.content.caption
      except UserError as error:
        skipped.append((found.content.id, str(error)))
  with storage.writing(folder):
    shard = None
    if writer.records:
      shard = Shard(name, writer.records, part.stat().st_size, storage.checksum(part))
      part.replace(folder / name)
    else:
      part.unlink()
    note = ShardNote(shard, len(places), captionless, tuple(skipped), _digest(places))
    values = json.dumps(dataclasses.asdict(note))
    storage.write_atomic(_note_path(folder, number), values.encode())
  return note


def _is_kept(settings: Settings, found: RawRecord) -> bool:
  """Whether the filters keep a picture.

  Raises:
    UserError: it can't be used.
  """
  content, keep, where = found.content, settings.keep, found.where
  valid(content.id, where, 'name')
  if settings.captions and not content.caption:
    raise UserError(
      f'{where} has no caption (--caption=NAME: where it is; --nocaptions: for classes alone)'
    )
  if len(valid(content.caption, where)) > _LONGEST:
    raise UserError(f'{where}: the caption has {len(content.caption):,} letters')
  image = lambda: io.BytesIO(content.image)
  if not any(keep.passes(values, content.caption, image(), where) for values in found.values):
    return False
  read_image(image(), where)
  if settings.reference:
    read_image(io.BytesIO(content.reference), f'{where}, the one before')
  return True
