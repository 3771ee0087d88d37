"""Folders of user images."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.data.filters import Filter
from vpe_jax.data.formats import checks
from vpe_jax.data.formats.entries import FieldSpec
from vpe_jax.data.formats.folder import ReadOptions, open_folder
from vpe_jax.data.records import BadRecord, render
from vpe_jax.data.transforms import Decoding


def _image(path, colour='red', size=(20, 10)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, colour).save(path)


def test_text_files_as_captions(tmp_path):
  for name in ('b.png', 'a.jpg', 'deep/c.PNG'):
    _image(tmp_path / name)
    (tmp_path / name).with_suffix('.txt').write_text(f'the\n {name} ')
  source = open_folder(str(tmp_path))
  assert [source[i].caption for i in range(len(source))] == [
    'the a.jpg',
    'the b.png',
    'the deep/c.PNG',
  ]


def test_avif_images_are_used(tmp_path):
  for name in ('a.avif', 'b.png'):
    _image(tmp_path / name, size=(16, 16))
    (tmp_path / name).with_suffix('.txt').write_text('a red square')
  source = open_folder(str(tmp_path))
  assert len(source) == 2
  assert np.abs(render(source[0], 16).astype(int) - (255, 0, 0)).max() < 16


def test_count_takes_the_first_images_with_a_warning(tmp_path, caplog):
  for name in 'abc':
    _image(tmp_path / f'{name}.png')
    (tmp_path / f'{name}.txt').write_text(name)
  assert (
    len(open_folder(str(tmp_path), ReadOptions(count=3))) == len(open_folder(str(tmp_path))) == 3
  )
  assert not caplog.records
  assert [record.caption for record in open_folder(str(tmp_path), ReadOptions(count=2))] == [
    'a',
    'b',
  ]
  (record,) = caplog.records
  assert 'first 2 of 3' in record.getMessage() and 'examples=0' in record.getMessage()


def test_captions_file(tmp_path):
  _image(tmp_path / 'x.png')
  _image(tmp_path / 'y.png')
  lines = [{'image': 'y.png', 'text': 'a y'}, {'file': 'x.png', 'caption': 'an x'}]
  (tmp_path / 'captions.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n\n')
  source = open_folder(str(tmp_path))
  assert [(r.id, r.caption) for r in source] == [('folder/x.png', 'an x'), ('folder/y.png', 'a y')]
  image = render(source[0], 16)
  assert image.shape == (16, 16, 3)
  assert (image[:4] == 255).all() and (image[4:12] == (255, 0, 0)).all()
  assert image.dtype == np.uint8


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"file": "x.png"}', 'x.png has no caption'),
    ('{"caption": "an x"}', 'names no image'),
    ('{"file": "z.png", "caption": "a z"}', 'z.png does not exist'),
    ('{"file": ', 'line 1 is not JSON'),
    ('["x.png"]', 'names no image'),
    ('{"file": "../data/x.png", "caption": "an x"}', 'line 1: image ../data/x.png'),
    ('{"file": "{tmp}/x.png", "caption": "an x"}', 'line 1: image .*outside'),
    ('{"file": "' + 'x' * 5000 + '", "caption": "an x"}', r'line 1: image .*/x+\.\.\. '),
    ('{"file": ' + '1' * 5000 + '}', 'line 1 is not JSON'),
    ('[' * 100_000, 'line 1 is not JSON'),
    ('{"file": "x.png", "caption": "an \\ud800"}', 'line 1: the caption'),
    ('{"file": "\\ud800.png", "caption": "an x"}', 'line 1: the file name is not valid text'),
  ],
)
def test_invalid_lines_are_named(tmp_path, line, message):
  _image(tmp_path / 'x.png')
  (tmp_path / 'captions.jsonl').write_text(line.replace('{tmp}', str(tmp_path)))
  with pytest.raises(UserError, match=message) as error:
    open_folder(str(tmp_path))
  assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_spellings_of_one_file_are_one_record(tmp_path):
  _image(tmp_path / 'x.png')
  lines = [{'file': name, 'caption': 'an x'} for name in ('x.png', './x.png', './/x.png')]
  (tmp_path / 'captions.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  assert [record.id for record in open_folder(str(tmp_path))] == ['folder/x.png']


def test_hidden_files_are_ignored(tmp_path):
  for name in ('x.png', '._x.png', '.git/y.png'):
    _image(tmp_path / name)
  (tmp_path / 'x.txt').write_text('an x')
  assert [record.id for record in open_folder(str(tmp_path))] == ['folder/x.png']


def test_byte_order_marks_and_line_ends_of_other_editors(tmp_path):
  _image(tmp_path / 'x.png')
  line = '{"file": "x.png", "caption": "a\u2028b"}'
  (tmp_path / 'captions.jsonl').write_bytes(f'\ufeff{line}\r\n\r\n'.encode())
  assert [record.caption for record in open_folder(str(tmp_path))] == ['a\u2028b']
  (tmp_path / 'captions.jsonl').unlink()
  (tmp_path / 'x.txt').write_bytes('\ufeffan x\r\n'.encode())
  assert open_folder(str(tmp_path))[0].caption == 'an x'


def test_missing_and_unreadable_files_are_named(tmp_path):
  def check(message, path=tmp_path):
    with pytest.raises(UserError, match=message):
      open_folder(str(path))

  check('nowhere does not exist', tmp_path / 'nowhere')
  check('no images')
  _image(tmp_path / 'x.png')
  check('x.png has no caption')
  (tmp_path / 'x.txt').write_bytes('un café'.encode('latin-1'))
  check('x.txt.*UTF-8')
  (tmp_path / 'captions.jsonl').write_bytes('un café'.encode('latin-1'))
  check('captions.jsonl.*UTF-8')
  (tmp_path / 'captions.jsonl').unlink()
  (tmp_path / 'captions.jsonl').mkdir()
  check('captions.jsonl')


def _captioned(folder, names):
  for name in names:
    _image(folder / name)
    (folder / name).with_suffix('.txt').write_text(f'the {name}')


def test_all_bad_records_are_listed_at_once_and_skipped_up_to_a_share(tmp_path, caplog):
  _captioned(tmp_path, [f'{number:02d}.jpg' for number in range(20)])
  whole = (tmp_path / '03.jpg').read_bytes()
  (tmp_path / '03.jpg').write_bytes(whole[: len(whole) // 2])
  (tmp_path / '05.txt').write_bytes('un café'.encode('cp1252'))
  (tmp_path / '07.txt').unlink()
  (tmp_path / '09.jpg').rename(tmp_path / '09.heic')
  with pytest.raises(UserError, match='4 of 20 .*data.most_skipped=0.1') as error:
    open_folder(str(tmp_path), ReadOptions(most_skipped=0.1))
  for name in ('03.jpg', '05.txt', '07.jpg', '09.heic'):
    assert name in str(error.value)
  assert '\n' not in str(error.value)
  source = open_folder(str(tmp_path), ReadOptions(most_skipped=0.2))
  bad = {3, 5, 7, 9}
  assert [record.id for record in source] == [
    f'folder/{number:02d}.jpg' for number in range(20) if number not in bad
  ]
  (warning,) = [record.getMessage() for record in caplog.records]
  assert '4 of 20 records' in warning and '03.jpg' in warning


def test_long_lists_of_bad_records_are_cut(tmp_path):
  _captioned(tmp_path, [f'{number}.png' for number in range(20)])
  for path in tmp_path.glob('*.png'):
    path.write_bytes(b'none')
  with pytest.raises(UserError, match='20 of 20 .*and 12 more$'):
    open_folder(str(tmp_path))


def test_images_are_decoded_again_only_if_they_changed(tmp_path, monkeypatch):
  _captioned(tmp_path, ['a.png', 'b.png', 'c.png'])
  decoded = []
  check = Decoding.check
  monkeypatch.setattr(
    Decoding,
    'check',
    lambda self, content, name: decoded.append(name) or check(self, content, name),
  )
  first = open_folder(str(tmp_path))
  assert len(decoded) == 3
  assert open_folder(str(tmp_path)) == first and len(decoded) == 3
  _image(tmp_path / 'b.png', 'blue')
  second = open_folder(str(tmp_path))
  assert decoded[3:] == [str(tmp_path / 'b.png')]
  assert [a == b for a, b in zip(first.contents, second.contents, strict=True)] == [
    True,
    False,
    True,
  ]


def test_checks_of_a_part_keep_the_results_of_the_other_images(tmp_path, monkeypatch):
  _captioned(tmp_path, ['a.png', 'b.png', 'c.png', 'd.png'])
  monkeypatch.setattr(checks, '_MAX_OUTDATED', 0)
  english = Filter(language='en')
  (tmp_path / 'd.txt').write_text('картинка')
  for options in (ReadOptions(count=1), ReadOptions(record_filter=english)):
    open_folder(str(tmp_path))
    open_folder(str(tmp_path), options)
    assert len(checks._Results(tmp_path).contents) == 4
  for name in 'bcd':
    (tmp_path / f'{name}.png').unlink()
  open_folder(str(tmp_path))
  assert len(checks._Results(tmp_path).contents) == 1


def test_results_that_can_not_be_stored_are_a_warning(tmp_path, monkeypatch, caplog):
  _captioned(tmp_path, ['a.png', 'b.png', 'c.png'])
  open_folder(str(tmp_path))
  monkeypatch.setattr(checks, '_MAX_OUTDATED', 0)

  def fail(path, content):
    raise OSError(errno.ENOSPC, 'No space left on device', str(path))

  monkeypatch.setattr(checks, 'write_atomic', fail)
  for name in 'bc':
    (tmp_path / f'{name}.png').unlink()
  assert len(open_folder(str(tmp_path))) == 1
  assert 'No space left' in caplog.records[-1].getMessage()


def test_names_that_are_not_text_are_unusable(tmp_path):
  _captioned(tmp_path, ['a.png', 'b.png'])
  for ending in ('png', 'txt'):
    (tmp_path / f'b.{ending}').rename(tmp_path / os.fsdecode(f'\xff.{ending}'.encode('latin-1')))
  with pytest.raises(UserError, match='1 of 2 records .*name is not valid text') as error:
    open_folder(str(tmp_path))
  assert str(error.value).isprintable()
  assert len(open_folder(str(tmp_path), ReadOptions(most_skipped=0.5))) == 1


def test_lines_are_named_in_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _image(tmp_path / 'image set' / 'x.png')
  line = {'file': 'y.png', 'caption': 'a y'}
  (tmp_path / 'image set' / 'captions.jsonl').write_text(json.dumps(line))
  with pytest.raises(UserError, match='line 1: image .*y.png does not exist'):
    open_folder('image set')


def test_metadata_with_other_image_fields(tmp_path):
  for name in ('x.png', 'y.png'):
    _image(tmp_path / name)
  line = {'before_file_name': 'x.png', 'after_file_name': 'y.png', 'text': 'make it blue'}
  (tmp_path / 'metadata.jsonl').write_text(json.dumps(line))
  fields = FieldSpec(references=True, image='after_file_name', reference='before_file_name')
  (record,) = open_folder(str(tmp_path), ReadOptions(fields))
  assert (record.id, record.reference.path) == ('folder/y.png', str(tmp_path / 'x.png'))


def test_an_image_that_changes_after_the_check_is_named_when_rendered(tmp_path):
  _captioned(tmp_path, ['x.png'])
  source = open_folder(str(tmp_path))
  for damage in (lambda path: path.write_bytes(b'none'), lambda path: path.unlink()):
    damage(tmp_path / 'x.png')
    with pytest.raises(BadRecord, match='unreadable image .*x.png'):
      render(source[0], 8)


def test_classes_need_no_captions(tmp_path):
  for name in ('cat/1.png', 'cat/deep/2.png', 'dog/3.png'):
    _image(tmp_path / name)
  source = open_folder(str(tmp_path), ReadOptions(FieldSpec(captions=False)))
  assert [record.group for record in source] == ['cat', 'deep', 'dog']
  assert [record.caption for record in source] == [''] * 3
  with pytest.raises(UserError, match='has no caption'):
    open_folder(str(tmp_path))


def test_source_images_of_edits(tmp_path):
  for name in ('x.png', 'before/x.png'):
    _image(tmp_path / name)
  line = {'file': 'x.png', 'caption': 'make it red', 'reference': 'before/x.png'}
  (tmp_path / 'captions.jsonl').write_text(json.dumps(line))
  (record,) = open_folder(str(tmp_path), ReadOptions(FieldSpec(references=True)))
  assert record.reference.path == str(tmp_path / 'before' / 'x.png')
  np.testing.assert_array_equal(record.reference.render(16), record.image.render(16))
  (plain,) = open_folder(str(tmp_path))
  assert plain.reference is None
  for reference, message in (('', 'line 1 .*"reference"'), ('y.png', 'y.png does not exist')):
    (tmp_path / 'captions.jsonl').write_text(json.dumps(line | {'reference': reference}))
    with pytest.raises(UserError, match=message):
      open_folder(str(tmp_path), ReadOptions(FieldSpec(references=True)))
  (tmp_path / 'captions.jsonl').unlink()
  with pytest.raises(UserError, match='captions.jsonl'):
    open_folder(str(tmp_path), ReadOptions(FieldSpec(references=True)))
