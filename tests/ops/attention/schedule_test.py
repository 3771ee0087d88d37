"""Block pairs: those with a visible pair are never skipped, and few others are visited."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import Visibility, visible
from vpe_jax.ops.attention import schedule
from vpe_jax.ops.attention.schedule import FULL, PARTIAL, SKIP
from vpe_jax.sequence.builder import NEVER

_pairs = jax.jit(schedule.block_status, static_argnums=(2, 3))


def _needed(query: Visibility, key: Visibility, rows: int, columns: int) -> np.ndarray:
  """Number of visible token pairs in each block pair, from the dense mask: [B, I, J]."""
  # In numpy, as jax would compile for each of many shapes.
  query, key = (jax.tree.map(np.asarray, side) for side in (query, key))
  mask = visible(query, key)
  B, L, S = mask.shape
  mask = np.pad(mask, ((0, 0), (0, -L % rows), (0, -S % columns)))
  return mask.reshape(B, -(-L // rows), rows, -(-S // columns), columns).sum((2, 4))


def _check(query: Visibility, key: Visibility, rows: int, columns: int) -> tuple[int, int]:
  """Checks that SKIP blocks have no visible pair, and FULL blocks only visible pairs.

  Returns:
    Numbers of visited and of needed block pairs.
  """
  status = np.asarray(_pairs(query, key, rows, columns))
  needed = _needed(query, key, rows, columns)
  assert not (status[needed > 0] == SKIP).any()
  assert (needed[status == FULL] == rows * columns).all()
  return int((status != SKIP).sum()), int((needed > 0).sum())


def test_causal_text_visits_its_triangle(masks):
  text, _ = masks.causal(4096)
  status = schedule.block_status(text, text, 128, 128)
  assert int(jnp.sum(status != SKIP)) == 528
  assert int(jnp.sum(status == PARTIAL)) == 32  # the diagonal; all blocks below are full
  half = schedule.padded(text[:, :2048], 4096)
  status = schedule.block_status(half, half, 128, 128)
  assert int(jnp.sum(status != SKIP)) == 136


def test_packed_sequences_of_one_expert_visit_only_needed_pairs(masks):
  for samples in (((30, 348),) * 27, ((100, 57), (1, 300), (249, 1025), (17, 256))):
    visited, needed = _check(*masks.packed(samples), 256, 256)
    assert visited == needed
  for mask in (masks.causal(500), masks.transfusion(249, 1025, 2), masks.sliding(700, 90)):
    visited, needed = _check(*mask, 128, 64)
    assert visited == needed


def test_packed_sequences_of_two_experts_visit_few_unneeded_pairs(masks):
  generator = np.random.default_rng(0)
  for count in (3, 6, 8):
    samples = [(int(generator.integers(590, 830)), 1025) for _ in range(count)]
    visited, needed = _check(*masks.packed_two(samples, 16), 256, 256)
    assert needed <= visited <= 1.35 * needed


def test_no_visible_pair_of_random_sequences_is_skipped():
  generator = np.random.default_rng(1)
  for _ in range(200):
    order = generator.permutation(90)
    since = order - generator.integers(0, 40, 90) * generator.integers(0, 2, 90)
    reach = order + generator.integers(0, 30, 90)
    until = np.where(generator.random(90) < 0.5, order + generator.integers(0, 20, 90), NEVER)
    fields = np.stack([order, since, reach, until]) * (generator.random(90) < 0.8)
    tokens = Visibility(*(jnp.asarray(x[None], jnp.int32) for x in fields))
    status, needed = np.asarray(_pairs(tokens, tokens, 16, 8)), _needed(tokens, tokens, 16, 8)
    assert not (status[needed > 0] == SKIP).any()
    assert (needed[status == FULL] == 16 * 8).all()
  assert (status == SKIP).any() and (status == PARTIAL).any()


def test_a_block_with_one_invisible_pair_is_not_full(masks):
  _check(*masks.sliding(128, 47), 32, 16)  # the last key of a window
  _check(*masks.prefix(17, 19), 8, 9)  # the first future key


@pytest.mark.parametrize('rows, columns', [(16, 8), (32, 32), (10, 50)])
def test_no_visible_pair_of_the_systems_is_skipped(masks, rows, columns):
  full = 0
  for mask in masks.sized.values():
    _check(*mask, rows, columns)
    full += int((_pairs(*mask, rows, columns) == FULL).sum())
  assert full > 0


def test_absent_tokens_do_not_widen_the_bounds(masks):
  text, _ = masks.causal(256)
  holes = jnp.arange(256) % 7 == 3
  with_holes = jax.tree.map(lambda x: jnp.where(holes, 0, x), text)
  visited, needed = _check(with_holes, with_holes, 32, 32)
  assert visited == needed == 36
  # A block with absent keys is never full.
  assert not (schedule.block_status(with_holes, with_holes, 32, 32) == FULL).any()


def test_visits_list_blocks_in_order_then_repeat_the_last():
  status = jnp.array([[[SKIP, FULL, SKIP, PARTIAL], [SKIP] * 4]])
  blocks, kinds = schedule.block_of(schedule.visits(status))
  np.testing.assert_array_equal(kinds, [[[FULL, PARTIAL, SKIP, SKIP], [SKIP] * 4]])
  np.testing.assert_array_equal(blocks[0, 0], [1, 3, 3, 3])
  assert len(set(np.asarray(blocks[0, 1]))) == 1
