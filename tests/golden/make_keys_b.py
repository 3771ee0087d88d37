"""Writes keys/*.json.gz: keys and shapes of published networks, from the reference libraries.

Needs torch and diffusers; nothing is downloaded and no weights are made (torch's meta device).
Run as `python tests/golden/make_keys_b.py`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import torch

KEYS = Path(__file__).parent / 'keys'
# Of the published config.json files: everything that shapes depend on, and the latents' moments.
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

  with torch.device('meta'):
    write('wan_vae', shapes(diffusers.AutoencoderKLWan()))
    for name, config in KL.items():
      write(name, shapes(diffusers.AutoencoderKL(**config)))
      write_config(name, config)


if __name__ == '__main__':
  main()
