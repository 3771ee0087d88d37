"""Files of visual prompts: both formats, malformed files, mixes, and ranking."""

import dataclasses
import json

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.systems.vpe.visual_prompts import files

BOOK = files.Codebook(40, '0f3a5c7e9b1d')


def _plans(n=3, side=3, seed=0):
  codes = np.random.default_rng(seed).integers(0, BOOK.size, (n, side * side), np.int32)
  prompts = ('a red fox', 'deux œufs "durs"', 'a\nb')[:n]
  return files.VisualPrompts(codes, prompts, (4, 0, 2)[:n], BOOK, {'by': 'sampled', 'seed': '7'})


def _assert_same(a, b):
  np.testing.assert_array_equal(a.codes, b.codes)
  assert a.codes.dtype == np.int32
  fields = lambda p: (p.prompts, p.index, p.codebook, dict(p.provenance), p.side)
  assert fields(a) == fields(b)


@pytest.mark.parametrize('name', ['x.json', 'x.npz', 'new/x.json'])
def test_files_round_trip(name, tmp_path):
  path = str(tmp_path / name)
  _plans().save(path)
  _assert_same(files.load(path), _plans())


def test_a_file_is_replaced_with_overwrite_alone(tmp_path):
  path = str(tmp_path / 'x.json')
  _plans().save(path)
  with pytest.raises(UserError, match='x.json exists: .*--overwrite'):
    _plans(seed=1).save(path)
  _assert_same(files.load(path), _plans())
  _plans(seed=1).save(path, overwrite=True)
  _assert_same(files.load(path), _plans(seed=1))
  (tmp_path / 'folder.npz').mkdir()
  with pytest.raises(UserError, match='folder.npz is a folder'):
    _plans().save(str(tmp_path / 'folder.npz'), overwrite=True)
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    _plans().save(str(tmp_path / 'file' / 'x.npz'))


def test_json_has_one_grid_row_a_line_and_may_be_edited_by_hand(tmp_path):
  path = tmp_path / 'x.json'
  _plans(n=1).save(str(path))
  row = ', '.join(f'{code:2d}' for code in _plans().grids[0, 1])
  assert f'   [{row}],\n' in path.read_text()
  values = json.loads(path.read_text())
  values['plans'][0]['grid'][1][2] = 39
  # The index is optional: visual prompts of one prompt are numbered in order.
  plan = values['plans'][0]
  del plan['index']
  values['plans'] += [{'grid': plan['grid']}, plan]
  del values['made']
  path.write_text('\ufeff' + json.dumps(values))
  loaded = files.load(str(path))
  assert (loaded.grids[:, 1, 2] == 39).all() and loaded.prompts == ('a red fox', '', 'a red fox')
  assert loaded.index == (0, 0, 1) and loaded.provenance == {}


