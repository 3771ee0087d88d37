"""Text to image on published codecs: a run on SigLIP-VQ's codes and Wan's latents."""

from __future__ import annotations

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from configs import t2i as config_file
from tests import small_models
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import conversion, frozen
from vpe_jax.checkpoints.families import siglip_vq, wan_vae
from vpe_jax.config import to_dict
from vpe_jax.contracts import Batch, UserError
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.transforms import pad_to_square
from vpe_jax.generator import Generator
from vpe_jax.sharding import leaves_by_path
from vpe_jax.training import runs

pytestmark = pytest.mark.parity
CODES = small_models.VQ['num_embeddings']
SIDE, VIEW = 32, 48  # pixels of the image, and of the input of the tower


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Reference models, saved by their libraries."""
  root = tmp_path_factory.mktemp('published')
  torch.manual_seed(0)
  small_models.glm_image().save_pretrained(root / 'glm')
  diffusers.AutoencoderKLWan(base_dim=8, z_dim=4).eval().save_pretrained(root / 'wan')
  return root


def _config(folders, **weights):
  config = config_file.get_config('debug')
  # The wrong moments of another number of channels would be refused when the config is read.
  vae = wan_vae.sizes({'base_dim': 8, 'z_dim': 4, 'latents_mean': [0.1] * 4,
                       'latents_std': [2.0] * 4})  # fmt: skip
  tower = siglip_vq.sizes({'vision_config': small_models.VISION, 'vq_config': small_models.VQ})
  config.data.update(image_size=SIDE, encode='online', examples=16)
  config.model.update(codes=CODES, latent_size=SIDE // 8, latent_channels=4)
  sources = {'visual_prompt': str(folders / 'glm'), 'image': str(folders / 'wan')} | weights
  prompt = {'kind': 'siglip_vq', 'image_size': VIEW, 'weights': sources['visual_prompt']}
  config.model.visual_prompt = to_dict(tower) | prompt
  config.model.image = to_dict(vae) | {'kind': 'wan_vae', 'weights': sources['image']}
  config.evals = {}
  return config


def test_a_run_trains_on_them_and_its_generator_samples(folders, tmp_path):
  config, workdir = _config(folders), str(tmp_path / 'run')
  config.stages, config.steps, config.batch_size = ('joint',), (2,), (8,)
  for part in (config.model.ar, config.model.dit, config.model.head):
    part.layers = 1
  config.model.dual_path.encoder.layers = 1
  runs.run(config.to_dict(), workdir)
  sample = Generator.load(workdir)('a red circle')[0]
  assert sample.image.shape == (SIDE, SIDE, 3)
  codes = sample.encoded['visual_prompt']
  assert codes.shape == ((VIEW // 16) ** 2,) and codes.max() < CODES


def test_codes_and_latents_equal_the_reference_models(folders):
  system = systems.build(_config(folders).to_dict())
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    loaded = frozen.load(system, mesh, 'fsdp')
    images, views = (
      np.random.default_rng(0).integers(0, 256, (8, side, side, 3), np.uint8)
      for side in (SIDE, VIEW)
    )
    inputs = {'image': images, 'visual_prompt_image': views}
    encoded = loaded.encode_batch(Batch(np.arange(8), inputs), rng.run_key(0)).encoded
  codes, latents = encoded['visual_prompt'], encoded['latents']
  reference = diffusers.AutoencoderKLWan.from_pretrained(folders / 'wan')
  signed = torch.tensor(images / 127.5 - 1, dtype=torch.float32).permute(0, 3, 1, 2)
  with torch.no_grad():
    mean = reference.encode(signed[:, :, None]).latent_dist.mode()[:, :, 0]
  expected = (mean.permute(0, 2, 3, 1).numpy() - 0.1) / 2.0
  np.testing.assert_allclose(latents, expected, atol=2e-5 * np.abs(expected).max())
  assert codes.shape == (8, 9) and len(np.unique(codes)) > 5
  assert set(loaded.fingerprints) == {'siglip_vq', 'image'}


def test_the_tower_reads_images_that_were_resized_once(folders, tmp_path):
  original = np.random.default_rng(1).integers(0, 256, (70, 100, 3), np.uint8)
  Image.fromarray(original).save(tmp_path / 'noise.png')
  (tmp_path / 'noise.txt').write_text('noise')
  config = _config(folders)
  config.data.update(source=f'folder:{tmp_path}', examples=0)
  system = systems.build(config.to_dict())
  batch = Pipeline.of(system).examples([0] * 8)  # one for each device
  inputs = batch.inputs
  view = pad_to_square(original, VIEW)
  np.testing.assert_array_equal(inputs['visual_prompt_image'][0], view)
  np.testing.assert_array_equal(inputs['image'][0], pad_to_square(original, SIDE))
  loaded, codec = _loaded(system), system.visual_prompt
  encoded = loaded.encode_batch(batch, rng.run_key(0)).encoded
  codes = codec.encode(loaded.params, view[None])
  np.testing.assert_array_equal(encoded['visual_prompt'], np.repeat(codes, 8, 0))
  assert (codes != codec.encode(loaded.params, inputs['image'][:1])).any()
  generator = Generator(system, system.init(rng.run_key(0)), loaded.params, bpe.shipped(), {})
  np.testing.assert_array_equal(generator.read_drafts([original])['visual_prompt'], codes)


def test_latents_are_sampled_anew_for_each_position_in_the_data(folders):
  config = _config(folders)
  mean_system = systems.build(config.to_dict())
  config.model.image.sampled = True
  system = systems.build(config.to_dict())
  assert mean_system.batch_spec(1).cacheable == {'visual_prompt', 'latents'}
  assert system.batch_spec(1).cacheable == {'visual_prompt'}
  loaded = _loaded(system)
  batch, key = Pipeline.of(system).examples([3, 3, 4, 5, 6, 7, 8, 9]), rng.run_key(7)

  def latents(*example):
    positioned = dataclasses.replace(batch, example=np.array([*example, 6, 7, 8, 9]))
    return np.asarray(loaded.encode_batch(positioned, key).encoded['latents'])[:4]

  sample, again = latents(3, 19, 4, 5), latents(3, 35, 4, 5)
  np.testing.assert_array_equal(sample[[0, 2, 3]], again[[0, 2, 3]])
  assert (sample[0] != sample[1]).all() and (sample[1] != again[1]).all()
  online = system.encoded(loaded.params, dataclasses.replace(batch, encoded={}), key)
  np.testing.assert_allclose(online['latents'][2:4], sample[2:], rtol=1e-4, atol=1e-5)
  mean = mean_system.encode(loaded.params, batch.inputs, None)['latents'][:4]
  signed = batch.inputs['image'][:4] / np.float32(127.5) - 1
  params = {'params': loaded.params['image']}
  variance = system.image.network.apply(params, signed, method='posterior').log_variance
  noise = (sample - mean) * 2.0 / np.exp(variance / 2)  # 2 is the deviation in the config
  expected = jax.random.normal(rng.encoding_keys(key, np.array([4]))[0], noise.shape[1:])
  np.testing.assert_allclose(noise[2], expected, rtol=2e-2, atol=2e-2)


def test_an_import_serves_as_well_as_the_folder(folders, tmp_path):
  conversion.import_weights('siglip_vq', str(folders / 'glm'), str(tmp_path / 'glm'))
  load = lambda **weights: _loaded(systems.build(_config(folders, **weights).to_dict()))
  direct, imported = load(), load(visual_prompt=str(tmp_path / 'glm'))
  for path, leaf in leaves_by_path(direct.params['siglip_vq']).items():
    np.testing.assert_array_equal(
      leaf, leaves_by_path(imported.params['siglip_vq'])[path], err_msg=path
    )
  assert direct.fingerprints == imported.fingerprints


def test_errors_of_codecs_that_do_not_fit_are_one_line(folders):
  config = _config(folders)
  for section, field, value, message in (
    ('visual_prompt', 'table', 4, 'table is 8, not 4'),
    ('image', 'kind', 'kl_vae', 'latents_mean'),
    ('image', 'weights', str(folders / 'nothing'), 'no weights at'),
  ):
    changed = config.copy_and_resolve_references()
    changed.model[section][field] = value
    with pytest.raises(UserError, match=message) as error:
      _loaded(systems.build(changed.to_dict()))
    assert '\n' not in str(error.value)
  config.model.codes = 32
  with pytest.raises(UserError, match='model.codes is 32'):
    systems.build(config.to_dict())


def test_paper_reads_the_published_sizes():
  model = systems.build(config_file.get_config('paper').to_dict()).config.model
  assert model.frozen['siglip_vq'].published.sizes == siglip_vq.SiglipVqConfig()
  assert model.frozen['image'].published.sizes == wan_vae.RELEASED_SIZES
  assert (model.visual_prompt_tokens, model.visual_prompt_codes) == (576, 16_384)
  assert dataclasses.asdict(model)['latent_size'] == 512 // 8


def _loaded(system):
  mesh = sharding.make_mesh(system.config.mesh)
  with jax.set_mesh(mesh):
    return frozen.load(system, mesh, 'fsdp')
