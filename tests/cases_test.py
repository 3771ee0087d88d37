"""Faulty inputs and their right outcomes: one row for each.

A row builds its input in a new folder, runs the product on it, and is right if the run is refused
in one line that matches `refused`, or if `accepted` holds for the result. To add a case, add a row.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tests.outcomes import refusal_of, result_of
from tests.small_pipelines import small_pipeline
from vpe_jax import storage
from vpe_jax.config import DataConfig
from vpe_jax.data import cache
from vpe_jax.data.formats import checks
from vpe_jax.data.formats.array_record import verify
from vpe_jax.data.preparing import Settings, prepare
from vpe_jax.data.records import Record
from vpe_jax.data.sources import open_source
from vpe_jax.evaluation import heldout
from vpe_jax.training import report, resume


@dataclasses.dataclass(frozen=True)
class Case:
  """A faulty input and its right outcome.

  Attributes:
    name: name of the case.
    build: writes the input to an empty folder.
    run: runs the product on that folder.
    refused: pattern of the one-line error; empty if the run must succeed.
    accepted: whether the result of a run is right.
  """

  name: str
  build: Callable[[Path], Any]
  run: Callable[[Path], Any]
  refused: str = ''
  accepted: Callable[[Any], bool] = lambda result: True


# Inputs.


def _png(level: int = 0, kind: str = 'PNG') -> bytes:
  content = io.BytesIO()
  Image.new('RGB', (16, 16), (level,) * 3).save(content, kind)
  return content.getvalue()


def _images(folder: Path, count: int = 10, endings: tuple[str, ...] = ('.jpg',)) -> None:
  """Images with a text file each."""
  for number in range(count):
    ending = endings[number % len(endings)]
    Image.new('RGB', (16, 16), (20 * number,) * 3).save(folder / f'{number:02d}{ending}')
    (folder / f'{number:02d}.txt').write_text(f'image {number}')


def _truncated(folder: Path, *names: str) -> None:
  _images(folder)
  for name in names or ('03.jpg',):
    (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def _cp1252(folder: Path) -> None:
  _images(folder)
  (folder / '04.txt').write_bytes('un café'.encode('cp1252'))


def _all_at_once(folder: Path) -> None:
  _truncated(folder, '01.jpg', '07.jpg')
  (folder / '04.txt').write_bytes('un café'.encode('cp1252'))


def _listed(folder: Path, *lines: Any, name: str = 'captions.jsonl') -> None:
  """Images, and a list of them with these lines."""
  _images(folder, max(2, len(lines)))
  for text in folder.glob('*.txt'):
    text.unlink()
  encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
  (folder / name).write_bytes(b'\n'.join(encoded))


def _line(number: int, **fields: Any) -> dict[str, Any]:
  return {'file': f'{number:02d}.jpg', 'caption': f'image {number}'} | fields


def _box(side: float) -> dict[str, Any]:
  """A text in the image with a square box."""
  return {'text': 'SALE', 'box': [0, 0, side, side]}


def _parquet(folder: Path, *captions: Any) -> None:
  """A file for each column of captions."""
  for number, column in enumerate(captions):
    images = [{'bytes': _png(10 * n), 'path': ''} for n in range(len(column))]
    table = pyarrow.table({'image': images, 'caption': column})
    parquet.write_table(table, folder / f'{number}.parquet')


def _tar(path: Path, count: int = 4, mode: str = 'w') -> int:
  """A tar file of images and captions; returns the offset of the middle header."""
  offset = 0
  with tarfile.open(path, mode) as tar:
    for number in range(count):
      for name, content in ((f'{number}.png', _png(number)), (f'{number}.txt', b'an image')):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        offset = tar.offset if number == count // 2 and name.endswith('png') else offset
        tar.addfile(member, io.BytesIO(content))
  return offset


def _damaged_header(folder: Path, **header: int) -> None:
  """A tar whose middle header is unreadable, or claims a size."""
  offset = _tar(folder / 'a.tar')
  content = bytearray((folder / 'a.tar').read_bytes())
  block = b'\xff' * 512
  if header:
    member = tarfile.TarInfo('2.png')
    member.size = header['size']
    block = member.tobuf(tarfile.GNU_FORMAT)
  content[offset : offset + 512] = block
  (folder / 'a.tar').write_bytes(content)


def _not_utf8(folder: Path) -> None:
  _images(folder)
  for ending in (b'.jpg', b'.txt'):
    os.rename(os.fsencode(folder) + b'/04' + ending, os.fsencode(folder) + b'/caf\xe9' + ending)


def _linked_subfolder(folder: Path) -> None:
  """Ten images, and links to a folder with five others and to the folder itself."""
  _images(folder)
  (folder.parent / 'others').mkdir()
  _images(folder.parent / 'others', 5)
  (folder / 'more').symlink_to(folder.parent / 'others')
  (folder / 'same').symlink_to(folder)


def _linked_tars(folder: Path, name: str = 'b.tar', mode: str = 'w') -> None:
  """A tar, and a link to a folder with another one."""
  (folder.parent / 'tars').mkdir()
  _tar(folder.parent / 'tars' / name, 3, mode)
  _tar(folder / 'a.tar')
  (folder / 'more').symlink_to(folder.parent / 'tars')


def _device(folder: Path) -> None:
  _listed(folder, _line(0), _line(1))
  (folder / '01.jpg').unlink()
  (folder / '01.jpg').symlink_to('/dev/null')


def _unreadable_results(folder: Path) -> None:
  """A folder in place of the file with results of earlier checks of the images."""
  _images(folder)
  name = f'{storage.stable_hash(folder.resolve()):016x}.u64'
  (storage.cache_dir() / checks.FOLDER / name).mkdir(parents=True)


def _repeated_column(folder: Path) -> None:
  columns = [pyarrow.array([_png()]), pyarrow.array(['a']), pyarrow.array(['b'])]
  table = pyarrow.Table.from_arrays(columns, names=['image', 'caption', 'caption'])
  parquet.write_table(table, folder / '0.parquet')


def _bomb(folder: Path) -> None:
  Image.new('1', (13_000, 13_000)).save(folder / 'x.png')
  (folder / 'x.txt').write_text('a small file of many pixels')


# Runs.


def _open(**fields: Any) -> Callable[[Path], list[Record]]:
  """The records of the folder, rendered once."""

  def run(folder: Path) -> list[Record]:
    records = list(open_source(DataConfig(source=f'folder:{folder}', **fields)))
    assert all(record.image.render(8).shape == (8, 8, 3) for record in records)
    return records

  return run


def _prepare(kind: str, most_skipped: float = 0.0) -> Callable[[Path], list[Record]]:
  """The records of the folder that is prepared from the input."""

  def run(folder: Path) -> list[Record]:
    to = folder.parent / 'prepared'
    prepare(Settings(f'{kind}:{folder}', shard_records=3), str(to), 0, most_skipped)
    return _open()(to)

  return run


def _drawn(records: list[Record], folder: Path) -> set[str]:
  """The captions of the first record that two epochs with the same seed draw."""
  config = DataConfig(source=f'folder:{folder}', image_size=8, text_length=8)
  pipelines = [small_pipeline(config, 1), small_pipeline(config, 1)]
  prompts = [[one.prompt_at(p) for p in range(40)] for one in pipelines]
  assert prompts[0] == prompts[1] and set(prompts[0]) <= {c for r in records for c in r.captions}
  return set(prompts[0])


def _draw_captions(prepared: bool) -> Callable[[Path], set[str]]:
  def run(folder: Path) -> set[str]:
    records = (_prepare('parquet') if prepared else _open())(folder)
    return _drawn(records, folder.parent / 'prepared' if prepared else folder)

  return run


def _captions(*expected: str) -> Callable[[list[Record]], bool]:
  return lambda records: [record.caption for record in records] == list(expected)


def _count(expected: int) -> Callable[[list[Record]], bool]:
  return lambda records: len(records) == expected


def _become_unreadable(folder: Path) -> list[int]:
  """Grey levels of two epochs, during which an image breaks."""
  config = DataConfig(source=f'folder:{folder}', image_size=8, text_length=8, most_skipped=0.1)
  pipeline = small_pipeline(config, 1)
  (folder / '05.jpg').write_bytes(b'none')
  with pipeline.batches(0, 10) as batches:
    return [int(image.mean()) for _ in range(2) for image in next(batches).inputs['image']]


def _change_between_calls(folder: Path) -> list[str]:
  digests = lambda: open_source(DataConfig(source=f'folder:{folder}')).digests()
  before = digests()
  (folder / '05.jpg').unlink()
  (folder / '05.txt').unlink()
  return resume.check_data(digests(), before, 'runs/mine', ('data.source',))


def _hold_out(folder: Path) -> list[Record]:
  config = DataConfig(source=f'folder:{folder}', held_out=3)
  assert heldout.has_split(config)
  return list(open_source(config, heldout.SPLIT))


def _stop_encoding(folder: Path) -> list[cache.Stored]:
  """Caches after an interruption and the next run."""

  def batches(start: int, end: int) -> Any:
    yield {'codes': np.arange(start, end)}
    if end < 9:
      raise KeyboardInterrupt

  fingerprint = json.dumps({'data': [str(folder)]})
  with pytest.raises(KeyboardInterrupt):
    cache.write_cache(fingerprint, lambda start: batches(start, 6), 4)
  (unfinished,) = cache.list_caches()
  assert (unfinished.complete, unfinished.records) == (False, 4)
  stored = cache.write_cache(fingerprint, lambda start: batches(start, 9), 4)
  assert [int(stored[i]['codes']) for i in range(9)] == list(range(9))
  return cache.list_caches()


CASES = (
  Case(
    'folder with avif',
    lambda folder: _images(folder, 4, ('.avif', '.jpg')),
    _open(),
    accepted=_count(4),
  ),
  Case('folder with truncated jpeg', _truncated, _open(), refused='1 of 10 .*03.jpg'),
  Case('folder with cp1252 caption', _cp1252, _open(), refused='1 of 10 .*04.txt.*UTF-8'),
  Case(
    'all faults of a folder at once',
    _all_at_once,
    _open(),
    refused='3 of 10 .*data.most_skipped=0.01(?=.*01.jpg)(?=.*04.txt)(?=.*07.jpg)',
  ),
  Case('faults up to a share are skipped', _all_at_once, _open(most_skipped=0.3),
       accepted=_count(7)),
  Case('a bad image in the middle of a run', _images, _become_unreadable,
       accepted=lambda levels: len(levels) == 20 and 100 not in levels),
  Case('lists of captions in parquet', lambda f: _parquet(f, [['a fox', 'a red fox']]),
       _draw_captions(True), accepted=lambda drawn: drawn == {'a fox', 'a red fox'}),
  Case('lists of captions in captions.jsonl', lambda f: _listed(f, _line(0, caption=['a', 'b'])),
       _draw_captions(False), accepted=lambda drawn: drawn == {'a', 'b'}),
  Case('categorical captions in parquet',
       lambda f: _parquet(f, pyarrow.array(['a fox', 'a dog']).dictionary_encode()),
       _prepare('parquet'), accepted=_captions('a fox', 'a dog')),
  Case('string_view captions in parquet',
       lambda f: _parquet(f, pyarrow.array(['a fox', 'a dog']).cast(pyarrow.string_view())),
       _prepare('parquet'), accepted=_captions('a fox', 'a dog')),
  Case('mixed types in parquet', lambda f: _parquet(f, ['a fox'], [3]), _prepare('parquet'),
       refused='column caption is int64 in .*1.parquet and string in .*0.parquet'),
  Case('a tar member of a huge size', lambda f: _damaged_header(f, size=3 * 2**30),
       _prepare('webdataset', 0.9), accepted=lambda records: len(records) >= 2),
  Case('a huge tar member is named', lambda f: _damaged_header(f, size=3 * 2**30),
       _prepare('webdataset'), refused='3,221,225,472 bytes'),
  Case('a tar damaged in its middle', _damaged_header, _prepare('webdataset', 0.9),
       accepted=_count(3)),
  Case('a damaged tar is named', _damaged_header, _prepare('webdataset'),
       refused='a.tar are damaged|has no .jpg'),
  Case('a compressed tar', lambda f: _tar(f / 'a.tar.gz', mode='w:gz'), _prepare('webdataset'),
       refused='a.tar.gz is compressed.*gunzip'),
  Case('a file name that is not UTF-8', _not_utf8, _open(), refused='1 of 10 .*file name.*UTF-8'),
  Case('a file name that is not UTF-8 to prepare', _not_utf8, _prepare('folder'),
       refused='1 of 10 .*file name.*UTF-8'),
  Case('a linked subfolder', _linked_subfolder, _open(), accepted=_count(15)),
  Case('a linked subfolder to prepare', _linked_subfolder, _prepare('folder'), accepted=_count(15)),
  Case('a linked folder of tars', _linked_tars, _prepare('webdataset'), accepted=_count(7)),
  Case('a linked folder of compressed tars', lambda f: _linked_tars(f, 'b.tar.gz', 'w:gz'),
       _prepare('webdataset'), refused='more/b.tar.gz is compressed'),
  Case('a device as an image', _device, _open(), refused='01.jpg is no regular file'),
  Case('a device as an image to prepare', _device, _prepare('folder'),
       refused='01.jpg is no regular file'),
  Case('results of checks that can not be read', _unreadable_results, _open(), accepted=_count(10)),
  Case('a repeated parquet column', _repeated_column, _prepare('parquet'),
       refused='0.parquet has several columns caption: rename all but one'),
  *(Case(f'a box of {name}', lambda f, side=side: _listed(f, _line(0, texts=[_box(side)])),
         _open(least_text_height=8), refused='line 1: "texts" must be a list')
    for name, side in (('many digits', 10**400), ('infinite size', float('inf')))),
  Case('a decompression bomb', _bomb, _open(),
       refused='x.png has 13,000 x 13,000 pixels.*most_pixels'),
  Case('a decompression bomb to prepare', _bomb, _prepare('folder'),
       refused='13,000 x 13,000 pixels.*most_pixels'),
  Case("Hugging Face's metadata.jsonl",
       lambda f: _listed(f, {'file_name': '01.jpg', 'text': 'a fox'}, name='metadata.jsonl'),
       _open(), accepted=_captions('a fox')),
  Case('an empty captions.jsonl', _listed, _open(), refused='captions.jsonl is empty.*delete'),
  Case('a numeric caption', lambda f: _listed(f, _line(0), _line(1, caption=7)), _open(),
       refused='line 2: "caption" is 7: write it as text'),
  Case('bad UTF-8 in captions.jsonl',
       lambda f: _listed(f, _line(0), b'{"file": "01.jpg", "caption": "caf\xe9"}'), _open(),
       refused='line 2 is not valid text.*UTF-8'),
  Case('a webdataset: source in a config', lambda f: None,
       lambda f: DataConfig(source=f'webdataset:{f}/*.tar'), refused='vpe_jax.prepare --source='),
  Case('a parquet: source in a config', lambda f: None, lambda f: DataConfig(source=f'parquet:{f}'),
       refused='vpe_jax.prepare --source='),
  Case('a long caption', lambda f: _listed(f, _line(0, caption='x ' * 5_000)),
       lambda f: report.sample_text(small_pipeline(DataConfig(source=f'folder:{f}')).examples([0]),
                                    _open()(f)[0].caption),
       accepted=lambda text: len(text) < 300),
  Case('verifying a folder that was never prepared', _images, lambda f: list(verify(f)),
       refused='was not prepared.*--source='),
  Case('data that change between calls', _images, _change_between_calls,
       refused='images: 10 .*now 9 .*--allow_change=data'),
  Case('own data with held-out images', _images, _hold_out, accepted=_count(3)),
  Case('encoding that is interrupted', lambda f: None, _stop_encoding,
       accepted=lambda caches: [(one.complete, one.records) for one in caches] == [(True, 9)]),
)  # fmt: skip


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name.replace(' ', '_'))
def test_cases(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'cache'))
  folder = tmp_path / 'input'
  folder.mkdir()
  case.build(folder)
  if case.refused:
    message = refusal_of(case.run, folder)
    assert re.search(case.refused, message), message
  else:
    result = result_of(case.run, folder)
    assert case.accepted(result), result
