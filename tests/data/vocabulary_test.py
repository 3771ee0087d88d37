"""The emoji of scenes."""

from __future__ import annotations

from vpe_jax.data import drawings, vocabulary


def test_every_noun_has_its_own_drawing():
  emoji = vocabulary.emoji()
  assert 100 <= len(emoji) <= 130
  assert len(set(emoji.values())) == len(emoji)
  assert set(emoji.values()) <= drawings.files().keys()


def test_plurals():
  assert [vocabulary.plural(n) for n in ('dog', 'mouse', 'sheep', 'cross', 'top hat')] == [
    'dogs',
    'mice',
    'sheep',
    'crosses',
    'top hats',
  ]
  for noun in vocabulary.emoji():
    assert not noun.endswith(('s', 'x', 'ch')) or vocabulary.plural(noun) != f'{noun}s', noun
