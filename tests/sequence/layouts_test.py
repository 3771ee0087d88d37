"""Shared layouts have the masks of their docstrings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import visible
from vpe_jax.sequence import layouts
from vpe_jax.sequence.builder import build

ONE = jnp.ones((1,), bool)


def test_causal_text(masks):
  regions = build(layouts.causal_text(3), keep=ONE)
  np.testing.assert_array_equal(masks.of(regions)[0], masks.parse(layouts.causal_text.__doc__))
  padded = build(layouts.causal_text(3, predicts=True), lengths={'text': jnp.array([2])})
  np.testing.assert_array_equal(masks.of(padded)[0], [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(padded['text'].weights, [[1, 0, 0]])


def test_every_query_sees_every_key(masks):
  regions = build(layouts.cross_attention(2, 3), lengths={'keys': jnp.array([3, 2])})
  queries, keys = (regions[name].visibility for name in ('queries', 'keys'))
  whole, padded = np.asarray(visible(queries, keys)).astype(int)
  np.testing.assert_array_equal(whole, masks.parse(layouts.cross_attention.__doc__))
  np.testing.assert_array_equal(padded, whole * [1, 1, 0])


def test_teacher_forced_frames(masks):
  layout = layouts.teacher_forced_frames(2, 1, 1, 'row', 'row')
  mask = masks.parse(layouts.teacher_forced_frames.__doc__)
  np.testing.assert_array_equal(masks.of(build(layout, keep=ONE))[0], mask)


def test_teacher_forced_frames_in_two_experts_by_rule(masks):
  """reference: a rule on the kinds and frames of two tokens, and on their order within text."""
  frames, text, latents = 3, 2, 2
  layout = layouts.teacher_forced_frames(frames, text, latents)
  tokens = [(span, n) for span in layout.spans for n in range(span.length)]
  stored = [t for t in tokens if t[0].expert == 'text'] + [
    t for t in tokens if t[0].expert == 'image'
  ]

  def sees(query, key) -> bool:
    (query_span, i), (key_span, j) = query, key
    query_frame, query_kind = query_span.name.split('/')
    key_frame, key_kind = key_span.name.split('/')
    same_frame = query_frame == key_frame
    if query_kind == 'text':
      return key_kind == 'text' and same_frame and j <= i
    if query_kind == 'clean':
      return key_kind == 'clean' and key_frame <= query_frame
    is_past_clean = key_kind == 'clean' and key_frame < query_frame
    return (key_kind in ('text', 'noisy') and same_frame) or is_past_clean

  expected = [[sees(query, key) for key in stored] for query in stored]
  np.testing.assert_array_equal(masks.of(build(layout, keep=ONE))[0], expected)


def test_position_queries(masks):
  regions = build(layouts.position_queries(1, 1, 2), keep=ONE)
  mask = masks.parse(layouts.position_queries.__doc__)
  np.testing.assert_array_equal(masks.of(regions)[0], mask)


def test_position_queries_are_all_at_the_next_position():
  region = build(layouts.position_queries(2, 2, 2), keep=ONE)['decoder']
  pairs = [2, 3, 4, 5], [6, 7, 8, 9]
  np.testing.assert_array_equal(region.positions[0], [0, 1, 2, 2, *pairs[0], 6, 6, *pairs[1]])
