"""The emoji of scenes, and the written words."""

from __future__ import annotations

from vpe_jax.data.embedded import drawings, vocabulary


def test_every_noun_has_its_own_drawing():
  emoji = vocabulary.emoji_codes()
  assert 100 <= len(emoji) <= 130
  assert len(set(emoji.values())) == len(emoji)
  assert set(emoji.values()) <= drawings.files().keys()


def test_written_words_are_short_and_plain():
  words = vocabulary.written()
  assert len(words) == len(set(words)) > 150
  assert all(word.isascii() and word.islower() and 2 <= len(word) <= 8 for word in words)
  assert {'fox', 'open', 'star', 'red'} < set(words) and 'palm tree' not in words


def test_plurals():
  assert [vocabulary.plural(n) for n in ('dog', 'mouse', 'sheep', 'cross', 'top hat')] == [
    'dogs',
    'mice',
    'sheep',
    'crosses',
    'top hats',
  ]
  for noun in vocabulary.emoji_codes():
    assert not noun.endswith(('s', 'x', 'ch')) or vocabulary.plural(noun) != f'{noun}s', noun
