"""Converts Unicode names of emoji to English noun phrases."""

from __future__ import annotations

import re

_PLURAL = re.compile(r'[^suo]s$')  # `grapes`, but not `dress`, `octopus` or `rhinoceros`

# Names that end in one of these words take no article.
_MASS = frozenset(
  'bread broccoli garlic butter salt bacon honey cheese rice ice fire fog sushi ginger tofu mate '
  'lacrosse money tennis boxing bowling camping badminton hockey yarn thread luggage popcorn coral '
  'way voltage construction flatbread fondue foggy sake oden cooking pong golf spaghetti unlocked '
  'locked spiral arts clothes japan karate'.split()
)

# Names of faces, people, body parts and symbols take an article if they start or end with one of
# these words.
_HEADS = frozenset(
  'face cat monkey heart skull ghost bubble mark poo robot ogre goblin arrow button sign man woman '
  'person boy girl baby child elf fairy genie mage merperson mermaid merman vampire zombie troll '
  'superhero supervillain cook farmer singer pilot artist detective guard ninja prince princess '
  'king queen hand fist finger ear nose foot leg eye tongue mouth brain tooth bone flag letter '
  'cloud balloon monster alien hole worker officer student teacher judge scientist technologist '
  'astronaut firefighter mechanic snowboarder handshake circle square diamond triangle star family '
  'couple kiss cross arm'.split()
)

_PAIRED = re.compile(r'^(kiss|couple with heart|family) ((?:man|woman|person|boy|girl)[ a-z]*)$')


def readable(name: str) -> str:
  """Reorders a Unicode name: `woman bald` becomes `bald woman`."""
  name = re.sub(r'\b(red|white|curly|blond) hair\b', r'with \1 hair', name)
  name = re.sub(r'^(man|woman|person) bald$', r'bald \1', name)
  name = re.sub(r'\b(man|woman|person) beard$', r'\1 with beard', name)
  match = _PAIRED.match(name)
  if match:
    people = match[2].split()
    name = f'{match[1]} of {", ".join(people[:-1])} and {people[-1]}'.replace('of  and ', 'of ')
  return name


def noun_phrase(name: str, group: str, code: str) -> str:
  """The name with an article, if English needs one."""
  words = name.split()
  is_noun = words[0] in _HEADS or words[-1] in _HEADS
  if group == 'flags':
    is_country = len(code.split('-')) > 1 and not name.endswith(' flag')
    return f'the flag of {name}' if is_country else with_article(name)
  if group == 'symbols':
    return with_article(name) if is_noun else f'the symbol {name}'
  if group in ('smileys', 'people'):
    return with_article(name) if is_noun or 'face' in words else name
  is_proper = words[0][0].isupper() and words[0] not in ('Christmas', 'Japanese')
  if _PLURAL.search(words[-1]) or words[-1] in _MASS or is_proper:
    return name
  return with_article(name)


def with_article(noun: str) -> str:
  """The noun with its indefinite article: `a dog`, `an owl`."""
  vowel = noun[0] in 'aeiouAEIOU' and not noun.lower().startswith(('uni', 'one', 'euro', 'ewe'))
  return f'{"an" if vowel else "a"} {noun}'
