r"""Class to image by flow matching: Transfusion with and without visual prompt (arXiv 2606.04457).

  python -m vpe_jax.main --config=configs/c2i_continuous.py             (tiny, any machine)
  python -m vpe_jax.main --config=configs/c2i_continuous.py:debug       (seconds)
  python -m vpe_jax.sample --workdir=runs/c2i_continuous-tiny --prompt=animals --n=8

The paper's fork: a shared run without visual prompt, and two branches that continue its parameters,
optimizer, EMA and position in the data, in runs/fork/shared, runs/fork/baseline and runs/fork/vpe:

  python -m vpe_jax.main --config=configs/c2i_continuous.py:tiny,fork=both --workdir=runs/fork

`vpe=false` trains `[cls] x`, `vpe=true` `[cls] s_1 .. s_P x`. `paper` is 256x256 on ImageNet.
Results and open choices: configs/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import class_images, common
from vpe_jax.checkpoints.families import wan_vae
from vpe_jax.config import to_dict

PACK = 10_240  # tokens of the paper's packed sequences


def get_config(arg: str = '') -> ConfigDict | dict[str, dict[str, ConfigDict]]:
  """The config of a preset.

  Options: `vpe=true|false`, `fork=both|RUN`, and, except for `paper`, `data=openmoji|cifar10`.
  `fork=RUN` is one branch of RUN; `fork=both` is a chain of the shared run and both branches.
  """
  presets = {'tiny': _tiny, 'debug': _debug, 'paper': _paper}
  preset, options = common.parse_arg(arg, tuple(presets), vpe='true', fork='', data='')
  config = ConfigDict({'name': 'c2i_continuous', 'preset': preset, 'system': 'c2i_continuous'})
  if options['fork'] == 'both':
    return _fork(preset, options)
  config.seed, config.stages = 0, ('train',)
  vpe = common.is_true('vpe', options)
  presets[preset](config, vpe)
  class_images.choose(config, options)
  config.model.vpe = vpe
  if options['fork']:
    # In the paper, 130,000 shared steps and 136,000 of each branch.
    config.steps = (round(config.steps[0] * 136 / 130),)
    config.start, config.start_weights = options['fork'], 'state'
    config.optim.warmup = 0
  return config


def _fork(preset: str, options: Mapping[str, str]) -> dict[str, dict[str, ConfigDict]]:
  """The shared run and both branches."""
  data = f',data={options["data"]}' if options['data'] else ''
  branch = lambda vpe, fork='': get_config(f'{preset},vpe={vpe}{fork}{data}')
  runs = {'shared': branch('false')}
  runs |= {'baseline': branch('false', ',fork=shared'), 'vpe': branch('true', ',fork=shared')}
  return {'runs': runs}


def _body(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict:
  return {
    'width': width,
    'mlp': mlp,
    'layers': layers,
    'heads': heads,
    'kv_heads': kv_heads,
    'head_width': width // heads,
  }


def _embedded(config: ConfigDict) -> None:
  """Shared by `tiny` and `debug`: OpenMoji with its groups as classes, and the codecs' sizes."""
  class_images.embed(config)
  config.model.update(latent_size=16, latent_channels=4, patch=2, drop=0.1)


def _tiny(config: ConfigDict, vpe: bool) -> None:
  del vpe
  _embedded(config)
  config.unroll = True
  config.steps = (1500,)
  config.batch_size = (64,)
  config.model.body = _body(128, 512, 4, 4, 2) | {'rope_theta': 1e4}
  config.optim = {'lr': 1e-3, 'warmup': 50, 'b2': 0.98, 'ema': 0.995}
  # As in the paper: without guidance.
  config.sample = {'steps': 20, 'shift': 1.0, 'guidance': 1.0, 'min_p': 0.0}


def _debug(config: ConfigDict, vpe: bool) -> None:
  del vpe
  _embedded(config)
  config.quick_compile = True
  config.steps = (12,)
  config.batch_size = (8,)
  config.data.examples = 256
  config.model.body = _body(32, 64, 2, 2, 1)
  config.optim = {'lr': 1e-3, 'warmup': 4, 'ema': 0.9}
  config.sample = {'steps': 4, 'shift': 1.0, 'guidance': 2.0, 'min_p': 0.0}
  config.log = {'every': 4}
  config.evals = {'heldout': {'every': 12}, 'sample_grid': {'every': 12}}
  config.checkpoint = {'every': 5}


def _paper(config: ConfigDict, vpe: bool) -> None:
  """The sequences of one pack on each of 8 devices; BAGEL's optimizer, from Qwen2.5-0.5B."""
  config.steps = (130_000,)
  # A sequence has 378 tokens with visual prompt, 257 without.
  config.batch_size = (8 * (PACK // (378 if vpe else 257)),)
  config.dtype = 'bfloat16'
  config.remat = 'attention'
  class_images.imagenet(config, 256, 'crop')
  config.model = {
    'classes': 1000,
    'latent_size': 32,
    'latent_channels': 16,
    'patch': 2,
    'body': _body(896, 4864, 24, 14, 2),
    'init_from': 'Qwen/Qwen2.5-0.5B',
    'visual_prompt': {
      'kind': 'siglip_vq',
      'image_size': 176,
      'weights': 'zai-org/GLM-Image:vision_language_encoder',
    },
    'image': to_dict(wan_vae.RELEASED_SIZES)
    | {'kind': 'wan_vae', 'weights': 'Wan-AI/Wan2.1-T2V-1.3B-Diffusers:vae'},
  }
  config.optim = {'lr': 1e-4, 'warmup': 2000, 'b2': 0.95, 'eps': 1e-15, 'ema': 0.9999}
  config.sample = {'steps': 49, 'shift': 3.0, 'guidance': 1.0, 'min_p': 0.0}
  config.checkpoint = {'every': 1000, 'keep': 3}
