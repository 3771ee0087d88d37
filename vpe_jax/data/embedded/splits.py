"""Held-out combinations and concepts: one fixed rule, the same for every run and seed.

A combination is a pair of parts that each occur in training, but never together: a shape with a
colour, a thing with a count, a thing with its place relative to another, a variant with its base,
two written words, a written word with its font. A concept is an emoji of which nothing occurs in
training: not in scenes, not as OpenMoji, not as a variant, not as a word of another emoji's name;
or a word that is never written.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable

from vpe_jax.data.embedded import shapes, vocabulary
from vpe_jax.data.records import SPLITS, Record, Split, Truth
from vpe_jax.storage import stable_hash

Combination = tuple[str, str, str]  # what kind of pair, and its two parts

OPPOSITE = {'left': 'right', 'right': 'left', 'above': 'below', 'below': 'above'}

# One of so many pairs of each kind is held out.
_ONE_IN = {'colour': 6, 'count': 8, 'relation': 8, 'variant': 10, 'words': 6, 'font': 10}
_CONCEPTS_ONE_IN = 12  # of the scene vocabulary
_FAMILIES_ONE_IN = 24  # of the OpenMoji families outside it
_WORDS_ONE_IN = 12  # of the words that are written


@functools.cache
def held_out_concepts() -> tuple[str, ...]:
  """Nouns of the scene vocabulary of which nothing occurs in training."""
  return tuple(
    name for name in vocabulary.emoji() if stable_hash('concept', name) % _CONCEPTS_ONE_IN == 0
  )


@functools.cache
def trained_concepts() -> tuple[str, ...]:
  """The other nouns of the scene vocabulary."""
  held = held_out_concepts()
  return tuple(name for name in vocabulary.emoji() if name not in held)


@functools.cache
def held_out_words() -> tuple[str, ...]:
  """Words that training never shows in writing."""
  words = vocabulary.written()
  return tuple(word for word in words if stable_hash('word', word) % _WORDS_ONE_IN == 0)


@functools.cache
def trained_words() -> tuple[str, ...]:
  """The other words that are written."""
  held = held_out_words()
  return tuple(word for word in vocabulary.written() if word not in held)


@functools.lru_cache(maxsize=65536)
def is_held_out(combination: Combination) -> bool:
  """Whether the rule keeps this pair out of training."""
  kind, first, second = combination
  if kind == 'count' and second == '1':
    return False
  return stable_hash(kind, first, second) % _ONE_IN[kind] == 0


def combinations(truth: Truth, stated: bool = False) -> tuple[Combination, ...]:
  """Every pair of parts that a picture shows; with `stated`, only those its caption names."""
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
  # Drawings of several people have a tone for each: rarely twice the same, so no combination.
  if truth.variant and sum('skin tone' in part for part in truth.variant) < 2:
    pairs.append(('variant', truth.base, ', '.join(truth.variant)))
  if truth.writing is not None:
    texts = [word.text for word in truth.writing.words]
    pairs += [('words', *sorted(pair)) for pair in itertools.combinations(texts, 2)]
    pairs += [('font', text, truth.writing.font) for text in texts]
  return tuple(pairs)


def held_out(truth: Truth, stated: bool = False) -> tuple[Combination, ...]:
  """The pairs of `combinations(truth, stated)` that are kept out of training."""
  return tuple(pair for pair in combinations(truth, stated) if is_held_out(pair))


def has_held_out_concept(truth: Truth) -> bool:
  """Whether anything in the picture belongs to a concept of which nothing is trained."""
  if truth.writing is not None:
    return any(word.text in held_out_words() for word in truth.writing.words)
  return any(
    is_concept(cluster.name, truth.base or cluster.code)
    for cluster in truth.clusters
    if cluster.kind == 'emoji'
  )


@functools.lru_cache(maxsize=16384)
def is_concept(name: str, base: str) -> bool:
  """Whether an emoji, by its name and the code of its family's base, is a held-out concept."""
  nouns = {code: noun for noun, code in vocabulary.emoji().items()}
  if base in nouns:
    return nouns[base] in held_out_concepts()
  if mentions(name, held_out_concepts()):
    return True
  # A family whose name holds a trained noun would not be unseen.
  if mentions(name, trained_concepts() + shapes.SHAPES):
    return False
  return stable_hash('family', base) % _FAMILIES_ONE_IN == 0


def mentions(text: str, nouns: Iterable[str]) -> bool:
  """Whether a text has one of the nouns as a word of its own, singular or plural."""
  words = ' '.join(re.findall(r'[a-z]+', text.lower()))
  return any(
    re.search(rf'\b({re.escape(noun)}|{re.escape(vocabulary.plural(noun))})\b', words)
    for noun in nouns
  )


def split_of_truth(truth: Truth) -> Split:
  """The split that a picture belongs to, whatever its caption says of it."""
  if has_held_out_concept(truth):
    return 'concept'
  return 'combination' if held_out(truth) else 'train'


def first_of(split: Split, compose: Callable[[], Truth]) -> Truth:
  """The first of the pictures that `compose` makes up which belongs to a split.

  What a held-out combination is held out for, its caption says too.
  """
  while True:
    truth = compose()
    if split_of_truth(truth) == split and (split != 'combination' or held_out(truth, stated=True)):
      return truth


def split_of_edit(before: Truth, after: Truth) -> Split:
  """The split of an edit from what its pictures show."""
  return of_both(split_of_truth(before), split_of_truth(after))


def of_both(before: Split, after: Split) -> Split:
  """The split of an edit from those of its pictures: it is training data if both are."""
  return max(before, after, key=SPLITS.index)


def split_of(record: Record) -> Split:
  """The split that a record belongs to; a picture of unknown content is training data."""
  if record.truth is None:
    return 'train'
  return split_of_edit(record.edit.before if record.edit else record.truth, record.truth)


def _coloured_shapes(name: str) -> list[tuple[str, str]]:
  """(shape, colour) for every pair of such words in an emoji's name: `purple heart`."""
  words = set(re.findall(r'[a-z]+', name.lower()))
  return [(s, c) for s in shapes.SHAPES if s in words for c in shapes.COLOURS if c in words]
