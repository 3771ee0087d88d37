"""Export: rounded weights, measured moments, and mistakes in one line."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import codec as config_file
from vpe_jax import export, rng, systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import to_dict
from vpe_jax.contracts import UserError
from vpe_jax.data.pipeline import Pipeline


@pytest.fixture
def run(monkeypatch):
  """Stands for the newest checkpoint of a codec run: (system, parameters)."""
  system = systems.build(config_file.get_config('debug,stage=image').to_dict())
  params = jax.device_get(jax.jit(system.init)(rng.run_key(0)))
  said = {'config': json.dumps(to_dict(system.config)), 'step': '4', 'weights': 'ema'}
  monkeypatch.setattr(weights, 'load_run', lambda workdir, which: (params, said))
  return system, params


def test_a_network_is_written_rounded_with_the_run_s_story(run, tmp_path):
  system, params = run
  to = str(tmp_path / 'image.safetensors')
  metadata = export.export('runs/x', to, 'image')
  stored, again = weights.load(to)
  assert metadata == again
  assert json.loads(metadata['config']) == json.loads(json.dumps(to_dict(system.config)))
  assert metadata['network'] == 'image' and metadata['commit']
  kernel = params['image']['encoder']['start']['kernel']
  rounded = np.asarray(kernel, ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(stored['encoder']['start']['kernel'], rounded)


def test_latents_of_the_written_file_are_normalised(run, tmp_path):
  system, _ = run
  to = str(tmp_path / 'image.safetensors')
  export.export('runs/x', to, 'image')
  stored, _ = weights.load(to)
  data = Pipeline(system.config.data, system.config.seed)
  latents = system.latents_codec.encode({'image': stored}, data.examples(range(64)).image)
  # The moments themselves are rounded to bfloat16: 8 bits of mantissa.
  np.testing.assert_allclose(jnp.mean(latents, (0, 1, 2)), 0.0, atol=2e-2)
  np.testing.assert_allclose(jnp.std(latents, (0, 1, 2)), 1.0, atol=2e-2)


def test_mistakes_are_named(run, tmp_path):
  to = str(tmp_path / 'image.safetensors')
  with pytest.raises(UserError, match="no network 'picture', only image"):
    export.export('runs/x', to, 'picture')
  export.export('runs/x', to, 'image')
  with pytest.raises(UserError, match='exists'):
    export.export('runs/x', to, 'image')
  export.export('runs/x', to, 'image', overwrite=True)
