r"""Class to image, discrete: LlamaGen's GPT with and without visual prompt (arXiv 2606.04457).

  python -m vpe_jax.main --config=configs/c2i_discrete.py               (tiny, any machine)
  python -m vpe_jax.main --config=configs/c2i_discrete.py:debug         (seconds)
  python -m vpe_jax.main --config=configs/c2i_discrete.py:tiny,vpe=false --workdir=runs/baseline
  python -m vpe_jax.sample --workdir=runs/c2i_discrete-tiny --prompt=animals --n=8
  bash launch/cifar10.sh && python -m vpe_jax.main \
      --config=configs/c2i_discrete.py:tiny,data=cifar10 --workdir=runs/cifar10

`vpe=true` trains `[cls] s_1 .. s_P z_1 .. z_N`, `vpe=false` the baseline `[cls] z_1 .. z_N`.
`paper` is 512x512 on ImageNet, a folder of class folders. Results and open choices:
configs/README.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import class_images, common
from vpe_jax.checkpoints.families import ibq
from vpe_jax.config import to_dict


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset.

  Options: `vpe=true|false`, and, except for `paper`, `data=openmoji|cifar10`.
  """
  presets = {'tiny': _tiny, 'debug': _debug, 'paper': _paper}
  preset, options = common.parse_arg(arg, tuple(presets), vpe='true', data='')
  config = ConfigDict({'name': 'c2i_discrete', 'preset': preset, 'system': 'c2i_discrete'})
  config.seed, config.stages = 0, ('train',)
  presets[preset](config)
  class_images.choose(config, options)
  config.model.vpe = common.is_true('vpe', options)
  return config


def _body(width: int, mlp: int, layers: int, heads: int) -> dict:
  """LlamaGen's layers."""
  return {
    'width': width,
    'mlp': mlp,
    'layers': layers,
    'heads': heads,
    'kv_heads': heads,
    'head_width': width // heads,
    'rope_theta': 1e4,
    'qkv_bias': False,
    'eps': 1e-5,
    'rope_adjacent': True,
  }


def _embedded(config: ConfigDict) -> None:
  """Shared by `tiny` and `debug`: OpenMoji with its groups as classes, sampled without guidance."""
  class_images.embed(config)
  config.sample = {'guidance': 1.0, 'plan_guidance': 1.0, 'min_p': 0.0}


def _tiny(config: ConfigDict) -> None:
  _embedded(config)
  config.unroll = True
  config.steps = (1500,)
  config.batch_size = (16,)
  config.model.body = _body(128, 384, 4, 4)
  config.optim = {'lr': 1e-3, 'warmup': 50, 'b2': 0.95, 'weight_decay': 0.05, 'ema': 0.995}


def _debug(config: ConfigDict) -> None:
  _embedded(config)
  config.quick_compile = True
  config.steps = (12,)
  config.batch_size = (8,)
  config.data.examples = 256
  config.model.body = _body(32, 64, 2, 2)
  config.optim = {'lr': 1e-3, 'warmup': 4, 'ema': 0.9}
  config.log = {'every': 4}
  config.evals = {'heldout': {'every': 12}, 'sample_grid': {'every': 12}}
  config.checkpoint = {'every': 5}


def _paper(config: ConfigDict) -> None:
  """100 epochs of ImageNet at batch 128, with LlamaGen's optimizer and no EMA."""
  config.steps = (100 * class_images.IMAGENET // 128,)
  config.batch_size = (128,)
  config.dtype = 'bfloat16'
  config.remat = 'attention'
  class_images.imagenet(config, 512, 'pad')
  config.model = {
    'classes': 1000,
    'body': _body(1280, 3584, 36, 20),
    'token_dropout': 0.1,
    'residual_dropout': 0.1,
    'mlp_dropout': 0.1,
    # Of the image's 1,024 codes: all logits of 2 images per device would take 1.2 GB.
    'logits_chunk': 256,
    'visual_prompt': {
      'kind': 'siglip_vq',
      'image_size': 224,
      'weights': 'zai-org/GLM-Image:vision_language_encoder',
    },
    'image': to_dict(ibq.RELEASED_SIZES)
    | {'kind': 'ibq', 'image_size': 512, 'weights': 'BAAI/Emu3.5-VisionTokenizer'},
  }
  config.optim = {'lr': 1e-4, 'warmup': 0, 'b2': 0.95, 'weight_decay': 0.05, 'ema': 0.0}
  config.sample = {'guidance': 1.0, 'plan_guidance': 1.0, 'min_p': 0.0}
  config.checkpoint = {'every': 1000, 'keep': 3}
