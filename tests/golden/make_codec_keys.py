"""Writes keys/*.json.gz: keys and shapes of published networks.

They come from the reference libraries if these contain the network, else from the pattern of the
golden model's keys. Needs torch, diffusers and transformers; nothing is downloaded, and no weights
are created (torch's meta device).

Run as `python tests/golden/make_codec_keys.py`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import torch

KEYS = Path(__file__).parent / 'keys'
# Fields of the published config.json files: those that shapes depend on, and moments of latents.
_KL = {
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
  'layers_per_block': 2,
}
_WITHOUT_QUANT = {'latent_channels': 16, 'use_quant_conv': False, 'use_post_quant_conv': False}
KL = {
  'kl_vae_flux': {**_KL, **_WITHOUT_QUANT, 'scaling_factor': 0.3611, 'shift_factor': 0.1159},
  'kl_vae_sd3': {**_KL, **_WITHOUT_QUANT, 'scaling_factor': 1.5305, 'shift_factor': 0.0609},
  'kl_vae_sdxl': {**_KL, 'latent_channels': 4, 'scaling_factor': 0.13025},
}


def _block(name: str, inputs: int, outputs: int) -> dict[str, list[int]]:
  """Keys of VQGAN's residual block."""
  keys = {}
  for i, width in ((1, inputs), (2, outputs)):
    keys |= {f'{name}.norm{i}.weight': [width], f'{name}.norm{i}.bias': [width]}
    keys |= {f'{name}.conv{i}.weight': [outputs, width, 3, 3], f'{name}.conv{i}.bias': [outputs]}
  if inputs != outputs:
    keys[f'{name}.nin_shortcut.weight'] = [outputs, inputs, 1, 1]
    keys[f'{name}.nin_shortcut.bias'] = [outputs]
  return keys


def _attention(name: str, width: int) -> dict[str, list[int]]:
  """Keys of VQGAN's attention."""
  keys = {f'{name}.norm.weight': [width], f'{name}.norm.bias': [width]}
  for layer in ('q', 'k', 'v', 'proj_out'):
    keys |= {f'{name}.{layer}.weight': [width, width, 1, 1], f'{name}.{layer}.bias': [width]}
  return keys


def _conv(name: str, inputs: int, outputs: int, side: int = 3) -> dict[str, list[int]]:
  return {f'{name}.weight': [outputs, inputs, side, side], f'{name}.bias': [outputs]}


def vqgan(names: Mapping[str, str], widths: list[int], blocks: int, z: int) -> dict[str, list[int]]:
  """Keys of a VQGAN with attention at its last level; the goldens show each layout's pattern.

  Args:
    names: the layout's words: `down` and `up` (templates of a level), `block`, `attention`,
      `middle` (template of its three parts) and `order` (of the decoder's levels).
    widths: channels of each level.
    blocks: of each level of the encoder.
    z: channels that the encoder gives and the decoder takes.
  """
  last = widths[-1]
  keys = _conv('encoder.conv_in', 3, widths[0]) | _conv('decoder.conv_in', z, last)
  keys |= _conv('encoder.conv_out', last, z) | _conv('decoder.conv_out', widths[0], 3)
  for half, width in (('encoder', last), ('decoder', widths[0])):
    keys |= {f'{half}.norm_out.weight': [width], f'{half}.norm_out.bias': [width]}
    parts = [f'{half}.{part}' for part in names['middle'].split()]
    keys |= _block(parts[0], last, last) | _attention(parts[1], last) | _block(parts[2], last, last)
  down, up = widths[0], last
  for level in range(len(widths)):
    name = names['down'].format(level)
    for i in range(blocks):
      keys |= _block(f'{name}.{names["block"]}.{i}', down, widths[level])
      down = widths[level]
      if level == len(widths) - 1:
        keys |= _attention(f'{name}.attn.{i}', down)
    if level < len(widths) - 1:
      keys |= _conv(f'{name}.downsample.conv', down, down)
  for step, level in enumerate(reversed(range(len(widths)))):
    name = names['up'].format(level if names['order'] == 'fine first' else step)
    for i in range(blocks + 1):
      keys |= _block(f'{name}.{names["block"]}.{i}', up, widths[level])
      up = widths[level]
      if step == 0:
        keys |= _attention(f'{name}.attn.{i}', up)
    if level:
      keys |= _conv(f'{name}.upsample.conv', up, up)
  return keys


