"""Tests of sample grids and of the gap between inference and training that they measure."""

import dataclasses
import types

import jax
import numpy as np
from PIL import Image

from vpe_jax import rng, sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.contracts import Samples
from vpe_jax.training import previews
from vpe_jax.training.previews import SHOWN, Previews
from vpe_jax.training.state import first_state


def _state(system):
  return first_state(system.init(jax.random.key(0)), system.stages[1])


def _draw(system, folder, step=7, state=None):
  mesh = sharding.make_mesh(system.config.mesh)
  state = state or _state(system)
  with jax.set_mesh(mesh):
    frozen = frozen_lib.load(system, mesh, 'fsdp')
    previews = Previews(system.config, system, frozen, mesh, folder / 'samples')
    return previews.draw(state, rng.run_key(0), step)


def test_grid_and_both_rows_measures(drawing_system, tmp_path):
  found = _draw(drawing_system(), tmp_path)
  assert found.keys() == {
    f'sample/{row}/{measure}'
    for row in ('own', 'truth_plan')
    for measure in ('latent_distance', 'retrieval')
  }
  # The own plan is black, the true plan has the true colours to a tenth.
  assert found['sample/own/latent_distance'] > 0.5
  assert found['sample/truth_plan/latent_distance'] < 0.3
  assert found['sample/own/retrieval'] == 0 and found['sample/truth_plan/retrieval'] == 1
  with Image.open(tmp_path / 'samples' / 'step_0000007.png') as grid:
    assert grid.width > 2 * SHOWN * 150 and grid.height > 3 * 150


def test_the_averaged_parameters_draw(drawing_system, tmp_path):
  system = drawing_system()
  plain = system.generate

  def generate(params, *rest):
    generated = plain(params, *rest)
    latents = generated.encoded['latents'] + params['head']['bias'][0]
    return dataclasses.replace(generated, encoded={**generated.encoded, 'latents': latents})

  system.generate = generate
  state = _state(system)
  assert _draw(system, tmp_path, state=state)['sample/truth_plan/latent_distance'] < 0.3
  state['ema'] = jax.tree.map(lambda leaf: leaf + 5, state['ema'])
  assert _draw(system, tmp_path, state=state)['sample/truth_plan/latent_distance'] > 4


def test_data_without_a_held_out_split_is_called_what_it_is(drawing_system, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(
    previews.pictures,
    'grid',
    lambda *arguments: said.append(arguments[-1]) or Image.new('RGB', (1, 1)),
  )
  for source in ('scenes', 'synthetic'):
    _draw(drawing_system(data={'source': source}), tmp_path)
  assert [labels[-1] for labels in said] == ['ground truth', 'ground truth (trained on)']


def test_previews_of_classes_are_of_several(monkeypatch):
  names = ['a'] * 5 + ['b', 'a', 'c'] + ['a'] * 60
  data = types.SimpleNamespace(index_at=lambda place: place, prompt=names.__getitem__)
  assert previews._places(data, 8) == [0, 5, 7, 1, 2, 3, 4, 6]
  assert previews._places(data, 2) == [0, 5]


def test_the_same_captions_are_drawn_each_time(drawing_system, tmp_path):
  system = drawing_system()
  first, second = (_draw(system, tmp_path, step) for step in (1, 2))
  assert first == second
  images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / 'samples').iterdir())]
  np.testing.assert_array_equal(*images)


def test_without_visual_prompts_there_is_one_way_to_draw(drawing_system, tmp_path):
  system = drawing_system()
  system.capabilities = (Samples,)
  assert {name.split('/')[1] for name in _draw(system, tmp_path)} == {'own'}
  with Image.open(tmp_path / 'samples' / 'step_0000007.png') as grid:
    assert 2 * 150 < grid.height < 600  # three rows have more


def test_nothing_is_drawn_without_generator_or_networks(line_system, drawing_system, tmp_path):
  assert _draw(line_system(), tmp_path) == {}
  system = drawing_system()
  system.frozen = {}
  data = dataclasses.replace(system.config.data, encode='cached')  # needs no network
  system.config = dataclasses.replace(system.config, data=data)
  assert _draw(system, tmp_path) == {}
  assert not (tmp_path / 'samples').exists()
