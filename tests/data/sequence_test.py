"""Rows of tokens: masks as drawn, positions without gaps, drops, targets."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import concatenate, visible
from vpe_jax.data import sequence

VOCABULARY = sequence.Vocabulary(text=10, codes=4, bos=1, boi=2)
SPANS = sequence.text_to_image(text=3, codes=2, latents=2)


def _build(lengths: list[int], keep: list[bool], multiple: int = 1):
  B = len(lengths)
  text = jnp.broadcast_to(jnp.array([5, 6, 7]), (B, 3))
  codes = jnp.broadcast_to(jnp.array([0, 3]), (B, 2))
  return sequence.build(
    SPANS, VOCABULARY, text, jnp.array(lengths), codes, jnp.array(keep), multiple
  )


def _mask(regions) -> np.ndarray:
  row = concatenate([region.visibility for region in regions.values()])
  return np.asarray(visible(row, row)).astype(int)


def test_mask_as_drawn():
  """bos, 2 of 3 text tokens, bot, 2 codes, eot, boi | time, 2 latents: causal, then full."""
  drawn = """
    1 0 0 0 0 0 0 0 0 0 0 0
    1 1 0 0 0 0 0 0 0 0 0 0
    1 1 1 0 0 0 0 0 0 0 0 0
    0 0 0 0 0 0 0 0 0 0 0 0
    1 1 1 0 1 0 0 0 0 0 0 0
    1 1 1 0 1 1 0 0 0 0 0 0
    1 1 1 0 1 1 1 0 0 0 0 0
    1 1 1 0 1 1 1 1 0 0 0 0
    1 1 1 0 1 1 1 1 1 0 0 0
    1 1 1 0 1 1 1 1 1 1 1 1
    1 1 1 0 1 1 1 1 1 1 1 1
    1 1 1 0 1 1 1 1 1 1 1 1
  """
  wanted = np.array([[int(x) for x in line.split()] for line in drawn.strip().splitlines()])
  np.testing.assert_array_equal(_mask(_build([2], [True]))[0], wanted)


def test_ids_targets_and_weights():
  region = _build([2], [True])['ar']
  np.testing.assert_array_equal(region.ids[0], [1, 5, 6, 7, 14, 10, 13, 15, 2])
  np.testing.assert_array_equal(region.weights[0], [0, 0, 0, 0, 1, 1, 1, 0, 0])
  # [bot] predicts the first code, the last code predicts [eot].
  np.testing.assert_array_equal(region.targets[0, 4:7], [10, 13, 15])


def test_positions_count_present_tokens():
  regions = _build([2, 3, 0], [True, True, True])
  np.testing.assert_array_equal(regions['ar'].positions[0], [0, 1, 2, 0, 3, 4, 5, 6, 7])
  np.testing.assert_array_equal(regions['ar'].positions[1], [0, 1, 2, 3, 4, 5, 6, 7, 8])
  np.testing.assert_array_equal(regions['dit'].positions[:, 0], [8, 9, 6])


def test_dropped_condition_leaves_bos_and_boi():
  regions = _build([3], [False])
  present = np.asarray(regions['ar'].visibility.until[0] > 0)
  np.testing.assert_array_equal(present, [1, 0, 0, 0, 0, 0, 0, 0, 1])
  np.testing.assert_array_equal(regions['dit'].positions[0], [2, 3, 4])
  assert float(regions['ar'].weights.sum()) == 0
  mask = _mask(regions)[0]
  np.testing.assert_array_equal(mask[9:].sum(1), [5, 5, 5])
  assert mask[1:8].sum() == 0 and mask[:, 1:8].sum() == 0


@pytest.mark.parametrize('multiple', [4, 16])
def test_padding_changes_nothing(multiple):
  plain, padded = _build([2, 1], [True, False]), _build([2, 1], [True, False], multiple)
  for expert, region in plain.items():
    length = region.ids.shape[1]
    assert padded[expert].ids.shape[1] % multiple == 0
    pairs = zip(jax.tree.leaves(region), jax.tree.leaves(padded[expert]), strict=True)
    for before, after in pairs:
      np.testing.assert_array_equal(before, after[:, :length])
      assert not np.any(after[:, length:])


def test_places():
  assert sequence.place(SPANS, 'codes') == (5, 7)
  assert sequence.place(SPANS, 'latents') == (1, 3)
  assert sequence.region_length(SPANS, 'ar', 16) == 16
  with pytest.raises(KeyError):
    sequence.place(SPANS, 'video')


def test_picture_row_has_the_mask_that_its_docstring_draws():
  drawing = re.findall(r'^ +\w+((?: +[01])+)$', sequence.picture_row.__doc__, re.MULTILINE)
  wanted = np.array([[int(x) for x in line.split()] for line in drawing])
  codes = jnp.zeros((2, 2), jnp.int32)
  row = sequence.picture_row(codes=2, latents=2)
  regions = sequence.build(row, VOCABULARY, None, None, codes, jnp.array([True, False]), 4)
  assert [region.ids.shape[1] for region in regions.values()] == [4, 4]
  present = np.array([0, 1, 2, 4, 5, 6])  # Each region is padded by one.
  whole, dropped = _mask(regions)
  np.testing.assert_array_equal(whole[present][:, present], wanted)
  np.testing.assert_array_equal(dropped[present][:, present], wanted * (present > 1))
  assert whole.sum() == wanted.sum() and dropped.sum() == wanted[:, 2:].sum()
  positions = np.concatenate([region.positions for region in regions.values()], 1)[:, present]
  np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])


def test_without_codes_the_row_is_show_o2s():
  spans = sequence.text_to_image(text=3, codes=0, latents=2)
  assert [span.kind for span in spans] == ['bos', 'text', 'boi', 'time', 'latents']
  vocabulary, none = sequence.Vocabulary(10, 0, 1, 2), jnp.zeros((2, 0), jnp.int32)
  text, keep = jnp.broadcast_to(jnp.array([5, 6, 7]), (2, 3)), jnp.array([True, False])
  regions = sequence.build(spans, vocabulary, text, jnp.array([2, 3]), none, keep)
  np.testing.assert_array_equal(regions['ar'].ids[0], [1, 5, 6, 7, 2])
  np.testing.assert_array_equal(regions['ar'].positions, [[0, 1, 2, 0, 3], [0, 0, 0, 0, 1]])
  np.testing.assert_array_equal(regions['dit'].positions, [[4, 5, 6], [2, 3, 4]])
  assert not regions['ar'].weights.any()
  np.testing.assert_array_equal(_mask(regions)[0][5:], [[1, 1, 1, 0, 1, 1, 1, 1]] * 3)


def test_token_row_is_the_joint_row_before_boi():
  assert sequence.token_row(3, 2) == SPANS[:5] and SPANS[5].kind == 'boi'
