"""Edits of OpenMoji: two variants of one emoji that differ in skin tone, hair or gender alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

from vpe_jax.data.embedded import openmoji, splits
from vpe_jax.data.embedded.naming import with_article
from vpe_jax.data.embedded.openmoji import Emoji
from vpe_jax.data.embedded.painting import Drawing
from vpe_jax.data.records import Edit, Record, Split
from vpe_jax.storage import stable_hash

KINDS = ('skin tone', 'hair', 'gender')

_TONE = ('change the skin tone to {}', 'make the skin tone {}', 'give it a {} skin tone')
_HAIR = ('give the {} {}', 'change the hair of the {} to {}')
_BALD = ('make the {} {}', 'turn the {} {}')
_GENDER = ('change the {} into {}', 'turn the {} into {}', 'replace the {} with {}')
_NO_TONE = 'yellow'  # what a drawing without skin tone shows
_PERSON = 'person'  # what one without gender is called


@dataclasses.dataclass(frozen=True)
class EmojiEdits:
  """Pairs of variants of one split as a source.

  Attributes:
    count: number of records; 0 means each pair once. Past the end they come again, in other words.
    split: which part of all pairs.
    seed: another seed gives other words.
  """

  count: int = 0
  split: Split = 'train'
  seed: int = 0

  def __len__(self) -> int:
    return self.count or len(pairs(self.split))

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'edit of an emoji {index} of {len(self)}')
    turn, place = divmod(index, len(pairs(self.split)))
    kind, before, after = pairs(self.split)[place]
    words = stable_hash('emoji edit', self.seed, index) % 4096
    return Record(
      id=f'emoji_edit/{before.code}/{after.code}/{turn}',
      caption=_instruction(kind, before, after, words),
      group=after.group,
      split=self.split,
      image=Drawing(after.code),
      truth=openmoji.truth_of(after),
      wording=words,
      reference=Drawing(before.code),
      edit=Edit(kind, openmoji.truth_of(before)),
    )


@functools.cache
def pairs(split: Split) -> tuple[tuple[str, Emoji, Emoji], ...]:
  """(what changes, before, after) of every pair of one split, in a fixed order that mixes them."""
  found = []
  held = {c: splits.split_of_truth(openmoji.truth_of(i)) for c, i in openmoji.emojis().items()}
  for base in {item.base for item in openmoji.emojis().values() if item.variant}:
    members = [openmoji.emojis()[base], *openmoji.variants(base)]
    aspects = {item.code: _aspects(item) for item in members}
    # Drawings of several people: an instruction would have to say whose tone or gender is meant.
    members = [item for item in members if all(len(part) < 2 for part in aspects[item.code])]
    for before, after in itertools.permutations(members, 2):
      old, new = aspects[before.code], aspects[after.code]
      kinds = [kind for kind, was, now in zip(KINDS, old, new, strict=True) if was != now]
      # Nobody says what hair it is that a drawing without any word for it shows.
      if len(kinds) == 1 and (kinds != ['hair'] or new[1]):
        if splits.of_both(held[before.code], held[after.code]) == split:
          found.append((kinds[0], before, after))
  return tuple(sorted(found, key=lambda pair: stable_hash('pair', pair[1].code, pair[2].code)))


def _aspects(item: Emoji) -> tuple[tuple[str, ...], ...]:
  """Skin tones, hair and genders of a drawing: what KINDS name."""
  of = lambda known: tuple(word for word in item.variant if word in known)
  return item.tones, of(openmoji.HAIR), of(openmoji.GENDERS)


def _instruction(kind: str, before: Emoji, after: Emoji, wording: int) -> str:
  """The instruction that turns one drawing into the other, phrased as `wording` chooses."""
  choose = random.Random(stable_hash('wording of edits', wording))
  who = (_aspects(before)[2] or (_PERSON,))[0]
  tones, hair, genders = _aspects(after)
  if kind == 'skin tone':
    tone = tones[0].removesuffix(' skin tone') if tones else _NO_TONE
    return choose.choice(_TONE).format(tone)
  if kind == 'hair':
    return choose.choice(_BALD if hair == ('bald',) else _HAIR).format(who, hair[0])
  return choose.choice(_GENDER).format(who, with_article((genders or (_PERSON,))[0]))
