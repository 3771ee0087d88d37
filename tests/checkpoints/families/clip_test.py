"""CLIP as transformers saves it: the same numbers, gradients, and tensors back again."""

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
  """A small reference model, redrawn, and the folder it was saved to."""
  import transformers

  tower = {'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 40}
  vision = {'hidden_size': 24, 'image_size': 24, 'patch_size': 8}
  text = {'hidden_size': 16, 'vocab_size': 50, 'max_position_embeddings': 7, 'hidden_act': 'gelu'}
  config = transformers.CLIPConfig(
    vision_config=tower | vision,
    text_config=tower | text | {'eos_token_id': END, 'bos_token_id': 1},
    projection_dim=20,
  )
  model = parity.redraw(transformers.CLIPModel(config))
  folder = tmp_path_factory.mktemp('clip')
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture(scope='module')
def imported(parity, saved):
  return parity.load(NAME, saved[1])


@pytest.fixture(scope='module')
def inputs():
  """Pictures, and captions with their end token at different places, larger ids before it."""
  draw = np.random.default_rng(0)
  images = draw.standard_normal((3, 24, 24, 3)).astype(np.float32)
  ids = draw.integers(31, 50, (3, 7)).astype(np.int32)
  for row, end in enumerate((3, 6, 4)):
    ids[row, end:] = END
  return images, ids


@functools.cache
def _compiled(sizes):
  """Logits, weighted by `weights`, their gradients, and both towers' features."""

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
  (_, ours), (of_params, of_images) = run(imported.params, *inputs, _weights())
  logits, (vision, text) = ours
  parity.close(logits, theirs.logits_per_image.detach().numpy())
  parity.close(vision, theirs.vision_model_output.last_hidden_state.detach().numpy())
  parity.close(text, theirs.text_model_output.last_hidden_state.detach().numpy())
  saved[0].zero_grad()
  (theirs.logits_per_image * theirs.logits_per_image.new_tensor(_weights())).sum().backward()
  parity.close(of_images, pixels.grad.permute(0, 2, 3, 1).numpy(), 1e-4)
  parity.gradients(NAME, imported.sizes, of_params, saved[0], tmp_path / 'gradients')


def test_round_trip_is_exact_and_transformers_opens_it(parity, saved, imported, inputs, tmp_path):
  import transformers

  parity.trip(NAME, saved[1], imported, tmp_path / 'out')
  opened, found = transformers.CLIPModel.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not found['missing_keys'] and not found['unexpected_keys']
  wanted = _reference(saved[0], *inputs)[0].logits_per_image.detach().numpy()
  parity.close(_reference(opened, *inputs)[0].logits_per_image.detach().numpy(), wanted, 1e-6)


def test_every_bias_norm_and_activation_matters(parity, imported, inputs):
  run = lambda params, sizes: np.asarray(_compiled(sizes)(params, *inputs, _weights())[0][1][0])
  unnoticed = parity.mutants(imported.params, lambda params: run(params, imported.sizes))
  # A key's bias shifts all logits of a query alike, which softmax doesn't see.
  assert not [path for path in unnoticed if not path.endswith('/k/bias')]
  wanted, sizes = run(imported.params, imported.sizes), imported.sizes
  assert (sizes.vision.activation, sizes.text.activation) == ('quick_gelu', 'gelu')
  swapped = dataclasses.replace(
    sizes,
    vision=dataclasses.replace(sizes.vision, activation='gelu'),
  )
  found = run(imported.params, swapped)
  assert np.max(np.abs(found - wanted)) > 1e-3 * np.max(np.abs(wanted))


def test_end_token_of_openais_releases_is_the_largest_id(saved, inputs):
  said = saved[0].config.to_dict()
  sizes = clip.sizes(said | {'text_config': said['text_config'] | {'eos_token_id': 2}})
  assert sizes.end is None
  assert clip.published(sizes)['text_config']['eos_token_id'] == 2
  ids = jnp.asarray(inputs[1])
  places = jnp.broadcast_to(jnp.arange(7.0)[:, None], (3, 7, 1))
  np.testing.assert_array_equal(at_end(ids, places, None)[:, 0], np.argmax(inputs[1], axis=1))
  np.testing.assert_array_equal(at_end(ids, places, END)[:, 0], [3, 6, 4])


def test_pixels_are_normalised_as_published():
  import transformers

  picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
  processor = transformers.CLIPImageProcessor()
  wanted = processor(picture, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
  np.testing.assert_allclose(normalised(jnp.asarray(picture) / 255), wanted, atol=2e-6)


def test_what_ours_cannot_express_is_refused(saved):
  said = saved[0].config.to_dict()
  with pytest.raises(UserError, match="'relu'"):
    clip.sizes(said | {'vision_config': said['vision_config'] | {'hidden_act': 'relu'}})
  with pytest.raises(UserError, match='image_size'):
    clip.sizes(said | {'vision_config': said['vision_config'] | {'image_size': [224, 112]}})
  with pytest.raises(UserError, match='eos_token_id'):
    clip.sizes(said | {'text_config': said['text_config'] | {'eos_token_id': [2, 3]}})


@pytest.mark.parametrize(
  ('real', 'total'),
  [('clip_b32', 151_277_313), ('clip_l14', 427_616_513), ('clip_h14', 986_109_441)],
)
def test_real_sizes(parity, real, total):
  said, tensors = parity.published(real)
  sizes = clip.sizes(said)
  abstract = jax.eval_shape(lambda key: clip.init(sizes, key), jax.random.key(0))
  plan = convert.plan(tensors, clip.LAYOUTS, abstract)
  assert plan.places.keys() == tensors.keys() and not plan.absent
  assert parity.count(abstract) == total
  assert clip.sizes(clip.published(sizes)) == sizes
