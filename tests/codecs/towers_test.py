"""Published towers as the visual prompt's encoder: parity with transformers, and a trained run."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from configs import codec as codec_file
from configs import t2i as t2i_file
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import exports, frozen
from vpe_jax.codecs.feature_vq import FeatureVqConfig
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import Batch, ScoresImages, UserError, supports
from vpe_jax.training import loop, metrics

VIEW, PATCH, WIDTH = 24, 6, 24
TOWER = {'num_hidden_layers': 3, 'num_attention_heads': 2}
OURS = {'width': WIDTH, 'layers': 3, 'heads': 2, 'mlp': 48}
TEXT = {'width': 16, 'layers': 3, 'heads': 2, 'mlp': 48}
# Sizes of each tower as a config file gives them.
SIZES = {
  'siglip2': {'image_size': VIEW, 'patch': PATCH, 'vocabulary': 50, 'text_length': 7}
  | {'vision': OURS, 'text': TEXT},
  'dinov2': {'image_size': 36, 'patch': PATCH, 'view': VIEW}
  | {'encoder': OURS | {'activation': 'gelu', 'layer_scale': True}},
  'clip': {'image_size': VIEW, 'patch': PATCH, 'view': VIEW, 'vocabulary': 50, 'text_length': 7}
  | {'width': 20, 'vision': OURS | {'eps': 1e-5, 'activation': 'quick_gelu'}}
  | {'text': TEXT | {'eps': 1e-5, 'activation': 'quick_gelu'}},
}


def _reference(encoder):
  """A small model of transformers, and the mean and deviation of its image processor."""
  import transformers

  vision = TOWER | {'hidden_size': WIDTH, 'patch_size': PATCH}
  if encoder == 'dinov2':
    config = transformers.Dinov2Config(**vision, mlp_ratio=2, image_size=36)
    return transformers.Dinov2Model(config), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  vision |= {'intermediate_size': 48, 'image_size': VIEW}
  text = TOWER | {'hidden_size': 16, 'intermediate_size': 48, 'vocab_size': 50}
  text |= {'max_position_embeddings': 7}
  if encoder == 'siglip2':
    text |= {'projection_size': WIDTH, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    return transformers.SiglipModel(config), (0.5,) * 3, (0.5,) * 3
  text |= {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}
  config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=20)
  mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
  return transformers.CLIPModel(config), mean, std


@pytest.fixture(scope='module', params=['siglip2', 'dinov2', 'clip'])
def saved(request, tmp_path_factory):
  """An encoder, its reference with random weights, and its folder."""
  import torch

  model, mean, std = _reference(request.param)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for leaf in model.parameters():
      scale = 1.0 / max(1, leaf[0].numel()) ** 0.5 if leaf.ndim > 1 else 0.3
      leaf.copy_(scale * torch.randn(leaf.shape, generator=generator) + (leaf.ndim == 1))
  folder = tmp_path_factory.mktemp(request.param)
  model.eval().save_pretrained(folder)
  return request.param, (model, mean, std), folder


def _codec_system(saved, depth=-1):
  encoder, _, folder = saved
  config = codec_file.get_config(f'debug,stage=feature_vq,encoder={encoder}')
  config.model.feature_vq.update({encoder: SIZES[encoder], 'depth': depth, 'codes': 64})
  config.model.encoder_weights = str(folder)
  return systems.build(config.to_dict())


def _images(count=3):
  return np.random.default_rng(0).integers(0, 256, (count, VIEW, VIEW, 3), np.uint8)


@pytest.mark.parity
def test_features_equal_those_of_transformers(saved):
  """Patches only: the normed last output, for CLIP the last layer but one, or that of `depth`."""
  import torch

  encoder, (model, mean, std), _ = saved
  pixels = (_images() / 255.0 - np.asarray(mean)) / np.asarray(std)
  pixels = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
  tower = model if encoder == 'dinov2' else model.vision_model
  with torch.no_grad():
    outputs = tower(pixel_values=pixels, output_hidden_states=True)
  states, first = outputs.hidden_states, 0 if encoder == 'siglip2' else 1
  own = states[2] if encoder == 'clip' else outputs.last_hidden_state
  mesh = sharding.make_mesh(MeshConfig())
  networks = frozen.load(_codec_system(saved), mesh, 'fsdp').params
  for depth, expected in ((-1, own), (1, states[1])):
    system = _codec_system(saved, depth)
    inputs = {'image': _images(), 'tower_image': _images()}
    encoded = jax.jit(system.encode)(networks, inputs, None)
    ours = np.asarray(encoded['features'])
    theirs = expected[:, first:].numpy()
    assert ours.shape == theirs.shape == (3, system.tokens(system.stages[0]), WIDTH)
    error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    assert error < 1e-5, f'depth {depth}: relative error {error:.1e}'


@pytest.mark.parametrize('encoder', ['siglip', 'dinov2'])
def test_losses_read_the_image_that_the_pipeline_resized_for_the_tower(encoder):
  """A published tower reads the resized image; the shipped SigLIP reads the system's image."""
  config = codec_file.get_config(f'debug,stage=feature_vq,encoder={encoder}')
  config.model.feature_vq.update({'dinov2': SIZES['dinov2'], 'codes': 16})
  config.model.feature_vq.siglip = {'vision': OURS, 'text': TEXT}
  system = systems.build(config.to_dict())
  key = rng.run_key(0)
  generator = np.random.default_rng(0)
  shapes = system.batch_spec(2).inputs
  inputs = {
    name: generator.integers(0, 200, leaf.shape).astype(leaf.dtype) for name, leaf in shapes.items()
  }
  inputs['text_length'] = np.full(2, 5, np.int32)
  sample = lambda leaf: 0.3 * generator.standard_normal(leaf.shape, np.float32)
  networks = jax.tree.map(sample, system.frozen_shapes())
  params, stage = system.init(key), system.stages[0]

  @jax.jit
  def loss(inputs):
    batch = Batch(np.arange(2, dtype=np.int32), inputs)
    return system.losses(params, networks, batch, key, 0, stage)['features'].sum

  names = ('image', 'tower_image') if encoder == 'dinov2' else ('image',)
  changed = {name for name in names if loss(inputs | {name: 255 - inputs[name]}) != loss(inputs)}
  assert changed == {names[-1]}