def codes(count: int, width: int, z: int) -> dict[str, list[int]]:
  """Keys of a codebook and the convolutions around it."""
  around = _conv('quant_conv', z, width, 1) | _conv('post_quant_conv', width, z, 1)
  return around | {'quantize.embedding.weight': [count, width]}


LLAMAGEN = {
  'down': 'encoder.conv_blocks.{}', 'up': 'decoder.conv_blocks.{}', 'block': 'res',
  'middle': 'mid.0 mid.1 mid.2', 'order': 'as they run',
}  # fmt: skip
VQGAN = {
  'down': 'encoder.down.{}', 'up': 'decoder.up.{}', 'block': 'block',
  'middle': 'mid.block_1 mid.attn_1 mid.block_2', 'order': 'fine first',
}  # fmt: skip


def xomni() -> dict[str, list[int]]:
  """Keys of X-Omni's SigLIP-VQ, both pickles, by the golden model's pattern."""
  width, mlp, code = 1536, 6144, 2048
  layer = lambda name, rows, columns: {f'{name}.weight': [rows, columns], f'{name}.bias': [rows]}
  norm = lambda name: {f'{name}.weight': [width], f'{name}.bias': [width]}
  keys = {'pos_embed': [1, 128 * 128, width]} | _conv('patch_embed.proj', 3, width, 16)
  for n in range(40):
    name = f'blocks.{n}'
    keys |= norm(f'{name}.norm1') | norm(f'{name}.norm2')
    keys |= layer(f'{name}.attn.qkv', 3 * width, width) | layer(f'{name}.attn.proj', width, width)
    keys |= layer(f'{name}.mlp.fc1', mlp, width) | layer(f'{name}.mlp.fc2', width, mlp)
  for n in range(2):
    keys |= _block(f'post_conv.{n}', width, width)
  return keys | codes(16_384, code, width)


def glm_image() -> dict[str, list[int]]:
  """Keys of all of GLM-Image's vision_language_encoder."""
  from transformers.models.glm_image import GlmImageConfig, GlmImageForConditionalGeneration

  return shapes(GlmImageForConditionalGeneration(GlmImageConfig()))


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
  """Key -> shape of a module's state."""
  return {key: list(leaf.shape) for key, leaf in module.state_dict().items()}


def write(name: str, keys: Mapping[str, list[int]]) -> None:
  """Writes one list; the same list gives the same bytes."""
  text = json.dumps(dict(sorted(keys.items())), separators=(',', ':'))
  (KEYS / f'{name}.json.gz').write_bytes(gzip.compress(text.encode(), mtime=0))


def write_config(name: str, config: Mapping[str, object]) -> None:
  (KEYS / f'{name}.config.json').write_text(json.dumps(config, indent=2) + '\n')


def main() -> None:
  """Writes all lists."""
  import diffusers

  llamagen = vqgan(LLAMAGEN, [128, 128, 256, 256, 512], 2, 256) | codes(16_384, 8, 256)
  write('llamagen_vq', llamagen | {'quantize.codebook_used': [65_536]})
  write('ibq', vqgan(VQGAN, [256, 256, 512, 512, 1024], 4, 256) | codes(131_072, 256, 256))
  write('siglip_vq_xomni', xomni())
  with torch.device('meta'):
    glm = glm_image()
    write('siglip_vq_glm', glm)
    parts = ('model.visual.', 'model.vqmodel.')
    write('siglip_vq_llada', {key: leaf for key, leaf in glm.items() if key.startswith(parts)})
    write('wan_vae', shapes(diffusers.AutoencoderKLWan()))
    for name, config in KL.items():
      write(name, shapes(diffusers.AutoencoderKL(**config)))
      write_config(name, config)


if __name__ == '__main__':
  main()
