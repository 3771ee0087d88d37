"""WebDataset tar files: members of a record, and damaged or hostile files."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.data.formats import webdataset
from vpe_jax.data.formats.entries import FieldSpec
from vpe_jax.data.inputs import RawRecord, UnusableRecord
from vpe_jax.data.preparing import Settings, prepare

FIELDS = FieldSpec()


def _png(colour='red', ending='png'):
  content = io.BytesIO()
  Image.new('RGB', (9, 6), colour).save(content, ending)
  return content.getvalue()


PNG = _png()


def _tar(path, members, **format):
  """Writes a tar file of (name, content) pairs or TarInfo members."""
  with tarfile.open(path, 'w', **format) as tar:
    for member in members:
      if isinstance(member, tarfile.TarInfo):
        tar.addfile(member)
        continue
      name, content = member
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def _read(path, fields=FIELDS):
  source = webdataset.open_tars(str(path), fields)
  return list(source.read(list(source.locations(path.parent))))


def _outcomes(records):
  return [
    (record.content.id, record.content.caption) if isinstance(record, RawRecord) else record.reason
    for record in records
  ]


def test_a_member_of_any_claimed_size_is_named_and_not_read(tmp_path):
  huge = tarfile.TarInfo('b.png')
  huge.size = 10**12
  path = _tar(tmp_path / 'a.tar', [('a.txt', b'a cat'), ('a.png', PNG), ('b.txt', b'x'), huge])
  first, second, *rest = _outcomes(_read(path))
  assert first == ('a/a', 'a cat')
  assert 'b in' in second and 'its .png has 1,000,000,000,000 bytes' in second
  assert len(rest) == 1 and 'can not be read to its end' in rest[0]


def test_members_with_one_stem_form_a_record(tmp_path):
  path = _tar(
    tmp_path / 'a.tar',
    [
      ('./cat/1.txt', ' a  cat\n\U0001f431'.encode()),
      ('./cat/1.PNG', PNG),
      ('./cat/1.json', b'{"caption": "not this record"}'),
      ('2.jpg', _png('blue', 'jpeg')),
      ('2.json', '{"prompt": ["two\u2028", "zwei"], "language": "en"}'.encode()),
      ('2.other.png', b'another'),
      ('._2.jpg', b'of a Mac'),
      ('noending', b'passed over'),
    ],
  )
  record, two = _read(path)
  assert _outcomes([record, two]) == [('a/cat/1', 'a cat \U0001f431'), ('a/2', 'two')]
  assert (record.content.group, two.content.group) == ('cat', 'webdataset')
  assert (record.content.captions, two.content.captions) == ((), ('two', 'zwei'))
  assert record.content.image == PNG and two.values[0]['language'] == 'en'


def test_fields_and_endings_are_chosen(tmp_path):
  members = [('1.after.png', PNG), ('1.png', b'before'), ('1.txt', b'text')]
  members.append(('1.json', b'{"caption": "usual", "long": "chosen"}'))
  path = _tar(tmp_path / 'a.tar', members)
  (record,) = _read(path, FieldSpec(True, True, 'after.png', 'long', 'png'))
  assert record.content.caption == 'chosen'
  assert (record.content.image, record.content.reference) == (PNG, b'before')
  (record,) = _read(path, FieldSpec(caption='txt'))
  assert record.content.caption == 'text'
  (record,) = _read(path, FieldSpec(True, True, reference='before.png'))
  assert 'has no .before.png, but .after.png, .png, .txt, .json' in record.reason


def test_duplicate_names_are_never_mixed_up(tmp_path):
  members = [('1.png', PNG), ('1.txt', b'record'), ('2.png', PNG), ('2.png', b'again')]
  members += [('2.txt', b'two'), ('3.png', PNG), ('3.txt', b'three'), ('1.png', PNG)]
  records = _outcomes(_read(_tar(tmp_path / 'a.tar', members)))
  assert records[0] == ('a/1', 'record') and records[2] == ('a/3', 'three')
  assert 'two members of' in records[1] and '2.png' in records[1]
  assert 'named 1' in records[3]


@pytest.mark.parametrize(
  'members, message',
  [
    ([('1.txt', b'x')], 'has no .jpg or .jpeg'),
    ([('1.png', PNG), ('1.txt', b'\xff\xfe')], 'utf-8'),
    ([('1.png', PNG), ('1.json', b'{"caption"')], 'delimiter'),
    ([('1.png', PNG), ('1.json', b'[' * 100_000)], 'recursion'),
    ([('1.png', PNG), ('1.json', b'["x"]')], 'its .json is not an object'),
    ([('1.png', PNG), ('1.txt', bytes((1 << 24) + 1))], 'its .txt has 16,777,217 bytes'),
  ],
)
def test_unusable_records_have_a_reason(tmp_path, members, message):
  (record,) = _read(_tar(tmp_path / 'a.tar', members))
  assert isinstance(record, UnusableRecord) and record.id == 'a/1' and message in record.reason


def test_member_names_are_never_paths(tmp_path, monkeypatch):
  """Absolute names, links and devices: nothing outside the tar file is read or written."""
  (tmp_path / 'secret.txt').write_text('secret')
  link = tarfile.TarInfo('3.txt')
  link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / 'secret.txt')
  hard = tarfile.TarInfo('3.caption')
  hard.type, hard.linkname = tarfile.LNKTYPE, '../secret.txt'
  device = tarfile.TarInfo('4.png')
  device.type = tarfile.CHRTYPE
  members = [(f'{tmp_path}/1.png', PNG), (f'{tmp_path}/1.txt', b'record')]
  members += [('../../2.png', PNG), ('../../2.txt', b'two')]
  members += [
    ('3.png', PNG),
    link,
    hard,
    device,
    (b'5\xff.png'.decode('utf-8', 'surrogateescape'), PNG),
  ]
  (tmp_path / 'in').mkdir()
  path = _tar(tmp_path / 'in' / 'a.tar', members)
  monkeypatch.chdir(tmp_path / 'in')
  records = _read(path, FieldSpec(captions=False))
  assert [record.content.caption for record in records] == ['record', 'two', '', '']
  assert records[0].content.id == f'a/{tmp_path}/1' and records[3].content.id == 'a/5\ufffd'
  prepare(Settings(f'webdataset:{path}', captions=False), str(tmp_path / 'to'))
  assert sorted(each.name for each in tmp_path.iterdir()) == ['in', 'secret.txt', 'to']
  assert [each.name for each in (tmp_path / 'in').iterdir()] == ['a.tar']


def test_truncated_and_damaged_files_keep_their_complete_records(tmp_path, caplog):
  members = [(f'{n}.{e}', PNG if e == 'png' else b'x') for n in range(4) for e in ('png', 'txt')]
  whole = _tar(tmp_path / 'a.tar', members, format=tarfile.GNU_FORMAT).read_bytes()
  for length, good in (
    (5 * 1024, 2),
    (4 * 1024 + 512, 2),
    (4 * 1024 + 530, 2),
    (3 * 1024, 1),
    (9, 0),
  ):
    (tmp_path / 'a.tar').write_bytes(whole[:length])
    records = _read(tmp_path / 'a.tar', FieldSpec(captions=False))
    assert sum(isinstance(record, RawRecord) for record in records) >= good
    assert 'can not be read to its end' in records[-1].reason
    assert 'a.tar' in caplog.records[-1].getMessage()
  (tmp_path / 'a.tar').unlink()
  with tarfile.open(tmp_path / 'a.tar', 'w:gz'):
    pass
  for name in ('a.tar', 'a.tar.gz'):
    (tmp_path / 'a.tar').rename(tmp_path / name)
    for path in (tmp_path / name, tmp_path):
      with pytest.raises(UserError, match=f'{name} is compressed.*gunzip'):
        _read(path)
    (tmp_path / name).rename(tmp_path / 'a.tar')


@pytest.mark.parametrize('damaged', [0, 7, 19])
def test_reading_continues_after_a_damaged_header(tmp_path, damaged):
  members = [(f'{n}.{e}', PNG if e == 'png' else b'x') for n in range(20) for e in ('png', 'txt')]
  path = _tar(tmp_path / 'a.tar', members, format=tarfile.GNU_FORMAT)
  content, place = bytearray(path.read_bytes()), damaged * 2048
  content[place : place + 20] = b'\xff' * 20
  path.write_bytes(content)
  records = _read(path)
  good = [record.content.id for record in records if isinstance(record, RawRecord)]
  assert good == [f'a/{n}' for n in range(20) if n != damaged]
  lost, without_image = (record.reason for record in records if isinstance(record, UnusableRecord))
  assert f'bytes {place:,} to {place + 1024:,} of {path} are damaged' in lost
  assert f'{damaged} in' in without_image


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_are_prepared_in_order(tmp_path, format):
  name = 'ä' * 40 if format == tarfile.USTAR_FORMAT else 'ä' * 200
  for part in (1, 0):
    members = []
    for number in range(5):
      members += [(f'{name}{number}.png', PNG), (f'{name}{number}.txt', b'%d' % number)]
    _tar(tmp_path / f'{part}.tar', members, format=format)
  manifest = prepare(Settings(f'webdataset:{tmp_path}', shard_records=3), str(tmp_path / 'to'))
  assert manifest.count == 10 and len(manifest.shards) == 4
  source = webdataset.open_tars(str(tmp_path / '?.tar'), FieldSpec())
  records = list(source.read(list(source.locations(tmp_path))))
  assert [record.content.id for record in records] == [
    f'{p}/{name}{n}' for p in (0, 1) for n in range(5)
  ]
  assert json.loads((tmp_path / 'to' / 'prepared.json').read_text())['captions']


def test_global_headers_are_no_damage(tmp_path, caplog):
  members = [('1.png', PNG), ('1.txt', b'one')]
  pax = {'format': tarfile.PAX_FORMAT, 'pax_headers': {'comment': 'x' * 2000}}
  content = _tar(tmp_path / 'a.tar', members, **pax).read_bytes()
  members = [('2.png', PNG), ('2.txt', b'two')]
  content += _tar(tmp_path / 'a.tar', members, **pax).read_bytes()
  (tmp_path / 'a.tar').write_bytes(content)
  assert _outcomes(_read(tmp_path / 'a.tar')) == [('a/1', 'one'), ('a/2', 'two')]
  assert not caplog.records


def test_a_tar_file_without_members_is_intact(tmp_path, caplog):
  path = _tar(tmp_path / 'a.tar', [])
  assert not _read(path) and not caplog.records
  path.write_bytes(bytes(1 << 20))  # space that a download reserved
  (record,) = _read(path)
  assert 'not an uncompressed tar file' in record.reason


def test_an_empty_text_member_leaves_the_caption_to_the_json_member(tmp_path):
  members = [('1.png', PNG), ('1.txt', b' \n'), ('1.json', b'{"caption": "a cat"}')]
  assert _outcomes(_read(_tar(tmp_path / 'a.tar', members))) == [('a/1', 'a cat')]


def test_a_file_that_disappears_before_it_is_read(tmp_path):
  path = _tar(tmp_path / 'a.tar', [('1.png', PNG)])
  source = webdataset.open_tars(str(path), FieldSpec())
  locations = list(source.locations(tmp_path))
  path.unlink()
  (record,) = source.read(locations)
  assert isinstance(record, UnusableRecord) and record.id == 'a/1'
