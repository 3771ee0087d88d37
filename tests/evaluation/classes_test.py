"""The benchmark of classes: nearest reference images, chance, and the amount of data."""

import collections
import dataclasses

import numpy as np
import pytest

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.records import BadRecord, render
from vpe_jax.evaluation import classes
from vpe_jax.evaluation.evaluator_network import EvaluatorNetwork
from vpe_jax.evaluation.report import FROM_DRAFTS, RECONSTRUCTED

BENCHMARK = classes.ClassBenchmark(captions=20, seed=1)
DATA = DataConfig(
  source='openmoji', image_size=16, prompt_field='group', tokenizer='classes:food', examples=300
)


@pytest.fixture(scope='module')
def true():
  """True images and their class names."""
  return classes.ground_truth_images(DATA, 2 * BENCHMARK.captions, BENCHMARK.seed)


def test_ground_truth_images_are_distinct_and_depend_on_the_seed(true):
  images, names = true
  assert images.shape == (40, 16, 16, 3) and len({image.tobytes() for image in images}) == 40
  assert len(set(names)) > 3
  again = classes.ground_truth_images(DATA, 40, BENCHMARK.seed)
  np.testing.assert_array_equal(again[0], images)
  assert (classes.ground_truth_images(DATA, 40, 2)[0] != images).any()


def test_too_little_data_is_an_error():
  small = dataclasses.replace(DATA, examples=30)
  with pytest.raises(UserError, match='captions to 1[45] '):
    classes.ground_truth_images(small, 40, 0)
  # One caption would be refused.
  with pytest.raises(UserError, match='at least 4 are needed'):
    classes.ground_truth_images(dataclasses.replace(DATA, examples=3), 40, 0)


def test_unreadable_images_are_left_out(true, monkeypatch):
  first = true[0][0]

  def read(record, size):
    image = render(record, size)
    if (image == first).all():
      raise BadRecord('damaged')
    return image

  monkeypatch.setattr(classes, 'render', read)
  images, names = classes.ground_truth_images(DATA, 39, BENCHMARK.seed)
  np.testing.assert_array_equal(images, true[0][1:])
  np.testing.assert_array_equal(names, true[1][1:])


def test_chance_and_permuted_control():
  reference, targets = np.asarray(['a', 'a', 'b', 'c']), np.asarray(['a', 'b', 'b'])
  expected = np.mean([[r == a for r in reference] for a in targets])
  assert classes.agreement(reference, targets) == expected == pytest.approx(4 / 12)
  nearest = np.asarray(['b', 'b', 'a'])
  pairs = [nearest[i] == targets[j] for i in range(3) for j in range(3) if i != j]
  assert classes.permuted(nearest, targets).mean() == pytest.approx(np.mean(pairs))


class _Network:
  """An evaluator network whose vectors encode the level of the first pixel."""

  fingerprint = 'knowing'

  def images(self, images):
    return np.eye(16)[images[:, 0, 0, 0] % 16]


@pytest.mark.parametrize('correct', [True, False])
def test_only_images_of_their_class_are_correct(true, monkeypatch, fake_subject, correct):
  order = sorted(set(true[1]))

  def paint(names, correct=True):
    """Images that encode the class of their name, or the next one."""
    indices = np.asarray([order.index(name) for name in names]) + (not correct)
    return np.tile((indices % len(order)).astype(np.uint8)[:, None, None, None], (1, 16, 16, 3))

  monkeypatch.setattr(classes, 'ground_truth_images', lambda *_: (paint(true[1]), true[1]))
  monkeypatch.setattr(EvaluatorNetwork, 'load', lambda source: _Network())
  subject = fake_subject(
    lambda names: paint(names, correct),
    task='classes',
    data=DATA,
    from_drafts=lambda names, images: images,
    reconstruct=lambda images: (images + 1) % len(order),
  )
  report = BENCHMARK.run(subject)
  results = report.protocol['results']
  rows = {
    row: {name: figure['value'] for name, figure in figures.items()}
    for row, figures in results['rows'].items()
  }
  assert list(rows) == [
    'ground truth',
    RECONSTRUCTED,
    'generated',
    FROM_DRAFTS,
    classes.PERMUTED,
  ]
  references, targets = true[1][:20], true[1][20:]
  expected = np.mean(np.isin(targets, references))
  assert rows['ground truth']['accuracy'] == pytest.approx(expected) and expected > 0.5
  assert (rows['generated'] == rows['ground truth']) == correct
  assert (rows['generated']['frechet'] > rows['ground truth']['frechet']) == (not correct)
  assert rows[FROM_DRAFTS] == rows['ground truth']
  assert rows[RECONSTRUCTED]['accuracy'] < 0.5 < 1 < 1e3 * rows[RECONSTRUCTED]['frechet']
  assert rows[classes.PERMUTED].keys() == {'accuracy'}
  for row in results['rows'].values():
    for figure in row.values():
      low, high = figure['interval95']
      assert low <= figure['value'] <= high
  planner = results['differences'][f'{FROM_DRAFTS} minus generated']
  assert (planner['accuracy']['value'] > 0) == (planner['frechet']['value'] < 0) == (not correct)
  assert report.numbers['classes/true_drafts/accuracy'] == pytest.approx(expected)
  assert results['classes'] == dict(collections.Counter(targets.tolist()))
  assert len(report.lines) == 10 and report.lines[6].endswith('-')
  labels = [row.label for row in report.sheets['train']]
  assert labels == ['ground truth', RECONSTRUCTED, 'generated', FROM_DRAFTS]
