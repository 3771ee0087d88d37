"""Tests of CLIP against transformers: outputs, gradients and exact round trips."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.checkpoints import convert
from vpe_jax.checkpoints.families import clip
from vpe_jax.contracts import UserError
from vpe_jax.models.clip import Clip, at_end, normalised

pytestmark = pytest.mark.parity
NAME, END = 'clip', 30


@pytest.fixture(scope='module')
def saved(parity, tmp_path_factory):
  """A small reference model with random parameters, and its folder."""
  import transformers

  tower = {'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 40}
  vision = {'hidden_size': 24, 'image_size': 24, 'patch_size': 8}
  text = {'hidden_size': 16, 'vocab_size': 50, 'max_position_embeddings': 7, 'hidden_act': 'gelu'}
  config = transformers.CLIPConfig(
    vision_config=tower | vision,
    text_config=tower | text | {'eos_token_id': END, 'bos_token_id': 1},
    projection_dim=20,
  )
  model = parity.randomize(transformers.CLIPModel(config))
  folder = tmp_path_factory.mktemp('clip')
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope='module')
def imported(parity, saved):
  return parity.load(NAME, saved[1])


@pytest.fixture(scope='module')
def inputs():
  """Images, and captions with end tokens at different positions after larger ids."""
  rng = np.random.default_rng(0)
  images = rng.standard_normal((3, 24, 24, 3)).astype(np.float32)
  ids = rng.integers(31, 50, (3, 7)).astype(np.int32)
  for index, end in enumerate((3, 6, 4)):
    ids[index, end:] = END
  return images, ids


@functools.cache
def _compiled(sizes):
  """Jitted gradients of the logits weighted by `weights`; also logits and tower features."""

  def total(params, images, ids, weights):
    model, variables = Clip(sizes), {'params': params}
    logits = model.apply(variables, images, ids)
    features = (
      model.apply(variables, images, method='features'),
      model.apply(variables, ids, method='text_features'),
    )
    return jnp.sum(logits * weights), (logits, features)

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def _weights():
  return np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)


def _reference(model, images, ids):
  import torch

  pixels = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
  return model(pixel_values=pixels, input_ids=torch.tensor(ids).long()), pixels


def test_outputs_and_gradients_equal_transformers(parity, saved, imported, inputs, tmp_path):
  theirs, pixels = _reference(saved[0], *inputs)
  run = _compiled(imported.sizes)
  (_, ours), (param_grads, image_grads) = run(imported.params, *inputs, _weights())
  logits, (vision, text) = ours
  parity.assert_close(logits, theirs.logits_per_image.detach().numpy())
  parity.assert_close(vision, theirs.vision_model_output.last_hidden_state.detach().numpy())
  parity.assert_close(text, theirs.text_model_output.last_hidden_state.detach().numpy())
  saved[0].zero_grad()
  (theirs.logits_per_image * theirs.logits_per_image.new_tensor(_weights())).sum().backward()
  parity.assert_close(image_grads, pixels.grad.permute(0, 2, 3, 1).numpy(), 1e-4)
  parity.check_gradients(NAME, imported.sizes, param_grads, saved[0], tmp_path / 'gradients')


def test_round_trip_is_exact_and_transformers_opens_it(parity, saved, imported, inputs, tmp_path):
  import transformers

  parity.check_round_trip(NAME, saved[1], imported, tmp_path / 'out')
  reloaded, info = transformers.CLIPModel.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  expected = _reference(saved[0], *inputs)[0].logits_per_image.detach().numpy()
  parity.assert_close(
    _reference(reloaded, *inputs)[0].logits_per_image.detach().numpy(), expected, 1e-6
  )


def test_every_bias_norm_and_activation_matters(parity, imported, inputs):
  run = lambda params, sizes: np.asarray(_compiled(sizes)(params, *inputs, _weights())[0][1][0])
  insensitive = parity.insensitive(imported.params, lambda params: run(params, imported.sizes))
  # The bias of k shifts all logits of a query equally, which softmax ignores.
  assert not [path for path in insensitive if not path.endswith('/k/bias')]
  expected, sizes = run(imported.params, imported.sizes), imported.sizes
  assert (sizes.vision.activation, sizes.text.activation) == ('quick_gelu', 'gelu')
  swapped = dataclasses.replace(
    sizes,
    vision=dataclasses.replace(sizes.vision, activation='gelu'),
  )
  changed = run(imported.params, swapped)
  assert np.max(np.abs(changed - expected)) > 1e-3 * np.max(np.abs(expected))


def test_end_token_id_2_selects_the_largest_id(saved, inputs):
  config = saved[0].config.to_dict()
  sizes = clip.sizes(config | {'text_config': config['text_config'] | {'eos_token_id': 2}})
  assert sizes.end is None
  assert clip.config_json(sizes)['text_config']['eos_token_id'] == 2
  ids = jnp.asarray(inputs[1])
  positions = jnp.broadcast_to(jnp.arange(7.0)[:, None], (3, 7, 1))
  np.testing.assert_array_equal(at_end(ids, positions, None)[:, 0], np.argmax(inputs[1], axis=1))
  np.testing.assert_array_equal(at_end(ids, positions, END)[:, 0], [3, 6, 4])


def test_pixel_normalisation_equals_transformers():
  import transformers

  image = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
  processor = transformers.CLIPImageProcessor()
  expected = processor(image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
  np.testing.assert_allclose(normalised(jnp.asarray(image) / 255), expected, atol=2e-6)


def test_unsupported_configs_are_refused(saved):
  config = saved[0].config.to_dict()
  with pytest.raises(UserError, match="'relu'"):
    clip.sizes(config | {'vision_config': config['vision_config'] | {'hidden_act': 'relu'}})
  with pytest.raises(UserError, match='image_size'):
    clip.sizes(config | {'vision_config': config['vision_config'] | {'image_size': [224, 112]}})
  with pytest.raises(UserError, match='eos_token_id'):
    clip.sizes(config | {'text_config': config['text_config'] | {'eos_token_id': [2, 3]}})


@pytest.mark.parametrize(
  ('published', 'total'),
  [('clip_b32', 151_277_313), ('clip_l14', 427_616_513), ('clip_h14', 986_109_441)],
)
def test_published_sizes(parity, published, total):
  config, tensors = parity.load_published(published)
  sizes = clip.sizes(config)
  abstract = jax.eval_shape(lambda key: clip.init(sizes, key), jax.random.key(0))
  tensor_map = convert.match_tensors(tensors, clip.LAYOUTS, abstract)
  assert tensor_map.destinations.keys() == tensors.keys() and not tensor_map.absent
  assert parity.count(abstract) == total
  assert clip.sizes(clip.config_json(sizes)) == sizes
