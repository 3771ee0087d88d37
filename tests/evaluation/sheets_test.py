"""Sheets: layout, and combination of several runs."""

import numpy as np

from vpe_jax.evaluation.report import Row
from vpe_jax.evaluation.sheets import combine, layout


def _images(shade, count=3, side=16):
  return np.full((count, side, side, 3), shade, np.uint8)


def test_a_row_shows_the_first_of_many_images():
  row = Row.first('true', _images(0, 20), [str(i) for i in range(20)])
  assert row.images.shape[0] == len(row.captions) == 8
  assert Row.first('true', _images(0, 2)).captions == ()


def test_rows_that_all_runs_share_appear_once():
  true = Row('true', _images(0), ('a', 'b', 'c'))
  sheets = {
    'runs/a': (true, Row('generated', _images(1)), Row('other', _images(2))),
    'runs/b': (true, Row('generated', _images(3))),
    'runs/c': (true, Row('generated', _images(1))),
  }
  rows = combine(sheets)
  assert [row.label for row in rows] == [
    'true',
    'runs/a, runs/c: generated',
    'runs/b: generated',
    'runs/a: other',
  ]
  assert rows[0].captions == true.captions
  assert [row.images[0, 0, 0, 0] for row in rows] == [0, 1, 3, 2]


def test_rows_of_different_image_sizes_fit_one_sheet():
  sheets = {name: (Row('true', _images(0, side=side)),) for name, side in (('a', 16), ('b', 24))}
  rows = combine(sheets)
  assert [row.label for row in rows] == ['a: true', 'b: true']
  large = layout((Row('a', _images(0, side=24)), Row('b', _images(0, side=24))))
  assert layout(rows).size == large.size
  assert layout((rows[0], Row('b', rows[1].images, ('caption', '', '')))).height > large.height
