"""Writes codes.npz beside the golden tokenizers: codes of 64 images by the released code.

32 renders of OpenMoji and 32 of noise go through LlamaGen's VQ and Emu3.5's IBQ with their golden
weights. No package contains these networks: check out the released code first,
https://github.com/FoundationVision/LlamaGen (made with commit ce98ec41) and
https://github.com/baaivision/Emu3.5 (8fcf1da4), and run

  python -m tests.golden.make_codes --llamagen=LlamaGen --emu=Emu3.5

Needs torch and this project.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.torch
import torch

from tests.golden.pictures import renders

GOLDEN = Path(__file__).parent
COUNT = 32  # of each kind


def _load(name: str, path: Path, package: bool = False) -> ModuleType:
  """A module from its file; as a package, with its sibling modules but without its __init__."""
  if package:
    parent = ModuleType(name)
    parent.__path__ = [str(path.parent)]
    sys.modules[name] = parent
    name = f'{name}.{path.stem}'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


def llamagen(checkout: Path, config: dict) -> torch.nn.Module:
  """LlamaGen's tokenizer; its class fixes the width of the first layer, which is narrowed here."""
  module = _load('vq_model', checkout / 'tokenizer' / 'tokenizer_image' / 'vq_model.py')
  size = {'ch': config['ch'], 'num_res_blocks': config['num_res_blocks']}
  module.Encoder = functools.partial(module.Encoder, **size)
  module.Decoder = functools.partial(module.Decoder, **size)
  arguments = module.ModelArgs(
    codebook_size=config['codebook_size'],
    codebook_embed_dim=config['codebook_embed_dim'],
    codebook_l2_norm=config['codebook_l2_norm'],
    encoder_ch_mult=config['ch_mult'],
    decoder_ch_mult=config['ch_mult'],
    z_channels=config['z_channels'],
  )
  return module.VQModel(arguments)


def emu(checkout: Path, config: dict) -> torch.nn.Module:
  """Emu3.5's tokenizer."""
  path = checkout / 'src' / 'vision_tokenizer' / 'ibq.py'
  module = _load('vision_tokenizer', path, package=True)
  outside = ('n_embed', 'embed_dim')
  body = {key: value for key, value in config.items() if key not in outside}
  return module.IBQ(body, config['n_embed'], config['embed_dim'])


def main() -> None:
  """Writes both files."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--llamagen', type=Path, required=True)
  parser.add_argument('--emu', type=Path, required=True)
  args = parser.parse_args()
  jobs = (('llamagen_vq', llamagen, args.llamagen), ('emu35_ibq', emu, args.emu))
  for name, build, checkout in jobs:
    folder = GOLDEN / name
    model = build(checkout, json.loads((folder / 'config.json').read_text()))
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    model.load_state_dict({key: leaf.float() for key, leaf in weights.items()}, strict=True)
    model.eval()
    side = np.load(folder / 'io.npz')['image'].shape[-1]
    images = torch.tensor(renders(COUNT, side)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
      quant, _, (_, _, codes) = model.encode(images)
    grid = (len(images), *quant.shape[2:])
    codes = codes.reshape(grid).numpy().astype(np.int16)
    np.savez_compressed(folder / 'codes.npz', codes=codes)
    print(f'{name}: {codes.shape} codes, {len(np.unique(codes))} different')


if __name__ == '__main__':
  main()