def _edited(path, change):
  values = json.loads(path.read_text())
  change(values, values['plans'][0])
  path.write_text(json.dumps(values))


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda v, p: v.pop('format'), '"format" is None, not \'vpe_jax'),
    (lambda v, p: v.pop('codebook'), '"codebook" is absent: it must be a text'),
    (lambda v, p: v.update(codebook=3), '"codebook" is 3'),
    (lambda v, p: v.update(codes=True), '"codes" is True: it must be a whole number from 1'),
    (lambda v, p: v.update(side=0), '"side" is 0'),
    (lambda v, p: v.update(side=4), 'plan 0: its grid has 3 rows: "side" says 4'),
    (lambda v, p: v.update(made='me'), '"made" is \'me\': it must be an object'),
    (lambda v, p: v.update(plans={}), '"plans" is {}: it must be a list'),
    (lambda v, p: v['plans'].clear(), '0 visual prompts of 9 codes'),
    (lambda v, p: v['plans'].append(5), 'plan 3: it must be {"prompt"'),
    (lambda v, p: p.pop('grid'), 'plan 0: "grid" is absent'),
    (lambda v, p: p.update(prompt=5), 'plan 0: "prompt" is 5: it must be a text'),
    (lambda v, p: p.update(index=-1), 'plan 0: "index" is -1'),
    (lambda v, p: p['grid'].pop(), 'plan 0: its grid has 2 rows'),
    (lambda v, p: p['grid'][2].append(1), 'plan 0: row 2 has 4 codes: "side" says 3'),
    (lambda v, p: p['grid'].insert(0, 7) or p['grid'].pop(), 'plan 0: row 0 has 7, not codes'),
    (lambda v, p: p['grid'][1].__setitem__(0, 40), 'row 1 has the code 40: .* has 0 to 39'),
    (lambda v, p: p['grid'][1].__setitem__(0, -1), 'row 1 has the code -1'),
    (lambda v, p: p['grid'][1].__setitem__(0, 1.0), 'row 1 has the code 1.0'),
    (lambda v, p: p['grid'][1].__setitem__(0, '1'), "row 1 has the code '1'"),
    (lambda v, p: p['grid'][1].__setitem__(0, 10**30), 'row 1 has the code 1000'),
  ],
)
def test_errors_in_json_are_named(change, message, tmp_path):
  path = tmp_path / 'x.json'
  _plans().save(str(path))
  _edited(path, change)
  _assert_refused(path, message)


