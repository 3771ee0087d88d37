"""Tests of DINOv2 against transformers: outputs, gradients and exact round trips."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.checkpoints import convert
from vpe_jax.checkpoints.families import dinov2
from vpe_jax.contracts import UserError
from vpe_jax.models.dinov2 import Dinov2, normalised

pytestmark = pytest.mark.parity
NAME = 'dinov2'


@pytest.fixture(scope='module', params=['mlp', 'swiglu'])
def saved(parity, request, tmp_path_factory):
  """A small reference model with random parameters, and its folder."""
  import transformers

  config = transformers.Dinov2Config(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_ratio=2,
    image_size=24,
    patch_size=6,
    use_swiglu_ffn=request.param == 'swiglu',
  )
  model = parity.randomize(transformers.Dinov2Model(config))
  folder = tmp_path_factory.mktemp('dinov2')
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope='module')
def imported(parity, saved):
  return parity.load(NAME, saved[1])


@pytest.fixture(scope='module')
def images():
  """Images whose size differs from the position table's and has pixels that fill no patch."""
  return np.random.default_rng(0).standard_normal((2, 38, 31, 3)).astype(np.float32)


@functools.cache
def _compiled(sizes):
  def total(params, images, weights):
    features = Dinov2(sizes).apply({'params': params}, images, method='features')
    return jnp.sum(features * weights), features

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def _reference(model, images):
  import torch

  pixels = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
  return model(pixel_values=pixels), pixels


def _weights():
  return np.random.default_rng(1).standard_normal((2, 31, 24)).astype(np.float32)


def test_features_and_gradients_equal_transformers(parity, saved, imported, images, tmp_path):
  theirs, pixels = _reference(saved[0], images)
  run = _compiled(imported.sizes)
  (_, ours), (param_grads, image_grads) = run(imported.params, images, _weights())
  features = theirs.last_hidden_state
  parity.assert_close(ours, features.detach().numpy())
  parity.assert_close(ours[:, 0], theirs.pooler_output.detach().numpy())
  saved[0].zero_grad()
  (features * features.new_tensor(_weights())).sum().backward()
  parity.assert_close(image_grads, pixels.grad.permute(0, 2, 3, 1).numpy(), 1e-4)
  parity.check_gradients(NAME, imported.sizes, param_grads, saved[0], tmp_path / 'gradients')


def test_features_of_any_layer_equal_at_the_config_resolution(parity, saved, imported, images):
  square, model = images[:, :24, :24], Dinov2(imported.sizes)
  pixels = _reference(saved[0], square)[1]
  theirs = saved[0](pixel_values=pixels, output_hidden_states=True)
  run = lambda depth: model.apply({'params': imported.params}, square, depth, method='features')
  parity.assert_close(run(None), theirs.last_hidden_state.detach().numpy())
  parity.assert_close(run(1), theirs.hidden_states[1].detach().numpy())


def test_round_trip_is_exact_and_transformers_opens_it(parity, saved, imported, images, tmp_path):
  import transformers

  parity.check_round_trip(NAME, saved[1], imported, tmp_path / 'out')
  assert list(imported.tensor_map.ignored) == ['embeddings.mask_token']
  reloaded, info = transformers.Dinov2Model.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not info['missing_keys'] and not info['unexpected_keys']
  expected = _reference(saved[0], images)[0].last_hidden_state.detach().numpy()
  parity.assert_close(
    _reference(reloaded, images)[0].last_hidden_state.detach().numpy(), expected, 1e-6
  )


def test_every_bias_norm_scale_and_activation_matters(parity, imported, images):
  run = lambda params, sizes: np.asarray(_compiled(sizes)(params, images, _weights())[0][1])
  insensitive = parity.insensitive(imported.params, lambda params: run(params, imported.sizes))
  # The bias of k shifts all logits of a query equally, which softmax ignores.
  assert not [path for path in insensitive if not path.endswith('/k/bias')]
  encoder = imported.sizes.encoder
  if encoder.activation == 'gelu':
    quick_gelu = dataclasses.replace(encoder, activation='quick_gelu')
    expected = run(imported.params, imported.sizes)
    changed = run(imported.params, dataclasses.replace(imported.sizes, encoder=quick_gelu))
    assert np.max(np.abs(changed - expected)) > 1e-3 * np.max(np.abs(expected))


def test_pixel_normalisation_equals_transformers():
  from transformers import image_utils

  image = np.random.default_rng(0).integers(0, 256, (28, 28, 3)) / 255
  mean, std = image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD
  np.testing.assert_allclose(normalised(jnp.asarray(image)), (image - mean) / std, atol=2e-6)


def test_unsupported_configs_are_refused(imported):
  config = dinov2.config_json(imported.sizes)
  with pytest.raises(UserError, match='qkv_bias'):
    dinov2.sizes(config | {'qkv_bias': False})
  with pytest.raises(UserError, match='patch_size'):
    dinov2.sizes(config | {'patch_size': [14, 7]})
  encoder = imported.sizes.encoder
  for changes in ({'mlp': 25}, {'mlp': 17 * encoder.width}, {'mlp': 25, 'activation': 'swiglu'}):
    odd = dataclasses.replace(encoder, **changes)
    message = f'mlp_ratio up to 16 .*{odd.mlp} .*{odd.width} .*{odd.activation}'
    with pytest.raises(UserError, match=message):
      dinov2.config_json(dataclasses.replace(imported.sizes, encoder=odd))


@pytest.mark.parametrize(
  ('published', 'total'),
  [
    ('dinov2_small', 22_056_576),
    ('dinov2_base', 86_580_480),
    ('dinov2_large', 304_368_640),
    ('dinov2_giant', 1_136_480_768),
  ],
)
def test_published_sizes(parity, published, total):
  config, tensors = parity.load_published(published)
  sizes = dinov2.sizes(config)
  abstract = jax.eval_shape(lambda key: dinov2.init(sizes, key), jax.random.key(0))
  tensor_map = convert.match_tensors(tensors, dinov2.LAYOUTS, abstract)
  assert (
    tensor_map.destinations.keys() | tensor_map.ignored.keys() == tensors.keys()
    and not tensor_map.absent
  )
  assert list(tensor_map.ignored) == ['embeddings.mask_token']
  # The published total includes the mask token, which is only used in training.
  assert parity.count(abstract) + sizes.encoder.width == total
  assert dinov2.sizes(dinov2.config_json(sizes)) == sizes
