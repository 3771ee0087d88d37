"""Tests of export: rounded weights, latent moments and one-line errors."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import codec as config_file
from configs import t2i
from tests import commands
from vpe_jax import export, rng, systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import to_dict
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline


@pytest.fixture
def run(monkeypatch):
  """Replaces the newest checkpoint of a codec run: (system, parameters)."""
  system = systems.build(config_file.get_config('debug,stage=image').to_dict())
  params = jax.device_get(jax.jit(system.init)(rng.run_key(0)))
  metadata = {'config': json.dumps(to_dict(system.config)), 'step': '4', 'weights': 'ema'}
  monkeypatch.setattr(weights, 'load_run', lambda *_, **__: (params, metadata))
  return system, params


def test_network_is_rounded_and_written_with_the_run_s_metadata(run, tmp_path):
  system, params = run
  to = str(tmp_path / 'image.safetensors')
  metadata = export.export('runs/x', to, 'image')
  loaded, loaded_metadata = weights.load(to)
  assert loaded_metadata == metadata
  assert json.loads(metadata['config']) == json.loads(json.dumps(to_dict(system.config)))
  assert metadata['network'] == 'image' and metadata['commit']
  kernel = params['image']['encoder']['start']['kernel']
  rounded = np.asarray(kernel, ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(loaded['encoder']['start']['kernel'], rounded)


def test_sampling_settings_can_be_overridden(monkeypatch, tmp_path):
  config = systems.build(t2i.get_config('debug').to_dict()).config
  run_metadata = {'config': json.dumps(to_dict(config)), 'step': '4', 'weights': 'ema'}
  monkeypatch.setattr(weights, 'load_run', lambda *_, **__: ({'x': jnp.ones(2)}, run_metadata))
  to = str(tmp_path / 'all.safetensors')
  metadata = export.export('runs/x', to, guidance=2.5, min_p=None)
  sample = json.loads(metadata['config'])['sample']
  assert sample == to_dict(config.sample) | {'guidance': 2.5}
  with pytest.raises(UserError, match='image_guidance'):
    export.export('runs/x', str(tmp_path / 'none.safetensors'), image_guidance=2.0)


def test_settings_of_a_run_without_a_sampler_are_unknown(run, tmp_path):
  with pytest.raises(UserError, match="'guidance'; there are none here"):
    export.export('runs/x', str(tmp_path / 'image.safetensors'), 'image', guidance=2.5)


def test_out_of_range_settings_are_refused_before_writing(run, tmp_path):
  to = tmp_path / 'image.safetensors'
  for name, value in {'steps': 0, 'guidance': float('nan'), 'top_p': 2.0, 'shift': 0.0}.items():
    with pytest.raises(UserError, match=name):
      export.export('runs/x', str(to), 'image', **{name: value})
  assert not to.exists()


def test_latents_of_exported_weights_are_normalised(run, tmp_path):
  system, _ = run
  to = str(tmp_path / 'image.safetensors')
  export.export('runs/x', to, 'image')
  loaded, _ = weights.load(to)
  data = Pipeline.of(system)
  latents = system.latent_codec.encode({'image': loaded}, data.examples(range(64)).inputs['image'])
  # The moments themselves are rounded to bfloat16: 8 bits of mantissa.
  np.testing.assert_allclose(jnp.mean(latents, (0, 1, 2)), 0.0, atol=2e-2)
  np.testing.assert_allclose(jnp.std(latents, (0, 1, 2)), 1.0, atol=2e-2)


def test_failed_export_keeps_the_existing_file(run, tmp_path, monkeypatch):
  to = tmp_path / 'image.safetensors'
  export.export('runs/x', str(to), 'image')
  content = to.read_bytes()

  def missing(*_):
    raise UserError('the images are missing')

  monkeypatch.setattr(Pipeline, 'examples', missing)
  with pytest.raises(UserError, match='missing'):
    export.export('runs/x', str(to), 'image', overwrite=True)
  assert to.read_bytes() == content


def test_commit_is_none_without_git(run, tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  to = str(tmp_path / 'image.safetensors')
  monkeypatch.setattr(type(run[0]), 'normalize_latents', lambda self, image, images: image)
  assert export.export('runs/x', to, 'image')['commit'] == 'none'


def test_unknown_or_missing_network_is_refused(run, tmp_path):
  to = str(tmp_path / 'image.safetensors')
  with pytest.raises(UserError, match="no network 'unknown': choose one of image"):
    export.export('runs/x', to, 'unknown')
  with pytest.raises(UserError, match='--network, of image'):
    export.export('runs/x', to)
  export.export('runs/x', to, 'image')
  export.export('runs/x', to, 'image', overwrite=True)


def test_target_is_checked_before_the_run_is_read(tmp_path, monkeypatch):
  def load_run(*_):
    raise AssertionError('the run was read')

  monkeypatch.setattr(weights, 'load_run', load_run)
  (tmp_path / 'existing.safetensors').touch()
  (tmp_path / 'folder.safetensors').mkdir()
  for name, message in {
    'existing.safetensors': 'exists',
    'folder.safetensors': 'is a folder',
    'x.npz': 'ends in .safetensors',
  }.items():
    with pytest.raises(UserError, match=message):
      export.export('runs/x', str(tmp_path / name), 'image')


def test_command_line_errors_are_one_line_and_status_2():
  for arguments, message in [
    ([], '--workdir is missing'),
    (['x'], "unexpected argument 'x'"),
    (['--workdir=runs/x', '--to=/dev/null/x.safetensors'], 'cannot write to'),
  ]:
    process = commands.run('vpe_jax.export', *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith('error: ' + message) and process.stderr.count('\n') == 1
