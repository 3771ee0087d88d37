"""Images, grids and PNG metadata."""

import numpy as np
import pytest
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.sampling import images


def _noise(seed, side=8):
  return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def test_levels_round_to_the_nearest_and_clip():
  values = np.asarray([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 1.2])
  assert images.to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
  levels = np.arange(256, dtype=np.uint8)
  np.testing.assert_array_equal(images.to_uint8(levels / np.float32(255)), levels)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
  with pytest.raises(UserError, match='diverged'):
    images.to_uint8(np.asarray([0.5, value]))


def test_png_keeps_pixels_and_metadata(tmp_path):
  path = tmp_path / 'new' / 'x.png'
  metadata = {'prompt': 'a fox – 狐 & "quotes"', 'seed': '3', 'generated': 'true'}
  images.save_png(_noise(0), path, metadata)
  with Image.open(path) as stored:
    assert stored.text == metadata
    np.testing.assert_array_equal(np.asarray(stored), _noise(0))
  assert [p.name for p in path.parent.iterdir()] == ['x.png']


def test_existing_file_is_kept_without_overwrite(tmp_path):
  path = tmp_path / 'x.png'
  images.save_png(_noise(0), path)
  with pytest.raises(UserError, match='--overwrite'):
    images.save_png(_noise(1), path)
  np.testing.assert_array_equal(np.asarray(Image.open(path)), _noise(0))
  images.save_png(_noise(1), path, overwrite=True)
  np.testing.assert_array_equal(np.asarray(Image.open(path)), _noise(1))


def test_output_files_are_checked_before_the_work(tmp_path):
  folder = f'{tmp_path}/new/'
  assert images.output_files(folder, 2) == [folder + '000.png', folder + '001.png']
  assert images.output_files(f'{tmp_path}/x.png', 2) == [f'{tmp_path}/x.png']
  images.save_png(_noise(0), folder + '001.png')
  with pytest.raises(UserError, match='001.png exists'):
    images.output_files(folder, 2)
  assert len(images.output_files(folder, 2, overwrite=True)) == 2
  with pytest.raises(UserError, match='new is a folder'):
    images.output_files(f'{tmp_path}/new', 2, overwrite=True)


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  images.save_png(_noise(0), '~/x.png')
  assert [path.name for path in tmp_path.iterdir()] == ['x.png']
  with pytest.raises(UserError, match='x.png exists'):
    images.output_files('~/x.png', 1)
  with pytest.raises(UserError, match='out of reach'):
    images.save_png(_noise(0), 'https://host/x.png')


def test_a_folder_gets_one_file_per_image_and_a_png_gets_a_grid(tmp_path):
  metadata_of = lambda n: {'prompt': 'a fox', 'index': str(n)}
  generated = [
    images.GeneratedImage(_noise(n), 'a fox', n, 0, np.zeros(0), metadata_of(n)) for n in range(2)
  ]
  images.save_all(generated, f'{tmp_path}/each/')
  for n in range(2):
    with Image.open(tmp_path / f'each/00{n}.png') as stored:
      assert stored.text == metadata_of(n)
      np.testing.assert_array_equal(np.asarray(stored), _noise(n))
  images.save_all(generated, f'{tmp_path}/all.png', metadata=False)
  with Image.open(tmp_path / 'all.png') as stored:
    assert not stored.text and stored.width > 2 * 8
  with pytest.raises(UserError, match='all.png exists'):
    images.save_all(generated, f'{tmp_path}/all.png')


def test_a_single_image_is_written_as_it_is_unless_a_sheet_is_wanted(tmp_path):
  image = images.GeneratedImage(_noise(0), 'a fox', 0, 0, {}, {'prompt': 'a fox'})
  images.save_all([image], f'{tmp_path}/one.png')
  with Image.open(tmp_path / 'one.png') as stored:
    assert stored.text == {'prompt': 'a fox'}
    np.testing.assert_array_equal(np.asarray(stored), _noise(0))
  images.save_all([image], f'{tmp_path}/sheet.png', as_sheet=True)
  with Image.open(tmp_path / 'sheet.png') as stored:
    assert stored.height > 192 and stored.text == {'prompt': 'a fox'}


def test_unwritable_path_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    images.save_png(_noise(0), tmp_path / 'file' / 'x.png')
  (tmp_path / 'folder').mkdir()
  with pytest.raises(UserError, match='cannot write'):
    images.save_png(_noise(0), tmp_path / 'folder', overwrite=True)
  assert {path.name for path in tmp_path.iterdir()} == {'file', 'folder'}


def test_grid_enlarges_by_a_whole_factor_without_smoothing():
  rows = [[_noise(0), _noise(1)], [_noise(2)]]
  sheet = np.asarray(images.grid(rows, side=32))
  enlarged = np.kron(_noise(1), np.ones((4, 4, 1), np.uint8))
  matches = [
    (y, x)
    for y in range(sheet.shape[0] - 31)
    for x in range(sheet.shape[1] - 31)
    if (sheet[y, x] == enlarged[0, 0]).all() and (sheet[y : y + 32, x : x + 32] == enlarged).all()
  ]
  assert len(matches) == 1


def test_captions_and_labels_take_only_the_space_they_need():
  rows = [[_noise(0), _noise(1)]]
  bare = images.grid(rows)
  empty = images.grid(rows, [['', '']], [''])
  short = images.grid(rows, [['a fox', '']])
  long = images.grid(rows, [['a fox ' * 12, 'incomprehensibilities' * 4]])
  labelled = images.grid(rows, row_labels=['ground truth'])
  assert bare.size == empty.size
  assert bare.height < short.height < long.height and bare.width == long.width
  assert labelled.width > bare.width


def test_a_label_taller_than_its_row_does_not_reach_into_the_next_row():
  label = 'a wooden boat on a stormy sea ' * 8
  sheets = [images.grid([[_noise(0)]] * len(ls), row_labels=ls) for ls in ([label], [label, label])]
  margin = [np.asarray(sheet)[:, : 8 * 14] for sheet in sheets]
  row = margin[0].shape[0] - images._GAP
  ink = [int((part < 128).sum()) for part in (margin[0], margin[1][:row], margin[1][row:])]
  assert ink[0] == ink[1] == ink[2] > 0


def test_wrapped_text_fits_and_loses_nothing():
  font = images.ImageFont.load_default(14)
  text = 'two red foxes left of a ' + 'w' * 60 + ' on pale ground'
  lines = images._wrap(text, font, 120)
  assert all(font.getlength(line) <= 120 for line in lines)
  assert ''.join(lines).replace(' ', '') == text.replace(' ', '')


def test_lines_end_between_words_and_after_separators():
  font = images.ImageFont.load_default(14)
  lines = images._wrap('runs/edit-tiny.safetensors: generated on  the', font, 112)
  assert lines == ['runs/edit-tiny.', 'safetensors:', 'generated on the']


def test_grid_refuses_images_of_two_sizes():
  with pytest.raises(ValueError, match='one size'):
    images.grid([[_noise(0), _noise(1, side=9)]])
