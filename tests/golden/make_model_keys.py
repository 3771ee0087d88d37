"""Writes tests/golden/keys: all keys and shapes of published models, without any weights.

Command: python tests/golden/make_model_keys.py

NAME.json.gz maps keys to shapes; NAME.config.json has the sizes of the model's config.json. Keys of
models in transformers come from its classes on torch's meta device. Keys of other releases are
written out here, layer by layer, and first compared with the golden folder.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

GOLDEN = Path(__file__).parent
Shapes = dict[str, tuple[int, ...]]

QWEN2 = {
  'architectures': ['Qwen2ForCausalLM'],
  'model_type': 'qwen2',
  'vocab_size': 151936,
  'max_position_embeddings': 32768,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e6,
  'use_sliding_window': False,
  'tie_word_embeddings': True,
}
LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 128256,
  'max_position_embeddings': 131072,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-5,
  'rope_theta': 5e5,
  'attention_bias': False,
  'mlp_bias': False,
  'num_key_value_heads': 8,
}
STRETCH = {
  'rope_type': 'llama3',
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
CLIP = {'architectures': ['CLIPModel'], 'model_type': 'clip'}
OPENAI = {'hidden_act': 'quick_gelu', 'eos_token_id': 2}


def _tower(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
  return {
    'hidden_size': width,
    'intermediate_size': 4 * width,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    **more,
  }


def _dinov2(width: int, layers: int, heads: int, *, swiglu: bool = False) -> dict[str, Any]:
  return {
    'architectures': ['Dinov2Model'],
    'model_type': 'dinov2',
    'hidden_size': width,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'image_size': 518,
    'use_swiglu_ffn': swiglu,
  }


def _so400m(**more: Any) -> dict[str, Any]:
  """SigLIP's shape-optimised tower, which SigLIP 2's giant has for text."""
  return _tower(1152, 27, 16, **more) | {'intermediate_size': 4304}


def _siglip(vision: dict[str, Any], text: dict[str, Any], **view: int) -> dict[str, Any]:
  return {
    'architectures': ['SiglipModel'],
    'model_type': 'siglip',
    'vision_config': vision | view,
    'text_config': text | {'max_position_embeddings': 64, 'projection_size': vision['hidden_size']},
  }


def _llamagen(width: int, layers: int, heads: int, hidden: int) -> dict[str, Any]:
  return {
    'model_type': 'llamagen',
    'dim': width,
    'n_layer': layers,
    'n_head': heads,
    'ffn_hidden': hidden,
    'num_classes': 1000,
    'vocab_size': 16384,
    'block_size': 576,
  }


CONFIGS: dict[str, dict[str, Any]] = {
  'qwen2_0.5b': QWEN2
  | {
    'hidden_size': 896,
    'intermediate_size': 4864,
    'num_hidden_layers': 24,
    'num_attention_heads': 14,
    'num_key_value_heads': 2,
  },
  'qwen2_1.5b': QWEN2
  | {
    'hidden_size': 1536,
    'intermediate_size': 8960,
    'num_hidden_layers': 28,
    'num_attention_heads': 12,
    'num_key_value_heads': 2,
  },
  'qwen2_7b': QWEN2
  | {
    'vocab_size': 152064,
    'hidden_size': 3584,
    'intermediate_size': 18944,
    'num_hidden_layers': 28,
    'num_attention_heads': 28,
    'num_key_value_heads': 4,
    'tie_word_embeddings': False,
  },
  'llama_1b': LLAMA
  | {
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'num_hidden_layers': 16,
    'num_attention_heads': 32,
    'head_dim': 64,
    'rope_scaling': STRETCH | {'factor': 32.0},
    'tie_word_embeddings': True,
  },
  'llama_8b': LLAMA
  | {
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'rope_scaling': STRETCH | {'factor': 8.0},
    'tie_word_embeddings': False,
  },
  'clip_b32': CLIP
  | {
    'projection_dim': 512,
    'vision_config': _tower(768, 12, 12, patch_size=32, hidden_act='quick_gelu'),
    'text_config': _tower(512, 12, 8, **OPENAI),
  },
  'clip_l14': CLIP
  | {
    'projection_dim': 768,
    'vision_config': _tower(1024, 24, 16, patch_size=14, hidden_act='quick_gelu'),
    'text_config': _tower(768, 12, 12, **OPENAI),
  },
  'clip_h14': CLIP
  | {
    'projection_dim': 1024,
    'vision_config': _tower(1280, 32, 16, patch_size=14, hidden_act='gelu'),
    'text_config': _tower(1024, 24, 16, hidden_act='gelu', eos_token_id=2),
  },
  'siglip_so400m': _siglip(_so400m(), _so400m(vocab_size=32000), image_size=384, patch_size=14),
  'siglip_2_giant': _siglip(
    _tower(1536, 40, 16), _so400m(vocab_size=256000), image_size=384, patch_size=16
  ),
  'dinov2_small': _dinov2(384, 12, 6),
  'dinov2_base': _dinov2(768, 12, 12),
  'dinov2_large': _dinov2(1024, 24, 16),
  'dinov2_giant': _dinov2(1536, 40, 24, swiglu=True),
  'llamagen_b': _llamagen(768, 12, 12, 2048),
  'llamagen_l': _llamagen(1024, 24, 16, 2816),
  'llamagen_xl': _llamagen(1280, 36, 20, 3584),
  'llamagen_xxl': _llamagen(1536, 48, 24, 4096),
  'showo2_1.5b': {
    'model_type': 'showo2',
    'hidden_size': 1536,
    'intermediate_size': 8960,
    'num_hidden_layers': 28,
    'num_attention_heads': 12,
    'num_key_value_heads': 2,
    'vocab_size': 151669,
    'clip_latent_dim': 1152,
    'clip_intermediate': 4304,
    'clip_layers': 26,
    'clip_heads': 16,
    'head': {
      'hidden_size': 2048,
      'head_dim': 64,
      'intermediate_size': 8192,
      'num_attention_heads': 32,
      'num_key_value_heads': 8,
      'blocks': 10,
      'rope_theta': 5e5,
      'rope_scaling': {
        'factor': 32.0,
        'high_freq_factor': 4.0,
        'low_freq_factor': 1.0,
        'original_max_position_embeddings': 8192,
      },
    },
    'latent_channels': 16,
    'latent_size': 64,
    'patch_size': 2,
  },
}


def _under(prefix: str, shapes: Shapes) -> Shapes:
  return {f'{prefix}.{key}': shape for key, shape in shapes.items()}


def _dense(key: str, out: int, into: int, *, bias: bool = True) -> Shapes:
  return {f'{key}.weight': (out, into)} | ({f'{key}.bias': (out,)} if bias else {})


def _decoder_layer(c: Mapping[str, Any], head: int, *, bias: bool) -> Shapes:
  width, hidden = c['hidden_size'], c['intermediate_size']
  keys = head * c['num_key_value_heads']
  return {
    'input_layernorm.weight': (width,),
    'post_attention_layernorm.weight': (width,),
    **_dense('self_attn.q_proj', head * c['num_attention_heads'], width, bias=bias),
    **_dense('self_attn.k_proj', keys, width, bias=bias),
    **_dense('self_attn.v_proj', keys, width, bias=bias),
    **_dense('self_attn.o_proj', width, head * c['num_attention_heads'], bias=False),
    **_dense('mlp.gate_proj', hidden, width, bias=False),
    **_dense('mlp.up_proj', hidden, width, bias=False),
    **_dense('mlp.down_proj', width, hidden, bias=False),
  }


def showo2(c: Mapping[str, Any]) -> Shapes:
  """The released state dict of Show-o2."""
  width, und, h = c['hidden_size'], c['clip_latent_dim'], c['head']
  wide, patch = h['hidden_size'], c['patch_size']
  norms = {f'layer_norm{i}.{kind}': (und,) for i in (1, 2) for kind in ('weight', 'bias')}
  encoder = norms | _dense('mlp.fc1', c['clip_intermediate'], und)
  encoder |= _dense('mlp.fc2', und, c['clip_intermediate'])
  for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
    encoder |= _dense(f'self_attn.{name}', und, und)
  block = _decoder_layer(h, h['head_dim'], bias=False)
  block |= {f'self_attn.{name}_norm.weight': (h['head_dim'],) for name in 'qk'}
  block |= _dense('adaLN_modulation.1', 6 * wide, wide)
  body = _decoder_layer(c, width // c['num_attention_heads'], bias=True)
  shapes = {
    'showo.model.embed_tokens.weight': (c['vocab_size'], width),
    'showo.model.norm.weight': (width,),
    'position_embedding.weight': (c.get('position_table', 729), und),
    'fusion_proj.0.weight': (und + width,),
    'diffusion_head_b.norm_final.weight': (wide,),
    **_dense('fusion_proj.1', width, und + width),
    **_dense('fusion_proj.3', width, width),
    **_dense('time_embed.mlp.0', wide, 256),
    **_dense('time_embed.mlp.2', wide, wide),
    **_dense('time_embed_proj', width, wide),
    **_dense('diff_proj.0', wide, width),
    **_dense('diff_proj.2', wide, wide),
    **_dense('diffusion_head_b.adaLN_modulation.1', 2 * wide, wide),
    **_dense('diffusion_head_b.linear', patch**2 * c['latent_channels'], wide),
  }
  for name, out in (('und', und), ('gen', width)):
    shapes[f'image_embedder_{name}.proj.weight'] = (out, c['latent_channels'], patch, patch)
    shapes[f'image_embedder_{name}.proj.bias'] = (out,)
  for i in range(c['num_hidden_layers']):
    shapes |= _under(f'showo.model.layers.{i}', body)
  for i in range(c['clip_layers']):
    shapes |= _under(f'und_trans.layers.{i}', encoder)
  for i in range(h['blocks']):
    shapes |= _under(f'diffusion_head_a.{i}', block)
  return shapes


def llamagen(c: Mapping[str, Any]) -> Shapes:
  """The released state dict of LlamaGen's class-conditional GPT."""
  width, hidden = c['dim'], c['ffn_hidden']
  layer = {
    'attention.wqkv.weight': (3 * width, width),
    'attention.wo.weight': (width, width),
    'attention_norm.weight': (width,),
    'ffn_norm.weight': (width,),
    'feed_forward.w1.weight': (hidden, width),
    'feed_forward.w2.weight': (width, hidden),
    'feed_forward.w3.weight': (hidden, width),
  }
  shapes = {
    'cls_embedding.embedding_table.weight': (c['num_classes'] + 1, width),
    'tok_embeddings.weight': (c['vocab_size'], width),
    'norm.weight': (width,),
    'output.weight': (c['vocab_size'], width),
  }
  for i in range(c['n_layer']):
    shapes |= _under(f'layers.{i}', layer)
  return shapes


