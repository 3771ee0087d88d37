"""Tests of the plots of a run."""

from PIL import Image

from vpe_jax.training import curves, metrics


def _points(panel):
  return {curve.label: curve.points for curve in panel.curves}


def test_panels_pair_training_with_held_out():
  records = [
    {'step': 1, 'loss/flow': 2.0, 'grad_norm': 1.0},
    {'step': 2, 'loss/flow': None, 'grad_norm': 1.0, 'eval/flow': 2.5, 'eval/flow/low95': 2.0},
    {'step': 3, 'sample/own/latent_distance': 1.0, 'sample/true_drafts/latent_distance': 0.5},
  ]
  panels = {panel.title: _points(panel) for panel in curves.make_panels(records)}
  assert panels == {
    'loss/flow': {'': [(1, 2.0)], 'held out': [(2, 2.5)]},
    'grad_norm': {'': [(1, 1.0), (2, 1.0)]},
    'sample/own/latent_distance': {'': [(3, 1.0)], 'ground-truth drafts': [(3, 0.5)]},
  }


def test_held_out_metric_without_training_values_has_a_panel():
  records = [{'step': s, 'loss/next_token': 2.0, 'eval/next_token': 2.0, 'eval/flow': s / 10}
             for s in (1, 2)]  # fmt: skip
  panels = {panel.title: panel for panel in curves.make_panels(records)}
  assert list(panels) == ['loss/next_token', 'eval/flow']
  assert _points(panels['eval/flow']) == {'': [(1, 0.1), (2, 0.2)]}


def test_numbers_of_evaluators_have_panels_with_intervals():
  name, drafts = 'retrieval/combination/accuracy', 'retrieval/combination/true_drafts/accuracy'
  records = [
    {'step': s, name: s / 10, f'{name}/low95': 0.0, f'{name}/high95': 0.5, drafts: 0.6}
    for s in (2, 4)
  ]
  panels = curves.make_panels([{'step': 1, 'lr': 1.0}, *records])
  assert [panel.title for panel in panels] == [name]
  own, true = panels[0].curves
  assert own.points == [(2, 0.2), (4, 0.4)] and own.band == ((2, 0.0, 0.5), (4, 0.0, 0.5))
  assert true.label == 'ground-truth drafts' and true.points == [(2, 0.6), (4, 0.6)]


def test_write_saves_an_image_next_to_the_metrics(tmp_path):
  curves.write(tmp_path)
  assert not (tmp_path / curves.FILE).exists()
  file = metrics.MetricsFile(tmp_path, 0)
  for step in (1, 2, 3):
    file.write({'step': step, 'loss/a': 1.0, 'loss/b': float(step), 'grad_norm': 0.0})
  file.close()
  curves.write(tmp_path)
  with Image.open(tmp_path / curves.FILE) as image:
    assert image.size == (2 * 460, 2 * 260)


def test_a_term_that_is_logged_only_is_not_called_a_loss():
  records = [{'step': s, 'stage': 'ab'[s > 2], 'loss/flow': 1.0, 'loss/accuracy': 0.5}
             for s in (1, 2, 3)]  # fmt: skip
  panels = curves.make_panels(records, {'accuracy'})
  assert [panel.title for panel in panels] == ['loss/flow', 'accuracy']
  assert panels[0].stages == ((1, 'a'), (3, 'b'))
