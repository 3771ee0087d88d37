r"""SigLIP on images and captions; preset `evaluator_network` is a second SigLIP, for evaluation.

  python -m vpe_jax.main --config=configs/siglip.py
  python -m vpe_jax.main --config=configs/siglip.py:evaluator_network

Results of the shipped weights: configs/README.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset."""
  preset, _ = common.parse_arg(arg, ('tiny', 'evaluator_network', 'debug'))
  config = ConfigDict({'name': 'siglip', 'preset': preset, 'system': 'siglip', 'seed': 0})
  config.stages = ('align',)
  config.data = {'source': 'mixture', 'image_size': 64, 'text_length': 32}
  {'tiny': _tiny, 'evaluator_network': _evaluator_network, 'debug': _debug}[preset](config)
  return config


def _tiny(config: ConfigDict) -> None:
  config.steps = (500,)
  config.batch_size = (256,)
  config.model = {'siglip': {'image_size': 48, 'patch': 8}}
  config.optim = {'lr': 1.5e-3, 'warmup': 50, 'b2': 0.95, 'weight_decay': 1e-4, 'ema': 0.99}
  config.evals = {'heldout': {'every': 100}}


def _evaluator_network(config: ConfigDict) -> None:
  """Scenes alone, with captions wrong in one detail, at another resolution and patch size."""
  _tiny(config)
  config.seed = 1234
  config.steps = (1800,)
  config.batch_size = (128,)
  config.data.update(source='scenes', text_length=24, near_misses=4)
  config.model = {'siglip': {'image_size': 60, 'patch': 12, 'text_length': 24}}
  config.model.update(mask_tokens=0.4, recolour=0.4)
  config.model.siglip.text = {'width': 128, 'layers': 2, 'heads': 4, 'mlp': 384}
  config.optim.ema = 0.995


def _debug(config: ConfigDict) -> None:
  config.steps = (4,)
  config.batch_size = (8,)
  config.data.examples = 64
  tower = {'width': 32, 'layers': 1, 'heads': 2, 'mlp': 64}
  config.model = {'siglip': {'vision': dict(tower), 'text': dict(tower)}}
  config.optim = {'lr': 1e-3, 'warmup': 2, 'ema': 0.9}
  config.log = {'every': 2}
  config.evals = {'heldout': {'every': 4}}
  config.checkpoint = {'every': 2}
