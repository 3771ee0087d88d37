"""The golden Show-o2 as parameters of our model, and its inputs as rows of tokens."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
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


def params() -> dict:
  """The golden weights as our parameter tree; every tensor is used exactly once."""
  source = load_file(GOLDEN / 'model.safetensors')
  c = config()
  take = lambda key: source.pop(key).astype(np.float32)
  dense = lambda key: {'kernel': take(f'{key}.weight').T, 'bias': take(f'{key}.bias')}
  conv = lambda key: {
    'kernel': take(f'{key}.weight').transpose(2, 3, 1, 0).reshape(-1, c.ar.width)
    if 'gen' in key
    else take(f'{key}.weight').transpose(2, 3, 1, 0).reshape(-1, c.dual_path.encoder.width),
    'bias': take(f'{key}.bias'),
  }

  def heads(key: str, width: int, bias: bool) -> dict:
    kernel = take(f'{key}.weight').T
    tree = {'kernel': kernel.reshape(kernel.shape[0], -1, width)}
    return tree | ({'bias': take(f'{key}.bias').reshape(-1, width)} if bias else {})

  def out(key: str, width: int, bias: bool = False) -> dict:
    kernel = take(f'{key}.weight').T
    tree = {'kernel': kernel.reshape(-1, width, kernel.shape[1])}
    return tree | ({'bias': take(f'{key}.bias')} if bias else {})

  def layer(key: str, width: int, head: bool) -> dict:
    tree = {name: heads(f'{key}.self_attn.{name}_proj', width, not head) for name in 'qkv'}
    tree['o'] = out(f'{key}.self_attn.o_proj', width)
    for ours in ('gate', 'up', 'down'):
      tree[ours] = {'kernel': take(f'{key}.mlp.{ours}_proj.weight').T}
    tree['attention_norm'] = {'scale': take(f'{key}.input_layernorm.weight')}
    tree['mlp_norm'] = {'scale': take(f'{key}.post_attention_layernorm.weight')}
    if head:
      tree['q_norm'] = {'scale': take(f'{key}.self_attn.q_norm.weight')}
      tree['k_norm'] = {'scale': take(f'{key}.self_attn.k_norm.weight')}
      tree['modulation'] = {'out': dense(f'{key}.adaLN_modulation.1')}
    return tree

  def encoder_layer(key: str) -> dict:
    width = c.dual_path.encoder.width // c.dual_path.encoder.heads
    attention = {name: heads(f'{key}.self_attn.{name}_proj', width, True) for name in 'qkv'}
    attention['o'] = out(f'{key}.self_attn.out_proj', width, True)
    norm = lambda i: {
      'scale': take(f'{key}.layer_norm{i}.weight'),
      'bias': take(f'{key}.layer_norm{i}.bias'),
    }
    return {
      'attention': attention,
      'attention_norm': norm(1),
      'mlp_norm': norm(2),
      'mlp': {'up': dense(f'{key}.mlp.fc1'), 'down': dense(f'{key}.mlp.fc2')},
    }

  stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  body, blocks = c.ar, c.head.blocks
  tree = {
    'embed': {
      'text': take('showo.model.embed_tokens.weight'),
      'codes': np.zeros((2, body.width), np.float32),
    },
    'ar': {
      'layers': stack(
        [layer(f'showo.model.layers.{i}', body.head_width, False) for i in range(body.layers)]
      ),
      'norm': {'scale': take('showo.model.norm.weight')},
    },
    'dit': {
      'dual_path': {
        'ends': {
          'und': conv('image_embedder_und.proj'),
          'gen': conv('image_embedder_gen.proj'),
          'positions': take('position_embedding.weight'),
          'fusion_norm': {'scale': take('fusion_proj.0.weight')},
          'fusion_in': dense('fusion_proj.1'),
          'fusion_out': dense('fusion_proj.3'),
        },
        'encoder': stack(
          [encoder_layer(f'und_trans.layers.{i}') for i in range(c.dual_path.encoder.layers)]
        ),
      },
      'head': {
        'time': {
          'in': dense('time_embed.mlp.0'),
          'out': dense('time_embed.mlp.2'),
          'token': dense('time_embed_proj'),
        },
        'entry': {'in': dense('diff_proj.0'), 'out': dense('diff_proj.2')},
        'blocks': stack(
          [layer(f'diffusion_head_a.{i}', blocks.head_width, True) for i in range(blocks.layers)]
        ),
        'exit': {
          'norm': {'scale': take('diffusion_head_b.norm_final.weight')},
          'modulation': {'out': dense('diffusion_head_b.adaLN_modulation.1')},
          'out': dense('diffusion_head_b.linear'),
        },
      },
    },
  }
  assert not source, f'golden tensors without a place: {sorted(source)}'
  return jax.tree.map(jnp.asarray, tree)
