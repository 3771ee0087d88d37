r"""The tokenizers: a VQ on patch features, a small KL autoencoder, a VQ on its latents.

  python -m vpe_jax.main --config=configs/codec.py:tiny,stage=visual_prompt \
      --workdir=runs/visual_prompt
  python -m vpe_jax.main --config=configs/codec.py:tiny,stage=image --workdir=runs/image
  python -m vpe_jax.main --config=configs/codec.py:tiny,stage=image_codes \
      --workdir=runs/image_codes
  python -m vpe_jax.export --workdir=runs/image_codes --network=image_codes \
      --to=vpe_jax/assets/image_codes.safetensors

`both` trains the first two; `image_codes` stands on the shipped `image`.

A visual prompt may stand on a published tower in the place of the embedded SigLIP (the paper's
Appendix F): `encoder=siglip2|dinov2|clip`, with --config.model.encoder_weights=FOLDER, an import or
a hub id, and its sizes in model.visual_prompt.{siglip2,dinov2,clip} where it isn't the release that
these are of. Features are the normed last output of SigLIP 2 and DINOv2 and the last but one layer
of CLIP, or those after `model.visual_prompt.depth` layers. A generator reads such codes with
--config.model.visual_prompt.encoder=dinov2 --config.model.visual_prompt.tower_weights=FOLDER
--config.model.visual_prompt.weights=runs/visual_prompt.safetensors (and model.inherit=0: its words
are the embedded SigLIP's).

Shipped weights, on 2 shared CPU cores, measured on 512 held-out pictures: `visual_prompt` (0.20M
parameters, 0.4 MB, 3 minutes) has perplexity 205 of 512 codes (155 within a batch of 128), rebuilds
features with 12 % of their variance lost, and 94.1 % of pictures find their caption among 32 from
codes alone (97.9 % from the features). `image` (0.97M, 1.9 MB, 8 minutes): PSNR 30.98 dB on whole
pictures, 27.96 dB on crops; its first 600 steps ran with model.divergence 1e-4, the rest with 1e-3.
`image_codes` (1,024 rows of 4 numbers, 10 kB, 4 minutes), on 256 held-out pictures: 256 codes a
picture, all but 11 in use, perplexity 129, and PSNR 28.2 dB where the autoencoder alone has 30.8 dB
(single emoji 25.2 of 27.9 dB; CIFAR-10, which neither has seen, 24.7 of 28.7 dB). Squares of 2x2
latents would take 64 codes; k-means with 1,024 rows then gives 21.5 dB, with 2,048 22.2 dB.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common
from vpe_jax.codecs.towers import ENCODERS
from vpe_jax.config import nearest


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset.

  Options: `stage=visual_prompt|image|both|image_codes`, `encoder=siglip|siglip2|dinov2|clip`.
  """
  preset, options = common.parse_arg(arg, ('tiny', 'debug'), stage='both', encoder='siglip')
  if options['encoder'] not in ENCODERS:
    raise ValueError(f'encoder={options["encoder"]}{nearest(options["encoder"], ENCODERS)}')
  if options['stage'] not in (known := ('visual_prompt', 'image', 'both', 'image_codes')):
    raise ValueError(f"unknown stage '{options['stage']}'{nearest(options['stage'], known)}")
  stages = {'both': ('visual_prompt', 'image')}.get(options['stage'], (options['stage'],))
  config = ConfigDict({'name': 'codec', 'preset': preset, 'system': 'codec', 'seed': 0})
  config.stages = stages
  config.model = ConfigDict({'visual_prompt': {}})
  {'tiny': _tiny, 'debug': _debug}[preset](config)
  config.model.visual_prompt.encoder = options['encoder']
  numbers = {'visual_prompt': 0, 'image': 1, 'image_codes': 2}
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
  config.model.visual_prompt = {'decoder': {'width': 32, 'layers': 1, 'heads': 2, 'mlp': 64}}
  config.model.image = {'encoder': (16, 16), 'decoder': (16, 16)}
  config.optim = {'lr': 1e-3, 'warmup': 2, 'ema': 0.9}
  config.log = {'every': 2}
  config.evals = {'heldout': {'every': 4}}
  config.checkpoint = {'every': 2}
