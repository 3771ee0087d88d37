"""Held-out combinations and concepts: one fixed rule for all runs and seeds.

A held-out combination is a pair of attributes that each occur in training, but never together:
shape and colour, object and count, object and relative position, base emoji and variant, two
written words, written word and font.

A held-out concept is a word that no training image shows in writing, or an emoji that no training
image shows, neither itself nor a variant. Emoji outside the vocabulary of scenes are also held out
if their names mention a held-out noun.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable

from vpe_jax.data.embedded import shapes, vocabulary
from vpe_jax.data.records import SPLITS, Split, Truth
from vpe_jax.storage import stable_hash

Combination = tuple[str, str, str]  # kind of pair, and its two attributes

OPPOSITE = {'left': 'right', 'right': 'left', 'above': 'below', 'below': 'above'}

# Kind of pair -> one pair in this many is held out.
_ONE_IN = {'colour': 6, 'count': 8, 'relation': 8, 'variant': 10, 'words': 6, 'font': 10}
# One in this many is held out. A family is a base emoji and its variants.
_CONCEPTS_ONE_IN = 12  # of the scene vocabulary
_FAMILIES_ONE_IN = 24  # of the OpenMoji families outside the scene vocabulary
_WORDS_ONE_IN = 12  # of the written words


@functools.cache
def held_out_concepts() -> tuple[str, ...]:
  """Nouns of the scene vocabulary that never occur in training."""
  return tuple(
    name
    for name in vocabulary.emoji_codes()
    if stable_hash('concept', name) % _CONCEPTS_ONE_IN == 0
  )


@functools.cache
def trained_concepts() -> tuple[str, ...]:
  """The other nouns of the scene vocabulary."""
  excluded = held_out_concepts()
  return tuple(name for name in vocabulary.emoji_codes() if name not in excluded)


@functools.cache
def held_out_words() -> tuple[str, ...]:
  """Written words that never occur in training."""
  words = vocabulary.written()
  return tuple(word for word in words if stable_hash('word', word) % _WORDS_ONE_IN == 0)


@functools.cache
def trained_words() -> tuple[str, ...]:
  """The other written words."""
  excluded = held_out_words()
  return tuple(word for word in vocabulary.written() if word not in excluded)


@functools.lru_cache(maxsize=65536)
def is_held_out(combination: Combination) -> bool:
  """Whether a combination is held out of training."""
  kind, first, second = combination
  if kind == 'count' and second == '1':
    return False
  return stable_hash(kind, first, second) % _ONE_IN[kind] == 0


def combinations(truth: Truth, stated: bool = False) -> tuple[Combination, ...]:
  """Every combination in an image; with `stated`, only those that the caption states."""
  pairs: list[Combination] = []
  for cluster in truth.clusters:
    pairs.append(('count', cluster.name, str(cluster.count)))
    if cluster.colour:
      pairs.append(('colour', cluster.name, cluster.colour))
    elif cluster.kind == 'emoji':
      pairs += [('colour', *pair) for pair in _coloured_shapes(cluster.name)]
  for relation in truth.relations:
    if relation.stated or not stated:
      first, second = (truth.clusters[i].name for i in (relation.first, relation.second))
      pairs.append(('relation', first, relation.word))
      pairs.append(('relation', second, OPPOSITE[relation.word]))
  # Emoji of several people have several tones, which rarely repeat: they form no combination.
  if truth.variant and sum('skin tone' in part for part in truth.variant) < 2:
    pairs.append(('variant', truth.base, ', '.join(truth.variant)))
  if truth.writing is not None:
    texts = [word.text for word in truth.writing.words]
    pairs += [('words', *sorted(pair)) for pair in itertools.combinations(texts, 2)]
    pairs += [('font', text, truth.writing.font) for text in texts]
  return tuple(pairs)


def held_out(truth: Truth, stated: bool = False) -> tuple[Combination, ...]:
  """The held-out pairs of `combinations(truth, stated)`."""
  return tuple(pair for pair in combinations(truth, stated) if is_held_out(pair))


def has_held_out_concept(truth: Truth) -> bool:
  """Whether the image contains a held-out concept."""
  if truth.writing is not None:
    return any(word.text in held_out_words() for word in truth.writing.words)
  return any(
    is_held_out_concept(cluster.name, truth.base or cluster.code)
    for cluster in truth.clusters
    if cluster.kind == 'emoji'
  )


@functools.lru_cache(maxsize=16384)
def is_held_out_concept(name: str, base: str) -> bool:
  """Whether an emoji is a held-out concept, by its name and the code of its base emoji."""
  nouns = {code: noun for noun, code in vocabulary.emoji_codes().items()}
  if base in nouns:
    return nouns[base] in held_out_concepts()
  if mentions(name, held_out_concepts()):
    return True
  # A family whose name contains a trained noun would not be unseen.
  if mentions(name, trained_concepts() + shapes.SHAPES):
    return False
  return stable_hash('family', base) % _FAMILIES_ONE_IN == 0


def mentions(text: str, nouns: Iterable[str]) -> bool:
  """Whether a text contains one of the nouns as a whole word, singular or plural."""
  words = ' '.join(re.findall(r'[a-z]+', text.lower()))
  return any(
    re.search(rf'\b({re.escape(noun)}|{re.escape(vocabulary.plural(noun))})\b', words)
    for noun in nouns
  )


def split_of_truth(truth: Truth) -> Split:
  """The split of an image, regardless of its caption."""
  if has_held_out_concept(truth):
    return 'concept'
  return 'combination' if held_out(truth) else 'train'


def sample_of_split(split: Split, compose: Callable[[], Truth]) -> Truth:
  """Rejection-samples a truth of a split.

  For `combination`, the caption must state the held-out combination.
  """
  while True:
    truth = compose()
    if split_of_truth(truth) == split and (split != 'combination' or held_out(truth, stated=True)):
      return truth


def split_of_edit(before: Truth, after: Truth) -> Split:
  """The split of an edit, from its source and target images."""
  return stricter_split(split_of_truth(before), split_of_truth(after))


def stricter_split(before: Split, after: Split) -> Split:
  """The split of an edit, from the splits of both images: `train` only if both are `train`."""
  return max(before, after, key=SPLITS.index)


def _coloured_shapes(name: str) -> list[tuple[str, str]]:
  """(shape, colour) for each pair of such words in the name of an emoji, as in `purple heart`."""
  words = set(re.findall(r'[a-z]+', name.lower()))
  return [(s, c) for s in shapes.SHAPES if s in words for c in shapes.COLOURS if c in words]
