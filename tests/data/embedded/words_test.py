"""Pictures of words: pure functions of (seed, split, index), legible, true to their captions."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from vpe_jax.data.embedded import fonts, shapes, splits, vocabulary, words
from vpe_jax.data.records import SPLITS, render
from vpe_jax.data.tokenizers import bpe


@pytest.fixture(scope='module')
def sample():
  return [words.word_image(5, index) for index in range(600)]


def test_picture_is_a_pure_function():
  again = words.Words(100, 'train', 5)
  assert again[37] == words.word_image(5, 37) == again[37]
  assert words.word_image(5, 37) != words.word_image(6, 37)
  np.testing.assert_array_equal(render(again[37], 64), render(words.word_image(5, 37), 64))
  with pytest.raises(IndexError):
    again[100]


def test_known_picture_stays_as_it_is():
  """Changing the program silently would change every run's data."""
  assert [words.word_image(0, i).caption for i in range(3)] == [
    'the word "black" in a serif font on light pink and light blue',
    'a picture of the word "guitar" in a blue italic font on white',
    'a picture of the word "bicycle" in a purple italic font on white',
  ]


def test_captions_quote_the_words_and_name_the_font(sample):
  for record in sample:
    written = record.truth.writing
    assert '"' + ' '.join(word.text for word in written.words) + '"' in record.caption
    assert f' {written.font} font' in record.caption
    said = [name for name in shapes.COLOURS if f' {name} {written.font} font' in record.caption]
    assert said in ([], [written.colour])
    _, on, ground = record.caption.rpartition(' font on ')
    names = (record.truth.ground, record.truth.fade)
    assert not on or ground == ' and '.join(filter(None, names))
    assert record.caption == words.caption(record.truth, record.wording)


def test_words_lie_inside_below_one_another_and_are_large_enough(sample):
  for record in sample:
    boxes = [word.box for word in record.truth.writing.words]
    assert all(0.03 < min(box) and max(box) < 0.97 for box in boxes)
    assert all(above[3] < below[1] for above, below in itertools.pairwise(boxes))
    # Without letters that rise or fall, what is left of an em of .18 is a little below a half.
    assert min(box[3] - box[1] for box in boxes) > 0.07, record.caption


@pytest.mark.parametrize('size', [64, 200])
def test_ink_is_in_its_boxes_and_touches_no_border(sample, size):
  for record in sample[:40]:
    truth = record.truth
    image = render(record, size).astype(int)
    top, bottom = (
      np.array(shapes.ground_colour(name)) for name in (truth.ground, truth.fade or truth.ground)
    )
    share = ((np.arange(size) + 0.5) / size)[:, None, None]
    inked = np.abs(image - (top + (bottom - top) * share)).max(-1) > 40
    seen, spare = np.zeros_like(inked), max(1, size // 100)
    for word in truth.writing.words:
      left, rise, right, fall = (round(size * edge) for edge in word.box)
      place = (slice(rise - spare, fall + spare), slice(left - spare, right + spare))
      seen[place] = True
      assert 0.2 < inked[place].mean() < 0.75, record.caption
      columns, rows = inked[place].any(0), inked[place].any(1)
      edges = (columns[: 2 * spare + 1], columns[-2 * spare - 1 :])
      edges += (rows[: 2 * spare + 1], rows[-2 * spare - 1 :])
      assert all(edge.any() for edge in edges), record.caption
    assert not (inked & ~seen).any()
    edge = np.concatenate([inked[0], inked[-1], inked[:, 0], inked[:, -1]])
    assert not edge.any()


def _luminance(colour):
  share = np.array(colour) / 255
  linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
  return linear @ [0.2126, 0.7152, 0.0722]


def test_inks_stand_out_from_every_ground():
  """reference: contrast of WCAG 2.1, of which large text should have 3; ours have 2.3 or more."""
  for ink, ground in itertools.product(words.INKS, ('white', *shapes.TINTS)):
    dark, light = _luminance(shapes.COLOURS[ink]), _luminance(shapes.ground_colour(ground))
    assert (light + 0.05) / (dark + 0.05) > 2.2, (ink, ground)


def test_pictures_are_varied(sample):
  writings = [record.truth.writing for record in sample]
  assert {len(w.words) for w in writings} == {1, 2, 3}
  assert {w.font for w in writings} == set(fonts.FONTS)
  assert {w.colour for w in writings} == set(words.INKS)
  assert {r.truth.ground for r in sample} == {'white', *shapes.TINTS}
  assert {bool(r.truth.fade) for r in sample} == {True, False}
  assert {word.text for w in writings for word in w.words} == set(splits.trained_words())
  assert len({record.caption for record in sample}) > 580


def test_fonts_draw_every_word_differently():
  for word in vocabulary.written():
    extents = {fonts.ink(font, word) for font in fonts.FONTS}
    assert len(extents) == len(fonts.FONTS), word


def test_pairs_of_words_have_no_order(sample):
  def turned(truth):
    writing = dataclasses.replace(truth.writing, words=truth.writing.words[::-1])
    return dataclasses.replace(truth, writing=writing)

  for record in sample:
    pairs = set(splits.combinations(record.truth))
    assert set(splits.combinations(turned(record.truth))) == pairs
    count = len(record.truth.writing.words)
    assert len(pairs) == count + count * (count - 1) // 2


@pytest.mark.parametrize('split', SPLITS)
def test_splits_hold_what_they_say(split):
  held = 0
  for index in range(200):
    record = words.word_image(1, index, split)
    assert record.split == splits.split_of(record) == split
    texts = {word.text for word in record.truth.writing.words}
    held += bool(texts & set(splits.held_out_words()))
    assert bool(splits.held_out(record.truth)) >= (split == 'combination')
  assert held == (200 if split == 'concept' else 0)


@pytest.mark.parametrize('split', SPLITS)
def test_captions_are_short_and_spelled_without_loss(split):
  tokenizer = bpe.shipped()
  for index in range(300):
    caption = words.word_image(1, index, split).caption
    ids = tokenizer.encode(caption)
    assert len(ids) <= 40 and bpe.UNK not in ids and tokenizer.decode(ids) == caption
