"""Spans and layouts: places in a region, and combinations of fields that are refused."""

from __future__ import annotations

import pytest

from vpe_jax.sequence.spans import Layout, Span

LAYOUT = Layout((Span('a', 3, 'ar'), Span('x', 2, 'dit', full=True), Span('b', 1, 'ar')))


def test_places_and_region_lengths():
  assert LAYOUT.experts == ('ar', 'dit')
  assert [LAYOUT.place(name) for name in 'axb'] == [(0, 3), (0, 2), (3, 4)]
  assert (LAYOUT.region_length('ar'), LAYOUT.region_length('ar', 16)) == (4, 16)
  assert 'b' in LAYOUT and 'c' not in LAYOUT
  with pytest.raises(KeyError, match='video'):
    LAYOUT.place('video')


@pytest.mark.parametrize(
  'field, values',
  [
    ('name', {'name': ''}),
    ('expert', {'expert': ''}),
    ('length', {'length': 0}),
    ('id', {'id': -1}),
    ('window', {'window': -1}),
    ('sees', {'sees': 'frames'}),
    ('seen_by', {'seen_by': 'none'}),
    ('frame', {'sees': 'frame'}),
    ('frame', {'seen_by': 'frame'}),
    ('seen_by', {'seen_by': 'token', 'full': True}),
    ('predicts', {'predicts': True, 'full': True}),
  ],
)
def test_meaningless_spans_are_refused(field, values):
  with pytest.raises(ValueError, match=field):
    Span(**({'name': 'a', 'length': 1, 'expert': 'ar'} | values))


def test_names_are_unique_in_a_layout():
  with pytest.raises(ValueError, match='text'):
    Layout((Span('text', 1, 'ar'), Span('text', 2, 'ar')))


def test_spans_of_one_frame_are_neighbours():
  span = lambda name, frame: Span(name, 1, 'ar', frame=frame)
  Layout((span('a', None), span('b', 0), span('c', 0), span('d', None), span('e', 1)))
  with pytest.raises(ValueError, match="'c'"):
    Layout((span('a', 0), span('b', 1), span('c', 0)))
