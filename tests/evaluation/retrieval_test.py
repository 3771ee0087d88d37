"""Retrieval of captions: credit, ties, controls and intervals."""

import numpy as np
import pytest

from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.retrieval import Trial


def _trials(count, relations=0):
  """Trials whose captions are all different."""
  kinds = ['object', 'colour', 'count']
  return [
    Trial(
      caption=f'{i}',
      hard=tuple((kinds[j % 3], f'{i} hard {j}') for j in range(retrieval.HARD)),
      others=tuple(f'{(i + 1 + j) % count}' for j in range(15)),
      relations=tuple(f'{i} relation {j}' for j in range(relations)),
    )
    for i in range(count)
  ]


def _embed(trials, width=64, seed=0):
  """A random unit vector for each caption, hashed from nothing but its place in the list."""

  def judge(texts):
    vectors = np.random.default_rng(seed).normal(size=(len(texts), width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

  return retrieval.embed(judge, trials)


def test_there_are_32_candidates_of_which_16_are_hard():
  trial = _trials(40)[0]
  assert len(trial.candidates) == len(set(trial.candidates)) == retrieval.CANDIDATES
  assert trial.candidates[0] == trial.caption and trial.kinds[0] == 'true'
  assert sum(kind in ('object', 'colour', 'count') for kind in trial.kinds) == retrieval.HARD


def test_pictures_that_match_their_captions_are_all_retrieved():
  trials = _trials(40, relations=2)
  captions = _embed(trials)
  images = np.stack([captions[trial.caption] for trial in trials])
  result = retrieval.measure(images, captions, trials)
  assert result.accuracy == 1 and result.hard.mean() == 1 and result.relation == 1
  assert set(result.lost_to.values()) == {0.0}


def test_permuted_captions_are_at_chance_for_a_perfect_judge():
  trials = _trials(600)
  captions = _embed(trials)
  images = np.stack([captions[trial.caption] for trial in trials])
  result = retrieval.permuted(images, captions, trials)
  assert len(result.credit) == 16 * 600 and result.pictures == 600
  deviation = (1 / 32 * 31 / 32 / len(result.credit)) ** 0.5
  assert abs(result.accuracy - 1 / 32) < 4 * deviation


def test_permutation_never_pairs_a_picture_with_its_own_caption():
  trials = _trials(20)
  captions = {c: np.zeros(20) for t in trials for c in t.candidates}
  for i, trial in enumerate(trials):
    captions[trial.caption] = np.eye(20)[i]
  # Only the true caption scores above 0, so full credit would betray a picture's own trial; the
  # others of a trial may hold the picture's own caption, which then wins.
  result = retrieval.permuted(np.eye(20), captions, trials, rounds=100)
  assert result.credit.max() < 1 and len(result.credit) == 19 * 20


def test_a_judge_that_sees_nothing_gets_exactly_chance():
  trials = _trials(40, relations=1)
  captions = {c: np.ones(4) / 2 for t in trials for c in (*t.candidates, *t.relations)}
  result = retrieval.measure(np.ones((40, 4)) / 2, captions, trials)
  assert result.accuracy == pytest.approx(1 / 32)
  assert result.hard.mean() == pytest.approx(1 / 17)
  assert result.relation == 0.5
  assert sum(result.lost_to.values()) == pytest.approx(31 / 32)


def test_losses_are_booked_by_kind_and_relations_stay_apart():
  trials = [
    Trial('a', (('colour', 'b'), ('count', 'c')), ('d',), relations=('e',)),
    Trial('a', (('colour', 'b'), ('count', 'c')), ('d',), relations=('e',)),
  ]
  captions = {c: np.eye(5)[i] for i, c in enumerate('abcde')}
  # The first picture fits b; the second ties a with d, and fits its relation distractor best.
  images = np.asarray([[0.1, 0.9, 0, 0, 0], [0.5, 0, 0, 0.5, 0.7]])
  result = retrieval.measure(images, captions, trials)
  np.testing.assert_allclose(result.credit, [0, 0.5])
  np.testing.assert_allclose(result.hard, [0, 1])
  assert result.lost_to == {'colour': 0.5, 'count': 0.0, 'other': 0.25}
  assert result.relation == 0.5


def test_interval_is_wilsons():
  low, high = retrieval.wilson(0.5, 100)
  assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
  assert retrieval.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-3)


def test_pictures_and_trials_must_match():
  with pytest.raises(ValueError, match='3 '):
    retrieval.measure(np.zeros((3, 2)), {}, _trials(2))


@pytest.mark.parametrize('split', ['combination', 'concept'])
def test_trials_come_from_the_held_out_split_and_have_one_true_caption(split):
  trials, records = retrieval.make_trials(40, split, seed=3)
  assert len({trial.caption for trial in trials}) == 40
  for trial, record in zip(trials, records):
    assert record.split == split and trial.caption == record.caption
    assert len(trial.candidates) == len(set(trial.candidates)) == 32
    assert len(trial.hard) == retrieval.HARD
    assert {kind for kind, _ in trial.hard} <= {'object', 'colour', 'count'}
    assert trial.caption not in trial.relations
    assert bool(trial.relations) == any(r.stated for r in record.truth.relations)


def test_no_candidate_is_true_of_the_picture_too():
  trials, records = retrieval.make_trials(40, 'combination', seed=0)
  by_caption = {}
  for record in retrieval.scenes.Scenes(256, 'combination', 0):
    by_caption.setdefault(record.caption, record.truth)
  for trial, record in zip(trials, records):
    shown = record.truth.counts
    for caption in trial.others:
      other = by_caption[caption]
      same = all(shown.get(name, 0) >= count for name, count in other.counts.items())
      colours = lambda truth: {(c.name, c.colour) for c in truth.clusters}
      assert not (same and colours(other) <= colours(record.truth)), (trial.caption, caption)


def test_trials_are_a_function_of_split_count_and_seed():
  again = retrieval.make_trials(10, 'combination', seed=5)[0]
  assert retrieval.make_trials(10, 'combination', seed=5)[0] == again
  assert retrieval.make_trials(10, 'combination', seed=6)[0] != again
