r"""The tokenizers: a VQ on patch features, a small KL autoencoder, a VQ on its latents.

  python -m vpe_jax.main --config=configs/codec.py:tiny,stage=feature_vq \
      --workdir=runs/feature_vq
  python -m vpe_jax.main --config=configs/codec.py:tiny,stage=image --workdir=runs/image
  python -m vpe_jax.main --config=configs/codec.py:tiny,stage=image_codes \
      --workdir=runs/image_codes
  python -m vpe_jax.export --workdir=runs/image_codes --network=image_codes \
      --to=vpe_jax/assets/image_codes.safetensors

`stage=both` trains the first two; `image_codes` quantizes the latents of the shipped autoencoder.
`encoder=siglip2|dinov2|clip` quantizes features of a published tower, by default with its
released weights (or --config.model.encoder_weights=FOLDER, an import or a hub id). Results:
configs/README.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common
from vpe_jax.codecs.towers import ENCODERS
from vpe_jax.config import did_you_mean


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset.

  Options: `stage=feature_vq|image|both|image_codes`, `encoder=siglip|siglip2|dinov2|clip`.
  """
  preset, options = common.parse_arg(arg, ('tiny', 'debug'), stage='both', encoder='siglip')
  if options['encoder'] not in ENCODERS:
    raise ValueError(f'encoder={options["encoder"]}{did_you_mean(options["encoder"], ENCODERS)}')
  if options['stage'] not in (known := ('feature_vq', 'image', 'both', 'image_codes')):
    raise ValueError(f"unknown stage '{options['stage']}'{did_you_mean(options['stage'], known)}")
  stages = {'both': ('feature_vq', 'image')}.get(options['stage'], (options['stage'],))
  config = ConfigDict({'name': 'codec', 'preset': preset, 'system': 'codec', 'seed': 0})
  config.stages = stages
  config.model = ConfigDict({'feature_vq': {}})
  {'tiny': _tiny, 'debug': _debug}[preset](config)
  config.model.feature_vq.encoder = options['encoder']
  numbers = {'feature_vq': 0, 'image': 1, 'image_codes': 2}
  for field in ('steps', 'batch_size'):
    each = config[field]
    config[field] = tuple(each[numbers[s]] for s in stages)
  if stages == ('image_codes',):
    config.model.image = {}  # the shipped autoencoder's sizes
    if preset == 'tiny':
      config.optim.update(lr=3e-2, ema=0.98)
  return config


def _tiny(config: ConfigDict) -> None:
  config.steps = (400, 1500, 400)
  config.batch_size = (128, 32, 32)
  config.data = {'source': 'mixture', 'image_size': 64, 'text_length': 32}
  config.optim = {'lr': 2e-3, 'warmup': 50, 'b2': 0.99, 'ema': 0.99}
  config.evals = {'heldout': {'every': 200}}


def _debug(config: ConfigDict) -> None:
  config.steps = (4, 4, 4)
  config.batch_size = (8, 8, 8)
  config.data = {'source': 'mixture', 'image_size': 64, 'text_length': 32, 'examples': 64}
  config.model.feature_vq = {'decoder': {'width': 32, 'layers': 1, 'heads': 2, 'mlp': 64}}
  config.model.image = {'encoder': (16, 16), 'decoder': (16, 16)}
  config.optim = {'lr': 1e-3, 'warmup': 2, 'ema': 0.9}
  config.log = {'every': 2}
  config.evals = {'heldout': {'every': 4}}
  config.checkpoint = {'every': 2}
