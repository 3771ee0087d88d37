"""Tests of SigLIP against transformers: outputs, gradients and exact round trips."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.checkpoints import convert
from vpe_jax.checkpoints.families import siglip
from vpe_jax.models.siglip import Siglip

pytestmark = pytest.mark.parity
NAME = 'siglip'


@pytest.fixture(scope='module')
def saved(parity, tmp_path_factory):
  """A small reference model with random parameters, and its folder."""
  import transformers

  tower = {'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 40}
  config = transformers.SiglipConfig(
    vision_config={**tower, 'hidden_size': 24, 'image_size': 24, 'patch_size': 8},
    text_config={
      **tower,
      'hidden_size': 16,
      'vocab_size': 50,
      'max_position_embeddings': 6,
      'projection_size': 24,
    },
  )
  model = parity.randomize(transformers.SiglipModel(config))
  folder = tmp_path_factory.mktemp('siglip')
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope='module')
def imported(parity, saved):
  return parity.load(NAME, saved[1])


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  images = rng.standard_normal((3, 24, 24, 3)).astype(np.float32)
  return images, rng.integers(0, 50, (3, 6)).astype(np.int32)


def _logits(sizes, params, images, ids):
  length = jnp.full(len(ids), ids.shape[1])
  return Siglip(sizes).apply({'params': params}, images, ids, length)


def _reference(model, images, ids):
  import torch

  pixels = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
  return model(pixel_values=pixels, input_ids=torch.tensor(ids)).logits_per_image, pixels


def test_outputs_and_gradients_equal_transformers(parity, saved, imported, inputs, tmp_path):
  theirs, pixels = _reference(saved[0], *inputs)
  weights = np.random.default_rng(1).standard_normal(theirs.shape).astype(np.float32)

  def total(params, images):
    logits = _logits(imported.sizes, params, images, inputs[1])
    return jnp.sum(logits * weights), logits

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (_, ours), (param_grads, image_grads) = run(imported.params, inputs[0])
  parity.assert_close(ours, theirs.detach().numpy())
  saved[0].zero_grad()
  (theirs * theirs.new_tensor(weights)).sum().backward()
  parity.assert_close(image_grads, pixels.grad.permute(0, 2, 3, 1).numpy(), 1e-4)
  parity.check_gradients(NAME, imported.sizes, param_grads, saved[0], tmp_path / 'gradients')


def test_round_trip_is_exact_and_transformers_opens_it(parity, saved, imported, tmp_path):
  import transformers

  parity.check_round_trip(NAME, saved[1], imported, tmp_path / 'out')
  _, info = transformers.SiglipModel.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']


def test_every_bias_and_norm_matters(parity, imported, inputs):
  apply = jax.jit(lambda params: _logits(imported.sizes, params, *inputs))
  # The bias of k shifts all logits of a query equally, which softmax ignores.
  insensitive = [p for p in parity.insensitive(imported.params, apply) if not p.endswith('/k/bias')]
  assert not insensitive


@pytest.mark.parametrize(
  'published, total', [('siglip_so400m', 877_960_498), ('siglip_2_giant', 1_871_885_426)]
)
def test_published_sizes(parity, published, total):
  config, tensors = parity.load_published(published)
  sizes = siglip.sizes(config)
  abstract = jax.eval_shape(lambda key: siglip.init(sizes, key), jax.random.key(0))
  tensor_map = convert.match_tensors(tensors, siglip.LAYOUTS, abstract)
  assert tensor_map.destinations.keys() == tensors.keys() and not tensor_map.absent
  assert parity.count(abstract) == total
  assert siglip.sizes(siglip.config_json(sizes)) == sizes
