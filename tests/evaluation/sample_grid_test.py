"""Sample grids: rows, metrics, and the gap between inference and training."""

from __future__ import annotations

import types

import jax
import numpy as np

from vpe_jax import sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.data.records import BadRecord
from vpe_jax.evaluation import sample_grid
from vpe_jax.evaluation.evaluator import Subject
from vpe_jax.evaluation.report import FROM_DRAFTS, GENERATED, GROUND_TRUTH
from vpe_jax.evaluation.sample_grid import SHOWN, TRAINED_ON


def _run(system, grid=None):
  mesh = sharding.make_mesh(system.config.mesh)
  frozen = frozen_lib.load(system, mesh, 'fsdp')
  params = system.init(jax.random.key(0))
  subject = Subject(system, params, 1, mesh, load_frozen=lambda: frozen)
  return (grid or sample_grid.SampleGrid()).run(subject)


def test_rows_and_metrics_of_own_and_ground_truth_drafts(drawing_system):
  report = _run(drawing_system())
  numbers = report.numbers
  assert numbers.keys() == {
    f'sample/{row}/{metric}'
    for row in ('own', 'true_drafts')
    for metric in ('latent_distance', 'retrieval')
  }
  # The sampled draft is black. The ground-truth draft has the image's brightness, up to 0.1.
  assert numbers['sample/own/latent_distance'] > 0.5
  assert numbers['sample/true_drafts/latent_distance'] < 0.3
  for figure in report.figures.values():
    low, high = figure.interval
    assert figure.count == 16 and low <= figure.value <= high
  assert numbers['sample/own/retrieval'] == 0 and numbers['sample/true_drafts/retrieval'] == 1
  rows = {row.label: row for row in report.sheets['']}
  assert list(rows) == [GENERATED, FROM_DRAFTS, GROUND_TRUTH]
  assert all(row.images.shape == (2 * SHOWN, 8, 8, 3) for row in rows.values())
  assert len(rows[GROUND_TRUTH].captions) == 2 * SHOWN and not rows[GENERATED].captions


def test_data_without_a_held_out_split_is_labelled(drawing_system):
  report = _run(drawing_system(data={'source': 'synthetic'}))
  assert [row.label for row in report.sheets['']][-1] == TRAINED_ON


def test_distinct_prompts_come_first():
  names = ['a'] * 5 + ['b', 'a', 'c'] + ['a'] * 60
  data = types.SimpleNamespace(index_at=lambda position: position, prompt=names.__getitem__)
  data.examples = lambda indices: None
  assert sample_grid._positions(data, 8) == [0, 5, 7, 1, 2, 3, 4, 6]
  assert sample_grid._positions(data, 2) == [0, 5]


def test_unreadable_records_are_left_out():
  def read(indices):
    if 3 in indices:
      raise BadRecord('damaged')

  data = types.SimpleNamespace(index_at=lambda position: position, prompt=str, examples=read)
  assert sample_grid._positions(data, 5) == [0, 1, 2, 4, 5]


def test_one_grid_serves_several_runs(drawing_system):
  grid, systems = sample_grid.SampleGrid(), [drawing_system(seed=seed) for seed in (0, 5, 0)]
  captions = [_run(system, grid).sheets[''][-1].captions for system in systems]
  assert captions[0] == captions[2] != captions[1]
  assert captions[1] == _run(systems[1]).sheets[''][-1].captions


def test_activations_are_sharded_over_the_mesh_of_the_subject(drawing_system):
  class Sharded(type(drawing_system())):
    """A system that needs the mesh."""

    def generate(self, *args):
      assert jax.sharding.get_abstract_mesh().size == jax.device_count()
      return super().generate(*args)

  plain = drawing_system()
  assert _run(Sharded(plain.config, plain.frozen)).numbers


def test_the_same_prompts_are_sampled_each_time(drawing_system):
  system, grid = drawing_system(), sample_grid.SampleGrid()
  first, second = (_run(system, grid) for _ in range(2))
  assert first.numbers == second.numbers
  for ours, theirs in zip(first.sheets[''], second.sheets[''], strict=True):
    np.testing.assert_array_equal(ours.images, theirs.images)


def test_without_drafts_there_are_only_own_samples(drawing_system):
  system = drawing_system()
  system.drafts = ()
  report = _run(system)
  assert {name.split('/')[1] for name in report.numbers} == {'own'}
  assert [row.label for row in report.sheets['']] == [GENERATED, GROUND_TRUTH]


def test_without_a_decoder_there_is_no_grid(drawing_system):
  system = drawing_system(data={'source': 'synthetic', 'encode': 'cached'})
  system.frozen = {}
  report = _run(system)
  assert report.numbers == {} and not report.sheets
