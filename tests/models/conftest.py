"""The golden Show-o2 as parameters of our model, and its inputs as rows of tokens."""

from __future__ import annotations

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vpe_jax.models.diffusion_head import HeadConfig
from vpe_jax.models.dual_path import DualPathConfig
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.models.unified import UnifiedConfig
from vpe_jax.models.vit import EncoderConfig
from vpe_jax.ops.rope import RopeScaling

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'showo2'


def config() -> UnifiedConfig:
  """The golden model's sizes; two visual prompt rows that nothing uses."""
  c = json.loads((GOLDEN / 'config.json').read_text())
  h = c['head']
  scaling = h['rope_scaling']
  body = TransformerConfig(
    width=c['hidden_size'],
    mlp=c['intermediate_size'],
    layers=c['num_hidden_layers'],
    heads=c['num_attention_heads'],
    kv_heads=c['num_key_value_heads'],
    head_width=c['hidden_size'] // c['num_attention_heads'],
  )
  return UnifiedConfig(
    arch='single',
    text_vocab=c['vocab_size'],
    codes=0,
    bos=0,
    boi=0,
    latent_size=c['latent_size'],
    latent_channels=c['latent_channels'],
    patch=c['patch_size'],
    layout='raster',
    multiple=1,
    ar=body,
    dit=body,
    dual_path=DualPathConfig(
      EncoderConfig(
        c['clip_latent_dim'], c['clip_layers'], c['clip_heads'], c['clip_intermediate']
      ),
      table=27,
    ),
    head=HeadConfig(
      width=h['hidden_size'],
      mlp=h['intermediate_size'],
      layers=h['blocks'],
      heads=h['num_attention_heads'],
      kv_heads=h['num_key_value_heads'],
      head_width=h['head_dim'],
      rope_theta=h['rope_theta'],
      rope_scaling=RopeScaling(
        scaling['factor'],
        scaling['low_freq_factor'],
        scaling['high_freq_factor'],
        scaling['original_max_position_embeddings'],
      ),
    ),
  )


class _Source:
  """The golden tensors; each may be taken once."""

  def __init__(self) -> None:
    self.left = load_file(GOLDEN / 'model.safetensors')

  def take(self, key: str) -> np.ndarray:
    return self.left.pop(key).astype(np.float32)

  def dense(self, key: str) -> dict:
    return {'kernel': self.take(f'{key}.weight').T, 'bias': self.take(f'{key}.bias')}

  def scale(self, key: str) -> dict:
    return {'scale': self.take(f'{key}.weight')}

  def patches(self, key: str) -> dict:
    """A 2x2 convolution as a dense layer over patches in (row, column, channel) order."""
    kernel = self.take(f'{key}.weight')
    kernel = kernel.transpose(2, 3, 1, 0).reshape(-1, kernel.shape[0])
    return {'kernel': kernel, 'bias': self.take(f'{key}.bias')}

  def heads(self, key: str, width: int, bias: bool) -> dict:
    kernel = self.take(f'{key}.weight').T
    tree = {'kernel': kernel.reshape(kernel.shape[0], -1, width)}
    return tree | ({'bias': self.take(f'{key}.bias').reshape(-1, width)} if bias else {})

  def out(self, key: str, width: int, bias: bool = False) -> dict:
    kernel = self.take(f'{key}.weight').T
    tree = {'kernel': kernel.reshape(-1, width, kernel.shape[1])}
    return tree | ({'bias': self.take(f'{key}.bias')} if bias else {})

  def layer(self, key: str, width: int, head: bool) -> dict:
    tree = {name: self.heads(f'{key}.self_attn.{name}_proj', width, not head) for name in 'qkv'}
    tree['o'] = self.out(f'{key}.self_attn.o_proj', width)
    for name in ('gate', 'up', 'down'):
      tree[name] = {'kernel': self.take(f'{key}.mlp.{name}_proj.weight').T}
    tree['attention_norm'] = self.scale(f'{key}.input_layernorm')
    tree['mlp_norm'] = self.scale(f'{key}.post_attention_layernorm')
    if head:
      tree['q_norm'] = self.scale(f'{key}.self_attn.q_norm')
      tree['k_norm'] = self.scale(f'{key}.self_attn.k_norm')
      tree['modulation'] = {'out': self.dense(f'{key}.adaLN_modulation.1')}
    return tree

  def encoder_layer(self, key: str, width: int) -> dict:
    attention = {name: self.heads(f'{key}.self_attn.{name}_proj', width, True) for name in 'qkv'}
    attention['o'] = self.out(f'{key}.self_attn.out_proj', width, True)
    norm = lambda i: (
      self.scale(f'{key}.layer_norm{i}') | {'bias': self.take(f'{key}.layer_norm{i}.bias')}
    )
    mlp = {'up': self.dense(f'{key}.mlp.fc1'), 'down': self.dense(f'{key}.mlp.fc2')}
    return {'attention': attention, 'attention_norm': norm(1), 'mlp_norm': norm(2), 'mlp': mlp}


def _stack(trees: list[dict]) -> dict:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def params() -> dict:
  """The golden weights as our parameter tree; every tensor is used exactly once."""
  c, source = config(), _Source()
  body, blocks, und = c.ar, c.head.blocks, c.dual_path.encoder
  ends = {
    'und': source.patches('image_embedder_und.proj'),
    'gen': source.patches('image_embedder_gen.proj'),
    'positions': source.take('position_embedding.weight'),
    'fusion_norm': source.scale('fusion_proj.0'),
    'fusion_in': source.dense('fusion_proj.1'),
    'fusion_out': source.dense('fusion_proj.3'),
  }
  encoder = [
    source.encoder_layer(f'und_trans.layers.{i}', und.width // und.heads) for i in range(und.layers)
  ]
  layers = [
    source.layer(f'showo.model.layers.{i}', body.head_width, False) for i in range(body.layers)
  ]
  modulated = [
    source.layer(f'diffusion_head_a.{i}', blocks.head_width, True) for i in range(blocks.layers)
  ]
  head = {
    'time': {
      'in': source.dense('time_embed.mlp.0'),
      'out': source.dense('time_embed.mlp.2'),
      'token': source.dense('time_embed_proj'),
    },
    'entry': {'in': source.dense('diff_proj.0'), 'out': source.dense('diff_proj.2')},
    'blocks': _stack(modulated),
    'exit': {
      'norm': source.scale('diffusion_head_b.norm_final'),
      'modulation': {'out': source.dense('diffusion_head_b.adaLN_modulation.1')},
      'out': source.dense('diffusion_head_b.linear'),
    },
  }
  text = source.take('showo.model.embed_tokens.weight')
  tree = {
    'embed': {'text': text, 'codes': np.zeros((2, body.width), np.float32)},
    'ar': {'layers': _stack(layers), 'norm': source.scale('showo.model.norm')},
    'dit': {'dual_path': {'ends': ends, 'encoder': _stack(encoder)}, 'head': head},
  }
  assert not source.left, f'golden tensors without a place: {sorted(source.left)}'
  return jax.tree.map(jnp.asarray, tree)


@pytest.fixture(scope='session')
def show_o2() -> types.SimpleNamespace:
  """`config()`, `params()` (fresh trees, free to change) and `io`: inputs and outputs."""
  io = dict(np.load(GOLDEN / 'io.npz'))
  return types.SimpleNamespace(config=config, params=params, io=io)
