"""Retrieval of captions: credit, ties, controls and trials."""

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.evaluation import retrieval
from vpe_jax.evaluation.retrieval import Trial


def _trials(count, relations=0):
  """Trials with distinct captions."""
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
  """A random unit vector for each caption."""

  def encode(texts):
    vectors = np.random.default_rng(seed).normal(size=(len(texts), width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

  return retrieval.embed(encode, trials)


def test_there_are_32_candidates_of_which_16_are_hard():
  trial = _trials(40)[0]
  assert len(trial.candidates) == len(set(trial.candidates)) == retrieval.CANDIDATES
  assert trial.candidates[0] == trial.caption and trial.kinds[0] == 'true'
  assert sum(kind in ('object', 'colour', 'count') for kind in trial.kinds) == retrieval.HARD


def test_images_that_match_their_captions_have_full_accuracy():
  trials = _trials(40, relations=2)
  captions = _embed(trials)
  images = np.stack([captions[trial.caption] for trial in trials])
  result = retrieval.measure(images, captions, trials)
  assert result.accuracy == 1 and result.hard.mean() == 1
  assert result.figures['relation'].value == 1
  assert not any(credit.any() for credit in result.lost_to.values())


def test_permuted_captions_are_at_chance():
  trials = _trials(600)
  captions = _embed(trials)
  images = np.stack([captions[trial.caption] for trial in trials])
  result = retrieval.permuted(images, captions, trials)
  assert len(result.credit) == 600
  deviation = (1 / 32 * 31 / 32 / (16 * 600)) ** 0.5
  assert abs(result.accuracy - 1 / 32) < 4 * deviation


def test_permutation_never_pairs_an_image_with_its_own_trial():
  trials = _trials(20)
  captions = {c: np.zeros(20) for t in trials for c in t.candidates}
  for i, trial in enumerate(trials):
    captions[trial.caption] = np.eye(20)[i]
  # Only an image's own caption scores above 0. Full credit would mean that it met its own trial;
  # as a distractor of another trial, its caption wins instead.
  result = retrieval.permuted(np.eye(20), captions, trials, rounds=100)
  # All 19 other trials are met, of which 15 have this caption as a distractor.
  assert result.credit.max() < 1 and len(result.credit) == 20
  np.testing.assert_allclose(result.lost_to['other'], 15 / 19 + 4 / 19 * 15 / 32)


def test_ties_of_all_candidates_give_exactly_chance():
  trials = _trials(40, relations=1)
  captions = {c: np.ones(4) / 2 for t in trials for c in (*t.candidates, *t.relations)}
  result = retrieval.measure(np.ones((40, 4)) / 2, captions, trials)
  assert result.accuracy == pytest.approx(1 / 32)
  assert result.hard.mean() == pytest.approx(1 / 17)
  assert result.figures['relation'].value == 0.5
  np.testing.assert_allclose(sum(result.lost_to.values()), 31 / 32)


def test_kinds_of_winning_distractors_are_counted():
  trials = [
    Trial('a', (('colour', 'b'), ('count', 'c')), ('d',), relations=('e',)),
    Trial('a', (('colour', 'b'), ('count', 'c')), ('d',), relations=('e',)),
  ]
  captions = {c: np.eye(5)[i] for i, c in enumerate('abcde')}
  # The first image matches b; the second ties a with d, and matches its relation distractor best.
  images = np.asarray([[0.1, 0.9, 0, 0, 0], [0.5, 0, 0, 0.5, 0.7]])
  result = retrieval.measure(images, captions, trials)
  np.testing.assert_allclose(result.credit, [0, 0.5])
  np.testing.assert_allclose(result.hard, [0, 1])
  lost_to = {kind: summary['value'] for kind, summary in result.summary()['lost_to'].items()}
  assert lost_to == {'colour': 0.5, 'count': 0.0, 'other': 0.25}
  assert result.figures['relation'].value == 0.5


def test_numbers_of_images_and_trials_must_match():
  with pytest.raises(ValueError, match='3 '):
    retrieval.measure(np.zeros((3, 2)), {}, _trials(2))


def test_more_captions_than_a_split_has_are_one_line(monkeypatch):
  monkeypatch.setattr(retrieval, '_POOL', 0)
  with pytest.raises(UserError, match='captions=300.*ask for fewer'):
    retrieval.make_trials(300, 'concept')


@pytest.mark.parametrize('split', ['combination', 'concept'])
def test_trials_are_held_out_and_have_one_true_caption(split):
  trials, records = retrieval.make_trials(40, split, seed=3)
  assert len({trial.caption for trial in trials}) == 40
  for trial, record in zip(trials, records):
    assert record.split == split and trial.caption == record.caption
    assert len(trial.candidates) == len(set(trial.candidates)) == 32
    assert len(trial.hard) == retrieval.HARD
    assert {kind for kind, _ in trial.hard} <= {'object', 'colour', 'count'}
    assert trial.caption not in trial.relations
    assert bool(trial.relations) == any(r.stated for r in record.truth.relations)


def test_no_distractor_is_true():
  trials, records = retrieval.make_trials(40, 'combination', seed=0)
  by_caption = {}
  for record in retrieval.scenes.Scenes(256, 'combination', 0):
    by_caption.setdefault(record.caption, record.truth)
  for trial, record in zip(trials, records):
    for caption in trial.others:
      contains = all(
        sum(c.count for c in record.truth.clusters if (c.name, c.colour) == (o.name, o.colour))
        >= o.count
        for o in by_caption[caption].clusters
      )
      assert not contains, (trial.caption, caption)


def test_trials_are_functions_of_split_count_and_seed():
  again = retrieval.make_trials(10, 'combination', seed=5)[0]
  assert retrieval.make_trials(10, 'combination', seed=5)[0] == again
  assert retrieval.make_trials(10, 'combination', seed=6)[0] != again
