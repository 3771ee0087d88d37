"""OpenMoji: names, groups, variants, captions."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from vpe_jax.data.embedded import openmoji
from vpe_jax.data.records import SPLITS, render
from vpe_jax.data.tokenizers import bpe


def test_emoji_have_names_and_groups():
  emojis = openmoji.emojis()
  assert len(emojis) > 3900
  assert emojis['1F415'].name == 'dog' and emojis['1F415'].group == 'animals'
  assert emojis['1F1EB-1F1F7'].phrase == 'the flag of France'
  groups = collections.Counter(item.group for item in emojis.values())
  assert len(groups) == 9 and min(groups.values()) > 50


@pytest.mark.parametrize(
  'code, base, variant',
  [
    ('1F44B-1F3FF', '1F44B', ('dark skin tone',)),
    ('1F469-1F3FD-200D-1F33E', '1F9D1-200D-1F33E', ('medium skin tone', 'woman')),
    ('1F468-200D-1F9B0', '1F9D1', ('red hair', 'man')),
    ('1F6B4-1F3FB-200D-2640', '1F6B4', ('light skin tone', 'woman')),
    ('1F415', '1F415', ()),
    ('1F1EB-1F1F7', '1F1EB-1F1F7', ()),
  ],
)
def test_base_of_a_variant(code, base, variant):
  item = openmoji.emojis()[code]
  assert (item.base, item.variant) == (base, variant)


def test_variants_of_a_base():
  hands = openmoji.variants('1F44B')
  assert [item.variant for item in hands] == [(tone,) for tone in openmoji.TONES]
  assert openmoji.variants('1F415') == ()
  for item in openmoji.emojis().values():
    assert not item.variant or item.base in openmoji.emojis()


def test_captions_are_varied_and_complete():
  item = openmoji.emojis()['1F44B-1F3FF']
  captions = {openmoji.caption_of(item, n) for n in range(100)}
  assert len(captions) > 8
  assert all('waving hand' in c and 'dark skin tone' in c for c in captions)


def test_a_larger_count_repeats_in_other_wordings():
  once = len(openmoji.of_split('train'))
  assert len(openmoji.OpenMoji()) == once > 3000
  twice = openmoji.OpenMoji(2 * once)
  assert twice[3].truth == twice[once + 3].truth
  assert twice[3].id != twice[once + 3].id
  assert sum(twice[i].caption != twice[once + i].caption for i in range(50)) > 25
  with pytest.raises(IndexError):
    twice[2 * once]


def test_the_first_records_mix_groups():
  source = openmoji.OpenMoji()
  assert len({source[i].group for i in range(64)}) >= 7


@pytest.mark.parametrize('split', SPLITS)
def test_captions_are_short(split):
  tokenizer = bpe.shipped()
  for item in openmoji.of_split(split):
    for number in range(3):
      assert len(tokenizer.encode(openmoji.caption_of(item, number))) <= 32


def test_records_render_their_drawings():
  source = openmoji.OpenMoji(count=8)
  images = [render(source[i], 64) for i in range(8)]
  assert all((p < 200).any() and (p[0] > 200).any() for p in images)
  assert len({p.tobytes() for p in images}) == 8
  np.testing.assert_array_equal(render(source[0], 64), images[0])
