"""WebDataset's tars: which members make a record, and tars that are damaged or hostile."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from PIL import Image

from vpe_jax.data.formats import webdataset
from vpe_jax.data.formats.folder import FieldSpec
from vpe_jax.data.inputs import RawRecord, UnusableRecord
from vpe_jax.data.preparing import Settings, prepare

ASKED = FieldSpec()


def _picture(colour='red', ending='png'):
  content = io.BytesIO()
  Image.new('RGB', (9, 6), colour).save(content, ending)
  return content.getvalue()


PICTURE = _picture()


def _tar(path, members, **format):
  """Writes a tar of (name, content) or of what tarfile takes for a member."""
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


def _read(path, fields=ASKED):
  source = webdataset.open_tars(str(path), fields)
  return list(source.read(list(source.places(path.parent))))


def _said(found):
  return [
    (one.content.id, one.content.caption) if isinstance(one, RawRecord) else one.reason
    for one in found
  ]


def test_members_of_one_name_are_a_record(tmp_path):
  path = _tar(
    tmp_path / 'a.tar',
    [
      ('./cat/1.txt', ' a  cat\n\U0001f431'.encode()),
      ('./cat/1.PNG', PICTURE),
      ('./cat/1.json', b'{"caption": "not this one"}'),
      ('2.jpg', _picture('blue', 'jpeg')),
      ('2.json', '{"prompt": "two\u2028", "language": "en"}'.encode()),
      ('2.other.png', b'another'),
      ('._2.jpg', b'of a Mac'),
      ('noending', b'passed over'),
    ],
  )
  one, two = _read(path)
  assert _said([one, two]) == [('a/cat/1', 'a cat \U0001f431'), ('a/2', 'two')]
  assert (one.content.group, two.content.group) == ('cat', 'webdataset')
  assert one.content.image == PICTURE and two.values[0]['language'] == 'en'


def test_fields_and_endings_are_chosen(tmp_path):
  members = [('1.after.png', PICTURE), ('1.png', b'before'), ('1.txt', b'text')]
  members.append(('1.json', b'{"caption": "usual", "long": "chosen"}'))
  path = _tar(tmp_path / 'a.tar', members)
  (one,) = _read(path, FieldSpec(True, True, 'after.png', 'long', 'png'))
  assert one.content.caption == 'chosen'
  assert (one.content.image, one.content.reference) == (PICTURE, b'before')
  (one,) = _read(path, FieldSpec(caption='txt'))
  assert one.content.caption == 'text'
  (one,) = _read(path, FieldSpec(True, True, reference='before.png'))
  assert 'has no .before.png, but .after.png, .png, .txt, .json' in one.reason


def test_two_of_one_name_are_never_mixed_up(tmp_path):
  members = [('1.png', PICTURE), ('1.txt', b'one'), ('2.png', PICTURE), ('2.png', b'again')]
  members += [('2.txt', b'two'), ('3.png', PICTURE), ('3.txt', b'three'), ('1.png', PICTURE)]
  found = _said(_read(_tar(tmp_path / 'a.tar', members)))
  assert found[0] == ('a/1', 'one') and found[2] == ('a/3', 'three')
  assert 'two members of' in found[1] and '2.png' in found[1]
  assert 'named 1 do not follow one another' in found[3]


@pytest.mark.parametrize(
  'members, message',
  [
    ([('1.txt', b'x')], 'has no .jpg or .jpeg'),
    ([('1.png', PICTURE), ('1.txt', b'\xff\xfe')], 'utf-8'),
    ([('1.png', PICTURE), ('1.json', b'{"caption"')], 'delimiter'),
    ([('1.png', PICTURE), ('1.json', b'[' * 100_000)], 'recursion'),
    ([('1.png', PICTURE), ('1.json', b'["x"]')], 'its .json has no fields'),
    ([('1.png', PICTURE), ('1.txt', bytes((1 << 24) + 1))], 'its .txt has 16,777,217 bytes'),
  ],
)
def test_a_record_that_cannot_be_used_says_why(tmp_path, members, message):
  (one,) = _read(_tar(tmp_path / 'a.tar', members))
  assert isinstance(one, UnusableRecord) and one.id == 'a/1' and message in one.reason


def test_no_name_is_a_path(tmp_path, monkeypatch):
  """Names that lead elsewhere, links and devices: nothing is written or read outside the tar."""
  (tmp_path / 'secret.txt').write_text('secret')
  link = tarfile.TarInfo('3.txt')
  link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / 'secret.txt')
  hard = tarfile.TarInfo('3.caption')
  hard.type, hard.linkname = tarfile.LNKTYPE, '../secret.txt'
  device = tarfile.TarInfo('4.png')
  device.type = tarfile.CHRTYPE
  members = [(f'{tmp_path}/1.png', PICTURE), (f'{tmp_path}/1.txt', b'one')]
  members += [('../../2.png', PICTURE), ('../../2.txt', b'two')]
  members += [
    ('3.png', PICTURE),
    link,
    hard,
    device,
    (b'5\xff.png'.decode('utf-8', 'surrogateescape'), PICTURE),
  ]
  (tmp_path / 'in').mkdir()
  path = _tar(tmp_path / 'in' / 'a.tar', members)
  monkeypatch.chdir(tmp_path / 'in')
  found = _read(path, FieldSpec(captions=False))
  assert [one.content.caption for one in found] == ['one', 'two', '', '']
  assert found[0].content.id == f'a/{tmp_path}/1' and found[3].content.id == 'a/5\ufffd'
  prepare(Settings(f'webdataset:{path}', captions=False), str(tmp_path / 'to'))
  assert sorted(each.name for each in tmp_path.iterdir()) == ['in', 'secret.txt', 'to']
  assert [each.name for each in (tmp_path / 'in').iterdir()] == ['a.tar']


def test_a_tar_that_was_cut_short_loses_what_is_missing_and_says_so(tmp_path, caplog):
  members = [
    (f'{n}.{e}', PICTURE if e == 'png' else b'x') for n in range(4) for e in ('png', 'txt')
  ]
  whole = _tar(tmp_path / 'a.tar', members, format=tarfile.GNU_FORMAT).read_bytes()
  for length, good in (
    (5 * 1024, 2),
    (4 * 1024 + 512, 2),
    (4 * 1024 + 530, 2),
    (3 * 1024, 1),
    (9, 0),
  ):
    (tmp_path / 'a.tar').write_bytes(whole[:length])
    found = _read(tmp_path / 'a.tar', FieldSpec(captions=False))
    assert sum(isinstance(one, RawRecord) for one in found) >= good
    assert 'can not be read to its end' in found[-1].reason
    assert 'get it again' in caplog.records[-1].getMessage()
  for place in (0, 4 * 512):  # Damaged heads: of the first member, and of the second picture.
    damaged = bytearray(whole)
    damaged[place : place + 20] = b'\xff' * 20
    (tmp_path / 'a.tar').write_bytes(damaged)
    assert 'can not be read to its end' in _read(tmp_path / 'a.tar')[-1].reason
  (tmp_path / 'a.tar').unlink()
  with tarfile.open(tmp_path / 'a.tar', 'w:gz'):
    pass
  assert 'can not be read to its end' in _read(tmp_path / 'a.tar')[-1].reason


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_set_of_tars_is_prepared_in_order(tmp_path, format):
  name = 'ä' * 40 if format == tarfile.USTAR_FORMAT else 'ä' * 200
  for part in (1, 0):
    members = []
    for number in range(5):
      members += [(f'{name}{number}.png', PICTURE), (f'{name}{number}.txt', b'%d' % number)]
    _tar(tmp_path / f'{part}.tar', members, format=format)
  made = prepare(Settings(f'webdataset:{tmp_path}', shard_records=3), str(tmp_path / 'to'))
  assert made.count == 10 and len(made.shards) == 4
  source = webdataset.open_tars(str(tmp_path / '?.tar'), FieldSpec())
  found = list(source.read(list(source.places(tmp_path))))
  assert [one.content.id for one in found] == [f'{p}/{name}{n}' for p in (0, 1) for n in range(5)]
  assert json.loads((tmp_path / 'to' / 'prepared.json').read_text())['captions']


def test_a_tar_that_is_gone_when_it_is_read(tmp_path):
  path = _tar(tmp_path / 'a.tar', [('1.png', PICTURE)])
  source = webdataset.open_tars(str(path), FieldSpec())
  places = list(source.places(tmp_path))
  path.unlink()
  (one,) = source.read(places)
  assert isinstance(one, UnusableRecord) and one.id == 'a/1'
