"""Alignment losses against brute force."""

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.objectives import alignment


def test_same_caption_finds_exactly_the_repeats():
  rng = np.random.default_rng(0)
  text = rng.integers(0, 1024, (200, 32)).astype(np.int32)
  text[50:80] = text[:30]
  text[100] = text[0]
  text[101] = text[0][::-1]  # the same tokens in another order
  text[102, :] = text[0]
  text[102, -1] += 1
  expected = (text[:, None] == text[None]).all(-1)
  np.testing.assert_array_equal(alignment.same_caption(jnp.asarray(text)), expected)


def test_captions_that_differ_in_one_token_are_not_the_same():
  base = np.zeros((1, 32), np.int32)
  captions = [base]
  for position in range(32):
    for token in range(1, 60):
      caption = base.copy()
      caption[0, position] = token
      captions.append(caption)
  same = alignment.same_caption(jnp.asarray(np.concatenate(captions)))
  np.testing.assert_array_equal(same, np.eye(len(captions), dtype=bool))


def test_sigmoid_loss_is_the_sum_over_signed_pairs():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, 4)).astype(np.float32) * 3
  positive = np.eye(4, dtype=bool)
  positive[0, 2] = positive[2, 0] = True
  sign = np.where(positive, 1.0, -1.0)
  expected = np.log1p(np.exp(-sign * logits.astype(np.float64))).sum(-1)
  got = alignment.sigmoid_loss(jnp.asarray(logits), jnp.asarray(positive))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_repeated_captions_are_not_negatives():
  """The loss doesn't push an image away from a caption that equals its own."""
  text = jnp.array([[1, 2], [1, 2], [3, 4]])
  positive = alignment.same_caption(text)
  gradient = jax.grad(lambda x: jnp.sum(alignment.sigmoid_loss(x, positive)))(jnp.zeros((3, 3)))
  np.testing.assert_array_equal(np.sign(gradient), [[-1, -1, 1], [-1, -1, 1], [1, 1, -1]])


def test_large_logits_stay_finite():
  logits = jnp.array([[200.0, -200.0], [-200.0, 200.0]])
  loss = alignment.sigmoid_loss(logits, ~jnp.eye(2, dtype=bool))
  np.testing.assert_allclose(loss, [400.0, 400.0])


def test_retrieval_is_within_groups_and_accepts_repeated_captions():
  logits = jnp.array(
    [
      [1.0, 2.0, 9.0, 0.0],  # best in its group: caption 1, equal to its own
      [0.0, 1.0, 9.0, 0.0],  # its own
      [9.0, 9.0, 0.0, 1.0],  # caption 3: wrong
      [9.0, 9.0, 0.0, 1.0],  # its own
    ]
  )
  positive = jnp.eye(4, dtype=bool).at[0, 1].set(True).at[1, 0].set(True)
  hits = alignment.retrieval_hits(logits, positive, group=2)
  np.testing.assert_array_equal(hits, [1, 1, 0, 1])
  np.testing.assert_array_equal(alignment.retrieval_hits(logits, positive, group=4), [0, 0, 0, 0])


def test_uncounted_pairs_add_no_loss():
  logits, positive = jnp.array([[2.0, 5.0], [-1.0, 3.0]]), jnp.eye(2, dtype=bool)
  counted = jnp.array([[True, False], [True, True]])
  loss = alignment.sigmoid_loss(logits, positive, counted)
  np.testing.assert_allclose(
    loss, [np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0)) + np.log1p(np.exp(-3.0))], rtol=1e-6
  )


def test_near_misses_compete_with_the_own_caption():
  own, wrong = jnp.array([0.5, 3.0, 7.0]), jnp.array([[1.0, -2.0], [50.0, 3.0], [9.0, 9.0]])
  exists = jnp.array([[True, True], [False, True], [False, False]])
  loss = alignment.near_loss(own, wrong, exists)
  first = np.log1p(np.exp(0.5) + np.exp(-2.5))
  np.testing.assert_allclose(loss, [first, np.log(2.0), 0.0], rtol=1e-6, atol=1e-7)
  total = lambda own, wrong: jnp.sum(alignment.near_loss(own, wrong, exists))
  to_own, to_wrong = jax.grad(total, (0, 1))(own, wrong)
  assert (to_own[:2] < 0).all() and to_own[2] == 0
  assert (to_wrong[0] > 0).all() and to_wrong[1, 1] > 0
  assert to_wrong[1, 0] == 0 and (to_wrong[2] == 0).all()


def test_near_hits_beat_all_existing_near_misses():
  wrong = jnp.array([[1.0, 3.0], [9.0, 1.0], [0.0, 0.0]])
  exists = jnp.array([[True, True], [False, True], [False, False]])
  hits = alignment.near_hits(jnp.array([2.0, 2.0, 2.0]), wrong, exists)
  np.testing.assert_array_equal(hits, [0, 1, 0])
