"""SigLIP: parity with transformers' SiglipModel, padding, and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.codecs.feature_vq import FeatureVqConfig
from vpe_jax.config import build_section
from vpe_jax.contracts import UserError
from vpe_jax.models import siglip
from vpe_jax.models.vit import EncoderConfig
from vpe_jax.systems.tokenizers import siglip as siglip_system

CONFIG = siglip.SiglipConfig(
  image_size=24,
  patch=8,
  vocabulary=50,
  text_length=6,
  vision=EncoderConfig(width=24, layers=2, heads=3, mlp=40),
  text=EncoderConfig(width=16, layers=2, heads=2, mlp=20),
)


def _attention(get, source, width, heads):
  """q, k, v, o of a transformers attention, in our layout."""
  split = (width, heads, width // heads)
  out = {}
  for ours, theirs in (('q', 'q_proj'), ('k', 'k_proj'), ('v', 'v_proj')):
    out[ours] = {
      'kernel': get(f'{source}.{theirs}.weight').T.reshape(split),
      'bias': get(f'{source}.{theirs}.bias').reshape(split[1:]),
    }
  kernel = get(f'{source}.out_proj.weight').T.reshape(*split[1:], width)
  return out | {'o': {'kernel': kernel, 'bias': get(f'{source}.out_proj.bias')}}


def _dense(get, source):
  return {'kernel': get(f'{source}.weight').T, 'bias': get(f'{source}.bias')}


def _norm(get, source):
  return {'scale': get(f'{source}.weight'), 'bias': get(f'{source}.bias')}


def _mlp(get, source):
  return {'up': _dense(get, f'{source}.fc1'), 'down': _dense(get, f'{source}.fc2')}


def _encoder(get, source, closing, config):
  layers = {
    f'layers_{i}': {
      'attention_norm': _norm(get, f'{source}.layers.{i}.layer_norm1'),
      'attention': _attention(get, f'{source}.layers.{i}.self_attn', config.width, config.heads),
      'mlp_norm': _norm(get, f'{source}.layers.{i}.layer_norm2'),
      'mlp': _mlp(get, f'{source}.layers.{i}.mlp'),
    }
    for i in range(config.layers)
  }
  return layers | {'norm': _norm(get, closing)}


def _ours(weights, config):
  """Our tree from a SiglipModel's state dict of numpy arrays."""
  get = weights.__getitem__
  v, t, width = 'vision_model', 'text_model', config.vision.width
  heads = config.vision.heads
  split = (width, heads, width // heads)
  pool = {}
  for i, name in enumerate('qkv'):
    outputs = slice(i * width, (i + 1) * width)
    pool[name] = {
      'kernel': get(f'{v}.head.attention.in_proj_weight')[outputs].T.reshape(split),
      'bias': get(f'{v}.head.attention.in_proj_bias')[outputs].reshape(split[1:]),
    }
  pool['o'] = {
    'kernel': get(f'{v}.head.attention.out_proj.weight').T.reshape(*split[1:], width),
    'bias': get(f'{v}.head.attention.out_proj.bias'),
  }
  patch = get(f'{v}.embeddings.patch_embedding.weight')
  return {
    'vision': {
      'embed': {
        'kernel': patch.transpose(2, 3, 1, 0).reshape(-1, width),
        'bias': get(f'{v}.embeddings.patch_embedding.bias'),
      },
      'position': get(f'{v}.embeddings.position_embedding.weight'),
      'encoder': _encoder(get, f'{v}.encoder', f'{v}.post_layernorm', config.vision),
      'pooling': {
        'probe': get(f'{v}.head.probe')[0],
        'attention': pool,
        'norm': _norm(get, f'{v}.head.layernorm'),
        'mlp': _mlp(get, f'{v}.head.mlp'),
      },
    },
    'text': {
      'token': get(f'{t}.embeddings.token_embedding.weight'),
      'position': get(f'{t}.embeddings.position_embedding.weight'),
      'encoder': _encoder(get, f'{t}.encoder', f'{t}.final_layer_norm', config.text),
      'head': _dense(get, f'{t}.head'),
    },
    'logit_scale': get('logit_scale')[0],
    'logit_bias': get('logit_bias')[0],
  }


def _reference():
  """A transformers model of CONFIG's sizes with every parameter random."""
  import torch
  import transformers

  sizes = lambda e: {
    'hidden_size': e.width,
    'num_hidden_layers': e.layers,
    'num_attention_heads': e.heads,
    'intermediate_size': e.mlp,
  }
  model = transformers.SiglipModel(
    transformers.SiglipConfig(
      text_config={
        **sizes(CONFIG.text),
        'vocab_size': CONFIG.vocabulary,
        'max_position_embeddings': CONFIG.text_length,
        'projection_size': CONFIG.vision.width,
      },
      vision_config={
        **sizes(CONFIG.vision),
        'image_size': CONFIG.image_size,
        'patch_size': CONFIG.patch,
      },
    )
  ).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, leaf in model.named_parameters():
      noise = torch.randn(leaf.shape, generator=generator)
      if 'norm' in name and name.endswith('weight'):
        leaf.copy_(1 + 0.3 * noise)
      elif name.endswith('bias') or 'position' in name or 'logit' in name:
        leaf.copy_(0.3 * noise)
      elif '_proj' in name and ('.q' in name or '.k' in name or 'in_proj' in name):
        leaf.copy_(1.5 * noise * leaf.shape[-1] ** -0.5)  # attention logits of deviation >= 1
      else:
        leaf.copy_(noise * leaf[0].numel() ** -0.5 if leaf.ndim > 1 else noise)
  return model


@pytest.fixture(scope='module')
def pair():
  """(reference outputs, our parameters, inputs)."""
  import torch

  model = _reference()
  rng = np.random.default_rng(0)
  images = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
  text = rng.integers(0, CONFIG.vocabulary, (3, 6)).astype(np.int32)
  with torch.no_grad():
    out = model(
      input_ids=torch.from_numpy(text).long(),
      pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
      return_loss=True,
    )
    raw = model.vision_model(
      torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), output_hidden_states=True
    )
  weights = {k: v.numpy() for k, v in model.state_dict().items()}
  expected = {
    'features': out.vision_model_output.last_hidden_state,
    'raw': raw.hidden_states[1],
    'pooled': out.vision_model_output.pooler_output,
    'text_features': out.text_model_output.last_hidden_state,
    'text_pooled': out.text_model_output.pooler_output,
    'logits': out.logits_per_image,
    'loss': out.loss,
  }
  expected = {k: v.detach().numpy() for k, v in expected.items()}
  return expected, _ours(weights, CONFIG), images, text