@pytest.mark.slow
@pytest.mark.parametrize(
  'saved',
  ['siglip2', *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ('dinov2', 'clip'))],
  indirect=True,
)
def test_a_quantiser_is_trained_and_a_generator_reads_its_codes(saved, tmp_path):
  encoder, _, folder = saved
  system = _codec_system(saved)
  assert set(system.stages[0].losses) == {'features', 'commitment', 'usage', 'perplexity'}
  loop.train(system.config, system, str(tmp_path / 'run'))
  losses = [record['loss/features'] for record in metrics.read(tmp_path / 'run')]
  assert losses[-1] < losses[0]
  exported = str(tmp_path / 'feature_vq.safetensors')
  exports.export(str(tmp_path / 'run'), exported, 'feature_vq', 'ema', False)

  config = t2i_file.get_config('debug')
  config.model.codes, config.data.encode = 64, 'online'
  config.model.visual_prompt = {
    'encoder': encoder,
    'codes': 64,
    encoder: SIZES[encoder],
    'decoder': {'width': 32, 'layers': 1, 'heads': 2, 'mlp': 64},
    'tower_weights': str(folder),
    'weights': exported,
  }
  reader = systems.build(config.to_dict())
  assert not supports(reader, ScoresImages) and reader.plan_rankers == ('likelihood',)
  assert reader.config.model.visual_prompt_tokens == (VIEW // PATCH) ** 2
  networks = frozen.load(reader, sharding.make_mesh(MeshConfig()), 'fsdp').params
  assert set(networks) == {encoder, 'feature_vq', 'image'}
  blocks = np.random.default_rng(1).choice([0, 255], (4, 4, 4, 3)).astype(np.uint8)
  images = blocks.repeat(16, axis=1).repeat(16, axis=2)
  view = images[:, :VIEW, :VIEW]
  inputs = {'image': images, 'visual_prompt_image': view}
  encoded = jax.jit(reader.encode)(networks, inputs, None)
  codes = encoded['visual_prompt']
  assert codes.shape == (4, 16) and 0 <= codes.min() and codes.max() < 64
  # They equal the codes of the trained run, and are not all the same.
  again = jax.jit(system.feature_codec.encode)(networks, view)
  np.testing.assert_array_equal(codes, again)
  assert len(np.unique(codes)) > 1


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="encoder=dino; did you mean 'dinov2'"):
    codec_file.get_config('debug,encoder=dino')
  with pytest.raises(UserError, match="'dino': it must be one of siglip, siglip2, dinov2, clip"):
    FeatureVqConfig(encoder='dino')
  with pytest.raises(UserError, match='at most the 24 layers of encoder=clip'):
    FeatureVqConfig(encoder='clip', depth=25)
  config = t2i_file.get_config('tiny')
  config.model.visual_prompt = {'encoder': 'dinov2'}
  with pytest.raises(UserError, match='encoder=dinov2 replaces it: set model.inherit=0'):
    systems.build(config.to_dict())
