"""Published generators as runs: the configs with which Show-o2 and LlamaGen sample as released."""

from __future__ import annotations

import dataclasses
from typing import Any

from vpe_jax.codecs.kl_vae import KlVaeConfig
from vpe_jax.codecs.vqgan import VqGanConfig
from vpe_jax.config import Config, base_section, to_dict
from vpe_jax.models.llamagen import LlamaGenConfig
from vpe_jax.models.unified import UnifiedConfig
from vpe_jax.systems.package import Release

# Fields of every import: one stage that has been trained, whose length nothing reads.
_RUN = {'preset': 'released', 'steps': (1,), 'batch_size': (8,)}


def _show_o2(
  sizes: UnifiedConfig, codec: KlVaeConfig, weights: str, tokenizer: str
) -> dict[str, Any]:
  """Show-o2's text-to-image model: 50 points of time (49 steps), shift 3, guidance 7.5."""
  image = to_dict(codec) | {'kind': 'wan_vae', 'weights': weights}
  return _RUN | {
    'name': 'showo2',
    'system': 't2i',
    'stages': ('joint',),
    'data': {
      'image_size': sizes.latent_size * codec.body.factor,
      'fit': 'crop',
      # 1,280 tokens without the 1,025 of an image of 512 pixels and four special ones.
      'text_length': 251,
      'tokenizer': tokenizer,
    },
    'model': to_dict(sizes) | {'vpe': False, 'image': image},
    'sample': {'steps': 49, 'shift': 3.0, 'guidance': 7.5},
  }


def _show_o2_sizes(config: Config) -> UnifiedConfig | None:
  c = config.model
  if config.system != 't2i' or c.vpe or (c.arch, c.layout) != ('single', 'raster'):
    return None
  return dataclasses.replace(base_section(c, UnifiedConfig), codes=0, multiple=1)


def _llamagen(
  sizes: LlamaGenConfig, codec: VqGanConfig, weights: str, tokenizer: str
) -> dict[str, Any]:
  """LlamaGen's class-to-image model: guidance 4 and the 2,000 likeliest codes."""
  side = sizes.side * codec.body.factor
  image = to_dict(codec) | {'kind': 'llamagen_vq', 'image_size': side, 'weights': weights}
  return _RUN | {
    'name': 'llamagen',
    'system': 'c2i_discrete',
    'stages': ('train',),
    'data': {
      'source': 'folder:imagenet/train',
      'prompt_field': 'group',
      'fit': 'crop',
      'image_size': side,
      'text_length': 1,
      'tokenizer': tokenizer,
    },
    'model': {
      'classes': sizes.classes,
      'body': to_dict(sizes.body),
      'positions': sizes.positions,
      'class_rotation': sizes.class_rotation,
      'vpe': False,
      'image': image,
    },
    'sample': {'guidance': 4.0, 'top_k': 2000, 'min_p': 0.0},
  }


def _llamagen_sizes(config: Config) -> LlamaGenConfig | None:
  c = config.model
  if config.system != 'c2i_discrete' or c.vpe:
    return None
  codec = c.image.codec(config.data.image_size)
  return LlamaGenConfig(
    c.classes, codec.codes, codec.grid, c.body, c.class_rotation, positions=c.positions
  )


SHOW_O2 = Release(
  codec='wan_vae',
  codec_source='Wan-AI/Wan2.1-T2V-1.3B-Diffusers:vae',
  codec_files='Wan2.1_VAE.pth, or the folder vae of Wan-AI/Wan2.1-T2V-1.3B-Diffusers',
  tokenizer=lambda sizes: 'showo2:Qwen/Qwen2.5-1.5B-Instruct',
  config=_show_o2,
  sizes=_show_o2_sizes,
)
LLAMAGEN = Release(
  codec='llamagen_vq',
  codec_source='',
  codec_files='vq_ds16_c2i.pt of FoundationVision/LlamaGen',
  tokenizer=lambda sizes: f'classes:{sizes.classes}',
  config=_llamagen,
  sizes=_llamagen_sizes,
)