# Family -> its golden folder and its keys, for releases that transformers lacks.
WRITTEN = {'showo2': ('showo2', showo2), 'llamagen': ('llamagen_gpt', llamagen)}


def _check_golden(family: str) -> None:
  """Asserts that the keys written out here equal those of the golden folder at its sizes."""
  name, keys = WRITTEN[family]
  folder = GOLDEN / name
  shapes = keys(json.loads((folder / 'config.json').read_text()))
  with safe_open(folder / 'model.safetensors', 'np') as file:
    expected = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
  assert shapes == expected, set(shapes.items()) ^ set(expected.items())


def _from_transformers(config: Mapping[str, Any]) -> Shapes:
  """Keys that save_pretrained would write."""
  import torch
  import transformers
  from transformers import core_model_loading

  model_config = transformers.AutoConfig.for_model(**config)
  with torch.device('meta'):
    model = getattr(transformers, config['architectures'][0])(model_config)
  dropped = set(model.all_tied_weights_keys)
  # Some models have other names in memory than in their files.
  state = core_model_loading.revert_weight_conversion(model, model.state_dict())
  return {key: tuple(leaf.shape) for key, leaf in state.items() if key not in dropped}


def main() -> None:
  """Writes all lists."""
  (GOLDEN / 'keys').mkdir(exist_ok=True)
  for family in WRITTEN:
    _check_golden(family)
  for name, config in CONFIGS.items():
    family = name.split('_')[0]
    shapes = WRITTEN[family][1](config) if family in WRITTEN else _from_transformers(config)
    text = json.dumps({key: shapes[key] for key in sorted(shapes)})
    # No name and no time in the header: the same keys make the same file.
    packed = gzip.compress(text.encode(), mtime=0)
    (GOLDEN / 'keys' / f'{name}.json.gz').write_bytes(packed)
    (GOLDEN / 'keys' / f'{name}.config.json').write_text(json.dumps(config, indent=1) + '\n')


if __name__ == '__main__':
  main()
