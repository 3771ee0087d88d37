"""Unicode names of emoji as English phrases."""

from __future__ import annotations

import pytest

from vpe_jax.data.embedded.naming import noun_phrase, readable, with_article


@pytest.mark.parametrize(
  'listed, name',
  [
    ('woman red hair', 'woman with red hair'),
    ('man bald', 'bald man'),
    ('woman beard', 'woman with beard'),
    ('family man woman girl', 'family of man, woman and girl'),
    ('kiss woman man', 'kiss of woman and man'),
    ('family', 'family'),
    ('dog face', 'dog face'),
  ],
)
def test_readable(listed, name):
  assert readable(listed) == name


@pytest.mark.parametrize(
  'name, group, code, phrase',
  [
    ('owl', 'animals', '1F989', 'an owl'),
    ('grapes', 'food', '1F347', 'grapes'),
    ('rice', 'food', '1F35A', 'rice'),
    ('Fiji', 'flags', '1F1EB-1F1EF', 'the flag of Fiji'),
    ('pirate flag', 'flags', '1F3F4-200D-2620', 'a pirate flag'),
    ('grinning face', 'smileys', '1F600', 'a grinning face'),
    ('thumbs up', 'people', '1F44D', 'thumbs up'),
    ('Aries', 'symbols', '2648', 'the symbol Aries'),
    ('up arrow', 'symbols', '2B06', 'an up arrow'),
    ('Statue of Liberty', 'travel', '1F5FD', 'Statue of Liberty'),
    ('Christmas tree', 'activities', '1F384', 'a Christmas tree'),
  ],
)
def test_noun_phrase(name, group, code, phrase):
  assert noun_phrase(name, group, code) == phrase


def test_articles():
  nouns = ('owl', 'dog', 'unicorn', 'umbrella', 'ewe')
  assert [with_article(n) for n in nouns] == [
    'an owl',
    'a dog',
    'a unicorn',
    'an umbrella',
    'a ewe',
  ]
