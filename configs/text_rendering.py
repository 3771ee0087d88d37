r"""Text rendering: Show-o2 with and without visual prompt (arXiv 2606.04457, section 4.2).

  python -m vpe_jax.main --config=configs/text_rendering.py               (tiny, any machine)
  python -m vpe_jax.main --config=configs/text_rendering.py:debug         (seconds)
  python -m vpe_jax.main --config=configs/text_rendering.py:tiny,vpe=false --workdir=runs/baseline
  python -m vpe_jax.sample --workdir=runs/text_rendering-tiny --n=8 \
      --prompt='the word "hello" in a blue sans-serif font'

One expert processes tokens and image, as in Show-o2 (configs/t2i.py:arch=single). `tiny` renders
one word in one font (`data.most_words`, `data.fonts`), `debug` 1 to 3 words in five; `paper`
fine-tunes Show-o2 on TextAtlas5M and AnyWord-3M, on `chips=N` chips. Results and open choices:
configs/README.md.
"""

from __future__ import annotations

import re

from ml_collections import ConfigDict

from configs import common, t2i


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset.

  Options: `vpe=true|false`; for `paper` only, `init=HQ|1.5B` and `chips=N`.
  """
  presets = {'tiny': _tiny, 'debug': _debug, 'paper': _paper}
  preset, options = common.parse_arg(arg, tuple(presets), vpe='true', chips='', init='')
  if options['chips'] and (
    preset != 'paper' or not re.fullmatch(r'[1-9]\d{0,5}', options['chips'])
  ):
    raise ValueError(f'chips={options["chips"]}: a number from 1 to 999999, only with preset paper')
  init = f',init={options["init"]}' if options['init'] else ''
  config = t2i.get_config(f'{preset},arch=single,vpe={options["vpe"]}{init}')
  config.name = 'text_rendering'
  for field in ('stages', 'steps', 'batch_size'):
    config[field] = config[field][-1:]
  presets[preset](config)
  if preset == 'paper':
    t2i.scale_to_chips(config, int(options['chips'] or 24), config.batch_size[0] // 24)
  return config


def _tiny(config: ConfigDict) -> None:
  config.steps = (1500,)
  config.batch_size = (32,)
  config.data.update(source='words', text_length=40, examples=24576)
  config.data.update(most_words=1, fonts=('sans-serif',))
  # Embeddings start random, and visual prompts are not guided.
  config.model.update(inherit=0.0, drop_text=0.0)
  config.sample.plan_guidance = 1.0
  config.evals = {'heldout': {'every': 250}, 'sample_grid': {'every': 500}}


def _debug(config: ConfigDict) -> None:
  config.data.update(source='words', text_length=52)


def _paper(config: ConfigDict) -> None:
  config.steps = (100_000,)
  config.batch_size = (24 * (8 if config.model.vpe else 12),)
  config.data.source = 'folders:text_atlas,anyword'
  # Without [bot] and [eot] there is room for two more tokens of text.
  config.data.text_length = 249 if config.model.vpe else 251
  config.optim.ema = 0.0
  config.sample.guidance = 5.5