def _outputs(params, images, text):
  """Everything that the reference returns, from our towers."""
  net = siglip.Siglip(CONFIG)
  length = jnp.full((text.shape[0],), CONFIG.text_length)

  def run(module):
    features = module.features(images)
    return {
      'features': features,
      'raw': module.features(images, 1),
      'pooled': module.vision.pool(features),
      'text_features': module.text.features(text, length),
      'text_pooled': module.text(text, length),
      'logits': module(images, text, length),
    }

  return net.apply({'params': params}, method=run)


def _distance(output, expected):
  return float(np.max(np.abs(np.asarray(output) - expected)) / np.max(np.abs(expected)))


@pytest.mark.parity
def test_towers_and_logits_agree_with_transformers(pair):
  expected, params, images, text = pair
  for name, value in _outputs(params, images, text).items():
    assert _distance(value, expected[name]) < 2e-5, name


@pytest.mark.parity
def test_sigmoid_loss_agrees_with_transformers(pair):
  from vpe_jax.objectives import alignment

  expected, params, images, text = pair
  logits = _outputs(params, images, text)['logits']
  loss = jnp.mean(alignment.sigmoid_loss(logits, alignment.same_caption(text)))
  np.testing.assert_allclose(loss, expected['loss'], rtol=2e-5)


@pytest.mark.parity
def test_every_bias_and_norm_matters_to_parity(pair):
  """Dropping any bias or swapping the norms of a layer breaks parity."""
  expected, params, images, text = pair
  leaves, tree = jax.tree_util.tree_flatten_with_path(params)
  run = jax.jit(lambda p: _outputs(p, images, text))

  def worst(changed):
    out = run(changed)
    return max(_distance(out[name], expected[name]) for name in out)

  for i, (path, leaf) in enumerate(leaves):
    keys = [str(p.key) for p in path]
    # The same number added to all keys of a head changes no softmax.
    if keys[-1] != 'bias' or keys[-2] == 'k':
      continue
    values = [v for _, v in leaves]
    values[i] = jnp.zeros_like(leaf)
    assert worst(jax.tree.unflatten(tree, values)) > 1e-3, keys
  for tower in ('vision', 'text'):
    swapped = jax.tree.map(lambda x: x, params)
    layer = swapped[tower]['encoder']['layers_0']
    layer['attention_norm'], layer['mlp_norm'] = layer['mlp_norm'], layer['attention_norm']
    assert worst(swapped) > 1e-3, tower


def test_padding_does_not_change_a_caption(pair):
  _, params, _, text = pair
  net = siglip.Siglip(CONFIG)
  embed = lambda ids, n: net.apply({'params': params}, ids, n, method='embed_text')
  length = jnp.array([2, 4, 6])
  sevens = jnp.where(jnp.arange(6) < length[:, None], text, 7)
  zeros = jnp.where(jnp.arange(6) < length[:, None], text, 0)
  np.testing.assert_allclose(embed(sevens, length), embed(zeros, length), atol=1e-6)
  cut = embed(zeros[:, :4], jnp.minimum(length, 4))
  np.testing.assert_allclose(embed(zeros, length)[:2], cut[:2], atol=1e-6)
  assert np.abs(embed(zeros, length) - embed(zeros, length - 1)).max() > 1e-3


def test_bfloat16_follows_float32(pair):
  _, params, images, text = pair
  length = jnp.full((3,), 6)
  half = siglip.Siglip(CONFIG, jnp.bfloat16)
  vectors = half.apply({'params': params}, images, method='embed_images')
  expected = siglip.Siglip(CONFIG).apply({'params': params}, images, method='embed_images')
  assert vectors.dtype == jnp.float32
  assert float(jnp.min(jnp.sum(vectors * expected, -1))) > 0.99
  assert half.apply({'params': params}, images, text, length).dtype == jnp.float32


@pytest.mark.parametrize('cls', [siglip_system.ModelConfig, FeatureVqConfig])
def test_an_image_size_that_patches_do_not_fill_is_named_with_its_path(cls):
  with pytest.raises(UserError, match="'siglip.image_size' is 20.*patch=8"):
    build_section(cls, {'siglip': {'image_size': 20}})
