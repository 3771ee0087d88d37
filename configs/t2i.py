r"""Text to image with visual prompts: VPE in two stages (arXiv 2606.04457).

  python -m vpe_jax.main --config=configs/t2i.py            (tiny, any machine)
  python -m vpe_jax.main --config=configs/t2i.py:debug      (seconds)
  python -m vpe_jax.main --config=configs/t2i.py:tiny,arch=single --workdir=runs/single
  python -m vpe_jax.main --config=configs/t2i.py:tiny,arch=external --workdir=runs/external
  python -m vpe_jax.main --config=configs/t2i.py:tiny,arch=external --workdir=runs/render \
      --config.start=runs/plan --config.stages=render
  (stage `render` alone; runs/plan is any run that has trained stage `plan`)

Stage `plan` trains the AR expert on visual prompts. `arch=internal`, the default, joins two experts
by attention and trains both in stage `joint`; `arch=external` trains the diffusion expert alone in
stage `render`, on features of the frozen AR expert; `arch=single` has one expert. `vpe=false`
leaves the visual prompt out. Results and open choices: configs/README.md.
"""

from __future__ import annotations

import re

from ml_collections import ConfigDict

from configs import common
from vpe_jax.checkpoints.families import wan_vae
from vpe_jax.config import to_dict


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset.

  Options: `arch=internal|external|single`, `vpe=true|false`; for `paper` and `pod`, the Show-o2
  that initializes the experts, `init=HQ|1.5B`; and, for `pod` only, `chips=N`.
  """
  presets = {'tiny': _tiny, 'debug': _debug, 'paper': _paper, 'pod': _paper}
  defaults = {'arch': 'internal', 'vpe': 'true', 'chips': '', 'init': ''}
  preset, options = common.parse_arg(arg, tuple(presets), **defaults)
  if options['chips'] and (preset != 'pod' or not re.fullmatch(r'[1-9]\d{0,5}', options['chips'])):
    raise ValueError(f'chips={options["chips"]}: a number from 1 to 999999, only with preset pod')
  config = ConfigDict({'name': 't2i', 'preset': preset, 'system': 't2i', 'seed': 0})
  config.stages = ('plan', 'render' if options['arch'] == 'external' else 'joint')
  presets[preset](config)
  _initialize(config, options['init'])
  if preset == 'pod':
    scale_to_chips(config, int(options['chips'] or 256), 8)
  config.model.arch = options['arch']
  if options['arch'] == 'single':
    config.model.dit = config.model.ar.copy_and_resolve_references()
  config.model.vpe = common.is_true('vpe', options)
  if not config.model.vpe:
    _without_visual_prompt(config)
  return config


def _without_visual_prompt(config: ConfigDict) -> None:
  """Leaves out the visual prompt, the stage that trains it, and its guidance."""
  for field in ('stages', 'steps', 'batch_size'):
    config[field] = config[field][-1:]
  config.model.update(inherit=0.0, drop_text=0.0)
  config.sample.plan_guidance = 1.0


def _transformer(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict:
  head_width = width // heads
  return {
    'width': width,
    'mlp': mlp,
    'layers': layers,
    'heads': heads,
    'kv_heads': kv_heads,
    'head_width': head_width,
  }


def _small_images(config: ConfigDict) -> None:
  """Shared by `tiny` and `debug`: 64x64 images, the shipped codecs, and sizes that fit them."""
  config.data = {'source': 'mixture', 'image_size': 64, 'text_length': 24, 'encode': 'cached'}
  config.model = {
    'text_vocab': 1024,
    'codes': 512,
    'bos': 2,
    'boi': 5,
    'latent_size': 16,
    'latent_channels': 4,
    'patch': 2,
    'layout': 'patch',
    'multiple': 1,
    'flow': {'shift_by': 'constant'},
  }


def _tiny(config: ConfigDict) -> None:
  _small_images(config)
  config.unroll = True
  config.steps = (800, 600)
  config.batch_size = (64, 32)
  config.data.update(examples=12288, scenes_share=0.9)
  config.model.ar = _transformer(128, 512, 4, 4, 2) | {'rope_theta': 1e4}
  config.model.dit = _transformer(128, 512, 4, 4, 2) | {'rope_theta': 1e4}
  config.model.dual_path = {
    'table': 8,
    'encoder': {'width': 64, 'layers': 2, 'heads': 2, 'mlp': 128},
  }
  config.model.head = _transformer(96, 256, 2, 2, 1) | {'rope_theta': 1e4}
  config.optim = {'lr': 2e-3, 'warmup': 40, 'b2': 0.98, 'ema': 0.995}
  config.model.update(drop_text=0.1, inherit=0.08)
  config.sample = {'steps': 20, 'shift': 1.0, 'guidance': 2.5, 'plan_guidance': 4.5, 'min_p': 0.1}
  config.evals = {'heldout': {'every': 200}, 'sample_grid': {'every': 400}}


def _debug(config: ConfigDict) -> None:
  _small_images(config)
  config.quick_compile = True
  config.steps = (8, 12)
  config.batch_size = (8, 8)
  config.data.examples = 256
  config.model.ar = _transformer(32, 64, 2, 2, 1)
  config.model.dit = _transformer(32, 64, 2, 2, 1)
  config.model.dual_path = {
    'table': 8,
    'encoder': {'width': 32, 'layers': 2, 'heads': 2, 'mlp': 64},
  }
  config.model.head = _transformer(48, 96, 2, 3, 1)
  config.optim = {'lr': 1e-3, 'warmup': 4, 'ema': 0.9}
  config.log = {'every': 4}
  config.evals = {'heldout': {'every': 10}, 'sample_grid': {'every': 10}}
  config.checkpoint = {'every': 5}
  config.sample = {'steps': 4}


def _paper(config: ConfigDict) -> None:
  """Table 9 of the paper: stage 1 has 30 examples on each of 16 chips, stage 2 8 on each of 24."""
  config.steps = (325_000, 406_000)
  config.batch_size = (480, 192)
  config.dtype = 'bfloat16'
  config.remat = 'attention'
  config.data = {'image_size': 512, 'text_length': 249, 'encode': 'online', 'root': 'data'}
  config.data.source = 'folders:blip3o,text_atlas,anyword'
  # The paper leaves out Chinese text, and text that is illegible after padding.
  legible = {'language': 'en', 'least_text_height': 8}
  config.data.filters = {'text_atlas': legible, 'anyword': dict(legible)}
  config.data.tokenizer = 'showo2:Qwen/Qwen2.5-1.5B-Instruct'
  expert = _transformer(1536, 8960, 28, 12, 2)
  config.model = {
    'text_vocab': 151_669,
    'codes': 16_384,
    'bos': 151_644,
    'boi': 151_652,
    'latent_size': 64,
    'latent_channels': 16,
    'patch': 2,
    'layout': 'raster',
    'multiple': 16,
    # A third of the 577 predicted tokens: for 15 images per device, all logits take 5.8 GB.
    'logits_chunk': 193,
    'ar': expert,
    'dit': dict(expert),
    'dual_path': {'table': 27, 'encoder': {'width': 1152, 'layers': 26, 'heads': 16, 'mlp': 4304}},
    'head': _transformer(2048, 8192, 10, 32, 8),
    'visual_prompt': {'kind': 'siglip_vq', 'weights': 'zai-org/GLM-Image:vision_language_encoder'},
    'image': to_dict(wan_vae.RELEASED_SIZES)
    | {'kind': 'wan_vae', 'weights': 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers:vae'},
  }
  config.optim = {'lr': 1e-4, 'warmup': 2000, 'ema': 0.9995}
  # Axis `fsdp` shards the batch (480 = 32 x 15 and 192 = 32 x 6) and the parameters; axis `tensor`
  # has the remaining devices and shards heads, MLPs and the vocabulary.
  config.mesh = {'data': 1, 'fsdp': 32, 'tensor': -1, 'strategy': 'fsdp_tensor'}
  config.sample = {'steps': 49, 'shift': 3.0, 'guidance': 7.5}
  config.checkpoint = {'every': 1000, 'keep': 3}


def _initialize(config: ConfigDict, init: str) -> None:
  """The released Show-o2 that `paper` and `pod` start from, and the images that it was trained on.

  HQ has 512 x 512 images, 32 x 32 image tokens; 1.5B has 432 x 432, 27 x 27 image tokens. Both have
  a position table of 27 x 27, which is resized to the grid of the image.
  """
  if config.preset not in ('paper', 'pod'):
    if init:
      raise ValueError(f'init={init}: only paper and pod start from a released Show-o2')
    return
  releases = {'HQ': ('showlab/show-o2-1.5B-HQ', 512), '1.5B': ('showlab/show-o2-1.5B', 432)}
  init = init or 'HQ'
  if init not in releases:
    raise ValueError(f'init={init}: it must be {" or ".join(releases)}')
  config.model.init_from, config.data.image_size = releases[init]
  config.model.latent_size = config.data.image_size // 8


def scale_to_chips(config: ConfigDict, chips: int, images: int) -> None:
  """Sets batch size, steps, learning rate and mesh for `images` per chip on `chips` chips.

  Every stage sees as many images as with the config's own steps and batch sizes. The learning rate
  is 1e-4 sqrt(chips / 24): the paper uses 1e-4 on 24 chips in stage 2.
  """
  seen = tuple(steps * batch for steps, batch in zip(config.steps, config.batch_size))
  config.batch_size = (images * chips,)
  config.steps = tuple(round(count / (images * chips)) for count in seen)
  config.optim.lr = 1e-4 * (chips / 24) ** 0.5
  # For 256 chips, two axes of 16: widths of 1,152 and 4,304 are multiples of 16, but not of 256.
  config.mesh = {'data': 16 if chips % 16 == 0 else 1, 'fsdp': -1, 'tensor': 1, 'strategy': 'fsdp'}
