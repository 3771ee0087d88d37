"""The builder: masks, positions without gaps, dropped spans, targets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.sequence.builder import build
from vpe_jax.sequence.spans import Layout, Span

ONE = jnp.ones((1,), bool)
LAYOUT = Layout(
  (
    Span('bos', 1, 'ar', id=1),
    Span('text', 3, 'ar', predicts=True, condition='prompt'),
    Span('boi', 1, 'ar', id=2),
    Span('time', 1, 'dit', full=True),
    Span('latents', 2, 'dit', full=True),
  )
)


def _build(lengths, keep, multiple=1):
  text = jnp.broadcast_to(jnp.array([5, 6, 7]), (len(lengths), 3))
  args = ({'text': text}, {'text': jnp.array(lengths)}, jnp.array(keep))
  return build(LAYOUT, *args, multiple)


def test_absent_tokens_see_nothing_and_are_not_seen(masks):
  """bos, 2 of 3 text tokens, boi | time, 2 latents; then the same without text."""
  whole, dropped = masks.of(_build([2, 2], [True, False]))
  np.testing.assert_array_equal(
    whole,
    masks.parse("""
      1 0 0 0 0 0 0 0
      1 1 0 0 0 0 0 0
      1 1 1 0 0 0 0 0
      0 0 0 0 0 0 0 0
      1 1 1 0 1 0 0 0
      1 1 1 0 1 1 1 1
      1 1 1 0 1 1 1 1
      1 1 1 0 1 1 1 1
    """),
  )
  np.testing.assert_array_equal(
    dropped,
    masks.parse("""
      1 0 0 0 0 0 0 0
      0 0 0 0 0 0 0 0
      0 0 0 0 0 0 0 0
      0 0 0 0 0 0 0 0
      1 0 0 0 1 0 0 0
      1 0 0 0 1 1 1 1
      1 0 0 0 1 1 1 1
      1 0 0 0 1 1 1 1
    """),
  )


def test_positions_count_present_tokens():
  regions = _build([2, 3, 0, 3], [True, True, True, False])
  np.testing.assert_array_equal(
    regions['ar'].positions,
    [[0, 1, 2, 0, 3], [0, 1, 2, 3, 4], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]],
  )
  np.testing.assert_array_equal(regions['dit'].positions[:, 0], [4, 5, 2, 2])


def test_the_last_present_token_predicts_the_next_span():
  region = _build([2, 3, 3], [True, True, False])['ar']
  np.testing.assert_array_equal(region.ids[0], [1, 5, 6, 7, 2])
  np.testing.assert_array_equal(region.targets, [[0, 6, 2, 0, 0], [0, 6, 7, 2, 0], [0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(region.weights > 0, region.targets > 0)
  assert region.weights.dtype == jnp.float32


def test_a_target_skips_dropped_spans_and_the_end_predicts_nothing():
  spans = (
    Span('a', 1, 'ar', predicts=True, id=3),
    Span('b', 1, 'ar', condition='b', id=4),
    Span('c', 2, 'ar', predicts=True),
  )
  contents = {'c': jnp.array([[5, 6], [5, 6]])}
  region = build(Layout(spans), contents, keep={'b': jnp.array([True, False])})['ar']
  np.testing.assert_array_equal(region.targets, [[4, 0, 6, 0], [5, 0, 6, 0]])
  np.testing.assert_array_equal(region.weights, [[1, 0, 1, 0], [1, 0, 1, 0]])


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


def test_compiled_equals_eager():
  arrays = (jnp.array([1, 3]), jnp.array([True, False]))
  eager, compiled = _build(*arrays), jax.jit(_build, static_argnums=())(*arrays)
  for ours, theirs in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_full_spans_of_different_frames_are_separate_blocks(masks):
  span = lambda name, frame: Span(name, 1, 'ar', full=True, frame=frame)
  layout = Layout((span('a', 0), span('b', 0), span('c', None), span('d', None), span('e', 1)))
  np.testing.assert_array_equal(
    masks.of(build(layout, keep=ONE))[0],
    masks.parse("""
      1 1 0 0 0
      1 1 0 0 0
      1 1 1 1 0
      1 1 1 1 0
      1 1 1 1 1
    """),
  )


def test_seen_by_block_hides_a_block_from_later_spans(masks):
  spans = (
    Span('a', 1, 'ar'),
    Span('x', 2, 'ar', full=True, seen_by='block'),
    Span('b', 2, 'ar', seen_by='block'),
    Span('c', 1, 'ar'),
  )
  np.testing.assert_array_equal(
    masks.of(build(Layout(spans), keep=ONE))[0],
    masks.parse("""
      1 0 0 0 0 0
      1 1 1 0 0 0
      1 1 1 0 0 0
      1 0 0 1 0 0
      1 0 0 1 1 0
      1 0 0 0 0 1
    """),
  )


def test_a_frame_starts_and_ends_with_its_present_tokens(masks):
  """A frame of a droppable span, two of three tokens of text, and an image."""
  frame = {'frame': 'f', 'sees': 'frame', 'seen_by': 'frame'}
  spans = (
    Span('before', 1, 'ar'),
    Span('drop', 1, 'ar', condition='drop', **frame),
    Span('text', 3, 'ar', **frame),
    Span('image', 1, 'dit', full=True, frame='f'),
    Span('after', 1, 'ar'),
  )
  options = {'lengths': {'text': jnp.array([2, 2])}, 'keep': {'drop': jnp.array([True, False])}}
  whole, dropped = masks.of(build(Layout(spans), **options))
  expected = masks.parse("""
      1 0 0 0 0 0 0
      0 1 0 0 0 0 0
      0 1 1 0 0 0 0
      0 1 1 1 0 0 0
      0 0 0 0 0 0 0
      1 0 0 0 0 1 1
      1 1 1 1 0 0 1
  """)  # Stored: before, drop, text, after | image.
  np.testing.assert_array_equal(whole, expected)
  expected[1] = expected[:, 1] = 0
  np.testing.assert_array_equal(dropped, expected)


def test_a_window_never_cuts_a_block(masks):
  spans = (Span('text', 2, 'ar', window=2), Span('image', 3, 'ar', full=True, window=2))
  layout = Layout((*spans, Span('after', 2, 'ar', window=2)))
  np.testing.assert_array_equal(
    masks.of(build(layout, keep=ONE))[0],
    masks.parse("""
      1 0 0 0 0 0 0
      1 1 0 0 0 0 0
      0 1 1 1 1 0 0
      0 0 1 1 1 0 0
      0 0 1 1 1 0 0
      0 0 0 0 1 1 0
      0 0 0 0 0 1 1
    """),
  )


def test_shared_positions():
  """Neighbouring shared spans have one position; the next span has the following one."""
  shared = {'full': True, 'shared_position': True, 'expert': 'ar'}
  spans = (
    Span('text', 2, 'ar'),
    Span('time', 1, **shared),
    Span('latents', 2, **shared),
    Span('other', 2, frame=1, condition='other', **shared),
    Span('after', 2, 'ar'),
  )
  region = build(Layout(spans), keep=jnp.array([True, False]))['ar']
  np.testing.assert_array_equal(region.positions[0], [0, 1, 2, 2, 2, 3, 3, 4, 5])
  # Dropped, the span takes no position.
  np.testing.assert_array_equal(region.positions[1], [0, 1, 2, 2, 2, 0, 0, 3, 4])


@pytest.mark.parametrize(
  'message, arguments',
  [
    ('caption', {'contents': {'caption': jnp.zeros((1, 3), jnp.int32)}}),
    ('caption', {'lengths': {'caption': jnp.array([1])}}),
    ('text', {'contents': {'text': jnp.zeros((1, 2), jnp.int32)}, 'keep': ONE}),
    ('keep', {'lengths': {'text': jnp.array([1, 2])}, 'keep': ONE}),
    ('length of text', {'lengths': {'text': 2}, 'keep': ONE}),
    ('prompt', {'keep': {'source': ONE}}),
    ('prompt', {'contents': {'text': jnp.zeros((1, 3), jnp.int32)}}),
  ],
)
def test_arrays_that_do_not_fit_the_layout_are_refused(message, arguments):
  with pytest.raises(ValueError, match=message):
    build(LAYOUT, **arguments)


def test_without_arrays_the_batch_size_is_unknown():
  with pytest.raises(ValueError, match='batch size'):
    build(Layout((Span('text', 1, 'ar'),)))
