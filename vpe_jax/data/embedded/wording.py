"""Captions of ground truths in varied wording, selected by a number.

The same number gives different truths the same wording as far as their content allows, so that
distractors read like the true caption.
"""

from __future__ import annotations

import random
from typing import Any

from vpe_jax.data.embedded import vocabulary
from vpe_jax.data.embedded.naming import with_article
from vpe_jax.data.records import Cluster, Truth
from vpe_jax.storage import stable_hash

_NUMBERS = ('no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')

_FRAMES = (
  '{}',
  '{}',
  '{}',
  'a picture of {}',
  'an image of {}',
  'a drawing of {}',
  'there {be} {}',
)
_RELATIONS = {
  'left': ('to the left of', 'left of', 'on the left of'),
  'right': ('to the right of', 'right of', 'on the right of'),
  'above': ('above', 'above', 'over'),
  'below': ('below', 'under', 'beneath'),
}
_TOGETHER = ('{} and {}', '{} and {}', '{} next to {}', '{} with {}')
_BACKGROUNDS = ('on a {} background', 'on {}', 'against a {} background')
_SIZES = {'small': ('small', 'small', 'little'), 'large': ('large', 'big', 'large')}

_EMOJI_FRAMES = (
  '{}',
  '{}',
  'an emoji of {}',
  'a picture of {}',
  'a drawing of {}',
  'an icon of {}',
  '{} on a white background',
)
_TONES = (('{} with {}', '{} and {}'), ('{}, {}', '{}, {}'))  # first and further skin tones


def caption(truth: Truth, wording: int) -> str:
  """The caption of a scene, in the words that the number `wording` chooses."""
  # All choices are sampled even if unused, so that other truths get the same wording.
  choose = random.Random(stable_hash('wording', wording))
  frame, relation, together, background = (choose.random() for _ in range(4))
  sizes = choose.random()
  mentions_white = choose.random() < 0.2
  phrases = [noun_phrase(cluster, int(3 * sizes)) for cluster in truth.clusters]
  if len(phrases) == 1:
    body = phrases[0]
  elif truth.relations[0].stated:
    body = f'{phrases[0]} {relation_phrase(truth.relations[0].word, relation)} {phrases[1]}'
  else:
    body = _pick(_TOGETHER, together).format(*phrases)
  be = 'is' if truth.clusters[0].count == 1 else 'are'
  text = _pick(_FRAMES, frame).format(body, be=be)
  if truth.background != 'white' or mentions_white:
    text += ' ' + _pick(_BACKGROUNDS, background).format(truth.background)
  return text


def emoji_caption(phrase: str, skin_tones: tuple[str, ...], wording: int) -> str:
  """The caption of an OpenMoji image: noun phrase and skin tones."""
  choose = random.Random(stable_hash('wording', wording))
  frame, tones = choose.random(), choose.random()
  first, second = _pick(_TONES, tones)
  for index, word in enumerate(skin_tones):
    phrase = (first if index == 0 else second).format(phrase, word)
  return _pick(_EMOJI_FRAMES, frame).format(phrase)


def noun_phrase(cluster: Cluster, size_word: int = 0) -> str:
  """Indefinite phrase: `three red circles`, `a small owl`; `size_word` selects a synonym."""
  noun = _noun(cluster, size_word)
  return with_article(noun) if cluster.count == 1 else f'{_NUMBERS[cluster.count]} {noun}'


def known_phrase(cluster: Cluster) -> str:
  """Definite phrase: `the three red circles`, `the small owl`."""
  count = '' if cluster.count == 1 else f'{_NUMBERS[cluster.count]} '
  return f'the {count}{_noun(cluster, 0)}'


def relation_phrase(word: str, fraction: float) -> str:
  """A phrase for left, right, above or below; `fraction` in [0, 1) selects a synonym."""
  return _pick(_RELATIONS[word], fraction)


def _noun(cluster: Cluster, size_word: int) -> str:
  words = []
  if cluster.size:
    words.append(_SIZES[cluster.size][size_word])
  if cluster.colour:
    words.append(cluster.colour)
  words.append(cluster.name if cluster.count == 1 else vocabulary.plural(cluster.name))
  return ' '.join(words)


def _pick(options: tuple[Any, ...], fraction: float) -> Any:
  """The option at a fraction in [0, 1) of the list."""
  return options[int(fraction * len(options))]