def _assert_refused(path, message):
  with pytest.raises(UserError, match=message) as error:
    files.load(str(path))
  assert str(path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('content', ['', '{"format": ', '[' * 100_000, '[1]', '"x"', '\xff'])
def test_invalid_json_is_refused(content, tmp_path):
  path = tmp_path / 'x.json'
  path.write_bytes(content.encode('latin-1'))
  _assert_refused(path, 'no whole file of visual prompts: it is (not JSON|JSON, but not an object)')


@pytest.mark.parametrize('share', [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize('name', ['x.json', 'x.npz'])
def test_a_truncated_file_is_refused(name, share, tmp_path):
  path = tmp_path / name
  _plans().save(str(path))
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  _assert_refused(path, 'no whole file of visual prompts')


def test_a_changed_byte_of_npz_is_refused(tmp_path):
  path = tmp_path / 'x.npz'
  _plans().save(str(path))
  content = bytearray(path.read_bytes())
  content[content.index(_plans().codes.tobytes()) + 5] ^= 1
  path.write_bytes(content)
  _assert_refused(path, 'Bad CRC-32')


def test_a_lone_array_is_no_npz(tmp_path):
  path = tmp_path / 'x.npz'
  with path.open('wb') as file:
    np.save(file, _plans().codes)
  _assert_refused(path, 'save the visual prompts again')


@pytest.mark.parametrize(
  'change, message',
  [
    ({'codes': np.zeros((3, 9))}, "'codes' holds float64"),
    ({'codes': np.zeros((2, 9), int)}, r'codes \[2, 9\], 3 prompts and side 3 do not fit'),
    ({'codes': np.zeros((3, 16), int)}, 'do not fit'),
    ({'codes': np.full((3, 9), 40)}, 'codes go from 40 to 40: 0 to 39 exist'),
    ({'codes': np.full((3, 9), -1)}, 'codes go from -1'),
    ({'codes': np.full((3, 9), 2**33)}, 'codes go from 8589934592'),
    ({'index': np.asarray([0, -1, 2])}, 'an index is -1'),
    ({'index': np.zeros((3, 1), int)}, 'do not fit'),
    ({'prompts': np.asarray([1, 2, 3])}, "'prompts' holds int64"),
    ({'prompts': np.asarray(['a', 'b', 'c'], object)}, 'allow_pickle=False'),
    ({'head': np.asarray('{')}, 'not JSON'),
    ({'head': None}, 'head is not a file in the archive'),
  ],
)
def test_errors_in_npz_are_named(change, message, tmp_path):
  path = tmp_path / 'x.npz'
  _plans().save(str(path))
  arrays = {**np.load(path), **change}
  np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
  _assert_refused(path, message)


def test_other_endings_and_absent_files_are_refused(tmp_path):
  for use in (files.load, files.check_target, _plans().save):
    with pytest.raises(UserError, match=r"'x.txt' is no file .* end in .json or .npz"):
      use('x.txt')
  with pytest.raises(UserError, match='cannot read .*none.json .*--save_visual_prompt'):
    files.load(str(tmp_path / 'none.json'))


def test_visual_prompts_of_another_codebook_or_grid_are_refused():
  _plans().check(BOOK, 3)
  with pytest.raises(UserError, match=r'0f3a5c7e9b1d, 40 codes.*ffffffffffff, 40 codes'):
    _plans().check(files.Codebook(40, 'f' * 12), 3)
  with pytest.raises(UserError, match=r'40 codes.*41 codes'):
    _plans().check(dataclasses.replace(BOOK, size=41), 3)
  with pytest.raises(UserError, match='3 x 3 codes .* 6 x 6'):
    _plans().check(BOOK, 6)


def test_fields_must_agree():
  with pytest.raises(UserError, match='codes go from 0 to 40: the codebook has 0 to 39'):
    dataclasses.replace(_plans(n=1, side=2), codes=np.asarray([[0, 1, 2, 40]]))
  with pytest.raises(UserError, match='1 visual prompts of 3 codes: .* a square grid'):
    files.VisualPrompts(np.zeros((1, 3), np.int32), ('',), (0,), BOOK, {})
  with pytest.raises(UserError, match='3 visual prompts with 2 prompts'):
    dataclasses.replace(_plans(), prompts=('a', 'b'))
  picked = _plans().take([2, 0, 2])
  np.testing.assert_array_equal(picked.codes, _plans().codes[[2, 0, 2]])
  assert picked.index == (2, 4, 2) and picked.prompts[1] == 'a red fox'


def test_with_prompts_takes_one_prompt_or_one_each():
  assert _plans().with_prompts(['x']).prompts == ('x',) * 3
  assert _plans().with_prompts(['x', 'y', 'z']).prompts == ('x', 'y', 'z')
  with pytest.raises(UserError, match='2 prompts for 3 visual prompts'):
    _plans().with_prompts(['x', 'y'])


@pytest.mark.parametrize('rows, upper', [(None, 2), (0, 0), (1, 1), (5, 5)])
def test_a_mix_has_the_rows_of_both(rows, upper):
  a, b = _plans(side=5), _plans(side=5, seed=1)
  mix = files.mixed(a, b, rows)
  np.testing.assert_array_equal(mix.grids[:, :upper], a.grids[:, :upper])
  np.testing.assert_array_equal(mix.grids[:, upper:], b.grids[:, upper:])
  assert (mix.prompts, mix.index) == (a.prompts, a.index) and mix.provenance['by'] == 'mixed'


def test_visual_prompts_that_do_not_fit_are_not_mixed():
  other = dataclasses.replace(_plans(), codebook=files.Codebook(40, 'f' * 12))
  for pair, message in (
    ((_plans(), _plans(n=2)), 'with 2 others'),
    ((_plans(), _plans(), 4), 'cannot mix the top 4 rows'),
    ((_plans(), _plans(), -1), 'cannot mix the top -1 rows'),
    ((_plans(), _plans(side=2)), 'the lower visual prompts have 2 x 2'),
    ((_plans(), other), 'the lower visual prompts index another codebook'),
  ):
    with pytest.raises(UserError, match=message):
      files.mixed(*pair)


def test_the_best_come_first_and_ties_stay_in_order():
  scores = np.asarray([[0.0, 2.0, 1.0, 2.0], [-1.0, -3.0, -2.0, -1.0]])
  np.testing.assert_array_equal(files.best(scores, 3), [[1, 3, 2], [0, 3, 2]])
