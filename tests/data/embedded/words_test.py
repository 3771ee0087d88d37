"""Images of words: pure functions of (seed, split, index), legible, with correct captions."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import fonts, shapes, splits, vocabulary, words
from vpe_jax.data.records import SPLITS, render
from vpe_jax.data.sources import open_source
from vpe_jax.data.tokenizers import bpe


@pytest.fixture(scope='module')
def sample():
  return [words.word_image(5, index) for index in range(600)]


def test_image_is_a_pure_function():
  again = words.Words(100, 'train', 5)
  assert again[37] == words.word_image(5, 37) == again[37]
  assert words.word_image(5, 37) != words.word_image(6, 37)
  np.testing.assert_array_equal(render(again[37], 64), render(words.word_image(5, 37), 64))
  with pytest.raises(IndexError):
    again[100]


def test_known_images_do_not_change():
  """A change of the generator would silently change the data of every run."""
  assert [words.word_image(0, i).caption for i in range(3)] == [
    'the word "pound" in a serif font on light pink and light blue',
    'a picture of the word "leafy" in a blue italic font on white',
    'a picture of the word "genie" in a purple italic font on white',
  ]


def test_captions_quote_the_words_and_name_the_font(sample):
  for record in sample:
    written = record.truth.writing
    assert '"' + ' '.join(word.text for word in written.words) + '"' in record.caption
    assert f' {written.font} font' in record.caption
    colours = [name for name in shapes.COLOURS if f' {name} {written.font} font' in record.caption]
    assert colours in ([], [written.colour])
    _, on, background = record.caption.rpartition(' font on ')
    names = (record.truth.background, record.truth.fade)
    assert not on or background == ' and '.join(filter(None, names))
    assert record.caption == words.caption(record.truth, record.wording)


def test_words_are_inside_on_separate_lines_and_legible(sample):
  for record in sample:
    boxes = [word.box for word in record.truth.writing.words]
    assert all(0.03 < min(box) and max(box) < 0.97 for box in boxes)
    assert all(above[3] < below[1] for above, below in itertools.pairwise(boxes))
    # Without ascenders and descenders, ink is a little below half of the smallest em, 0.18.
    assert min(box[3] - box[1] for box in boxes) > 0.07, record.caption


@pytest.mark.parametrize('size', [64, 200])
def test_ink_fills_its_boxes_and_touches_no_border(sample, size):
  for record in sample[:40]:
    truth = record.truth
    image = render(record, size).astype(int)
    top, bottom = (
      np.array(shapes.background_colour(name))
      for name in (truth.background, truth.fade or truth.background)
    )
    share = ((np.arange(size) + 0.5) / size)[:, None, None]
    has_ink = np.abs(image - (top + (bottom - top) * share)).max(-1) > 40
    covered, spare = np.zeros_like(has_ink), max(1, size // 100)
    for word in truth.writing.words:
      left, rise, right, fall = (round(size * edge) for edge in word.box)
      place = (slice(rise - spare, fall + spare), slice(left - spare, right + spare))
      covered[place] = True
      assert 0.2 < has_ink[place].mean() < 0.75, record.caption
      columns, rows = has_ink[place].any(0), has_ink[place].any(1)
      edges = (columns[: 2 * spare + 1], columns[-2 * spare - 1 :])
      edges += (rows[: 2 * spare + 1], rows[-2 * spare - 1 :])
      assert all(edge.any() for edge in edges), record.caption
    assert not (has_ink & ~covered).any()
    edge = np.concatenate([has_ink[0], has_ink[-1], has_ink[:, 0], has_ink[:, -1]])
    assert not edge.any()


def _luminance(colour):
  share = np.array(colour) / 255
  linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
  return linear @ [0.2126, 0.7152, 0.0722]


def test_inks_contrast_with_every_background():
  """Contrast ratio of WCAG 2.1, which recommends 3 for large text; ours is 2.3 or more."""
  for ink, background in itertools.product(words.INKS, ('white', *shapes.TINTS)):
    dark, light = _luminance(shapes.COLOURS[ink]), _luminance(shapes.background_colour(background))
    assert (light + 0.05) / (dark + 0.05) > 2.2, (ink, background)


def test_images_are_varied(sample):
  writings = [record.truth.writing for record in sample]
  assert {len(w.words) for w in writings} == {1, 2, 3}
  assert {w.font for w in writings} == set(fonts.FONTS)
  assert {w.colour for w in writings} == set(words.INKS)
  assert {r.truth.background for r in sample} == {'white', *shapes.TINTS}
  assert {bool(r.truth.fade) for r in sample} == {True, False}
  texts = {word.text for w in writings for word in w.words}
  assert texts <= set(splits.trained_words()) and len(texts) > 450
  assert len({record.caption for record in sample}) > 580


@pytest.mark.parametrize('split', SPLITS)
def test_number_of_words_and_fonts_can_be_limited(split):
  config = DataConfig(source='words', most_words=1, fonts=('serif', 'rounded'), examples=60)
  records = list(open_source(config, split, seed=3))
  writings = [record.truth.writing for record in records]
  assert {len(w.words) for w in writings} == {1}
  assert {w.font for w in writings} == {'serif', 'rounded'}
  assert {record.split for record in records} == {split}


def test_unknown_font_is_named():
  with pytest.raises(UserError, match="config.data.fonts has 'serf'.*did you mean 'serif'"):
    open_source(DataConfig(source='words', fonts=('serf',)))


def test_fonts_render_every_word_differently():
  for word in vocabulary.written():
    extents = {fonts.ink(font, word) for font in fonts.FONTS}
    assert len(extents) == len(fonts.FONTS), word


def test_combinations_of_words_have_no_order(sample):
  def reversed_words(truth):
    writing = dataclasses.replace(truth.writing, words=truth.writing.words[::-1])
    return dataclasses.replace(truth, writing=writing)

  for record in sample:
    pairs = set(splits.combinations(record.truth))
    assert set(splits.combinations(reversed_words(record.truth))) == pairs
    count = len(record.truth.writing.words)
    assert len(pairs) == count + count * (count - 1) // 2


@pytest.mark.parametrize('split', SPLITS)
def test_images_belong_to_their_split(split):
  concepts = 0
  for index in range(200):
    record = words.word_image(1, index, split)
    assert record.split == splits.split_of_truth(record.truth) == split
    texts = {word.text for word in record.truth.writing.words}
    concepts += bool(texts & set(splits.held_out_words()))
    assert bool(splits.held_out(record.truth)) >= (split == 'combination')
  assert concepts == (200 if split == 'concept' else 0)


@pytest.mark.parametrize('split', SPLITS)
def test_captions_are_short_and_tokenize_without_loss(split):
  tokenizer = bpe.shipped()
  for index in range(300):
    caption = words.word_image(1, index, split).caption
    ids = tokenizer.encode(caption)
    assert len(ids) <= 52 and bpe.UNK not in ids and tokenizer.decode(ids) == caption
