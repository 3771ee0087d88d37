r"""Text rendering: Show-o2 with and without visual prompt (arXiv 2606.04457, section 4.2).

  python -m vpe_jax.main --config=configs/text_rendering.py               (tiny, any machine)
  python -m vpe_jax.main --config=configs/text_rendering.py:debug         (seconds)
  python -m vpe_jax.main --config=configs/text_rendering.py:tiny,vpe=false --workdir=runs/baseline
  python -m vpe_jax.sample --workdir=runs/text_rendering-tiny --n=8 \
      --prompt='the words "hello fox" in a blue serif font'

One expert has tokens and picture, as in Show-o2 (configs/t2i.py:arch=single). `vpe=true` trains
`[bos] text [bot] s [eot] [boi] | time x`, `vpe=false` the baseline `[bos] text [boi] | time x`:
with Show-o2's tail `[eoi] [eos]`, which nothing sees and we leave out, 1,856 and 1,280 tokens at
paper size, and 2,855.9M and 2,830.8M parameters. Everything trains in one stage, on flow matching
and, with visual prompt, on cross-entropy at the growing weight of Eq. 3.

`tiny` and `debug` draw 64x64 pictures of 1 to 3 words in five fonts (`data.source=words`). In a
held-out picture stand two words that training never shows together, or a word in a font that it
never shows it in.

`paper` fine-tunes Show-o2 on TextAtlas5M and AnyWord-3M, folders of pictures in data.root with
their words and boxes (vpe_jax.data.recipes), or on your own (--config.data.source=folder:PATH): 8
images a chip, and 12 without visual prompt, on 24 chips. On another number of them (`chips=N`) it
sees as many images, and the learning rate grows with the square root of the batch.

Left open by the paper, with what is the default here and what else there is:
  the weight of the cross-entropy  a sigmoid from .03 to .1, k = 10, over all steps
                                   (model.vp_schedule=sigmoid); linear, constant (always
                                   model.ce_start), off (always 1)
  the learning rate                1e-4 after 2,000 steps of warm-up, as in its Table 9, for both;
                                   5e-5 would be safer for a fine-tune (optim.lr)
  the average of the parameters    none (optim.ema=0)
  dropping the condition           one example in ten loses text and plan (model.drop)
  steps of the baseline            100,000 too: 4.5 epochs of its 6.35M pictures where 3 are 66,000
                                   (--config.steps=66000)
  excluding Chinese                records in English by their `language`, or by their letters where
                                   they have none (data.language=en)
  illegible once padded            text lower than 8 pixels, which is one latent
                                   (data.least_text_height=8)

`tiny`, both trained on an H100 in float32: held-out flow loss .588 with visual prompt
(cross-entropy .876) and .612 without; after twice the steps (--config.steps="(3000,)") .529 (.823)
and .555. Lines, inks and grounds come out, words don't yet: of 256 pictures of each held-out split
of the longer runs an OCR reads no word right, where it reads 99.3 and 100 % of the words of true
pictures (vpe_jax.evaluate; character error rates .94 and .95, without visual prompt .94 and .95). A
step takes 0.85 s on 2 CPU cores: 21 minutes.

Compiled for pods by launch/compile_all.sh, which writes this table:
  config                     stage  topology   images  memory   HBM  step at least     MFU at most
  paper,vpe=false,chips=256  joint  v5e:16x16  3,072   12.7 GB  75%  1.50 s (compute)  80%
  paper,vpe=false,chips=64   joint  v5p:4x4x4  768     8.8 GB   9%   0.64 s (compute)  80%
  paper,vpe=false,chips=64   joint  v6e:8x8    768     8.8 GB   26%  0.32 s (compute)  80%
  paper,vpe=true,chips=256   joint  v5e:16x16  2,048   8.9 GB   53%  1.48 s (compute)  82%
  paper,vpe=true,chips=64    joint  v5p:4x4x4  512     8.5 GB   8%   0.64 s (compute)  82%
  paper,vpe=true,chips=64    joint  v6e:8x8    512     7.9 GB   24%  0.32 s (compute)  82%
(end of the table)
"""

from __future__ import annotations

import re

from ml_collections import ConfigDict

from configs import common, t2i


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset, with `vpe=true|false`, and of `paper` alone `chips=N`."""
  presets = {'tiny': _tiny, 'debug': _debug, 'paper': _paper}
  preset, options = common.parse_arg(arg, tuple(presets), vpe='true', chips='')
  if options['chips'] and (
    preset != 'paper' or not re.fullmatch(r'[1-9]\d{0,5}', options['chips'])
  ):
    raise ValueError(
      f'chips={options["chips"]}: a number from 1 to 999999, of the preset paper only'
    )
  config = t2i.get_config(f'{preset},arch=single,vpe={options["vpe"]}')
  config.name = 'text_rendering'
  for field in ('stages', 'steps', 'batch_size'):
    config[field] = config[field][-1:]
  presets[preset](config)
  if preset == 'paper':
    t2i.spread(config, int(options['chips'] or 24), config.batch_size[0] // 24)
  return config


def _tiny(config: ConfigDict) -> None:
  config.steps = (1500,)
  config.batch_size = (32,)
  config.data.update(source='words', text_length=40, examples=12288)
  # Both start from rows that are drawn, and no plan is led away from one without text.
  config.model.update(inherit=0.0, drop_text=0.0)
  config.sample.plan_guidance = 1.0
  config.evals = {'heldout': {'every': 250}, 'sample_grid': {'every': 500}}


def _debug(config: ConfigDict) -> None:
  config.data.update(source='words', text_length=40)


def _paper(config: ConfigDict) -> None:
  config.steps = (100_000,)
  config.batch_size = (24 * (8 if config.model.vpe else 12),)
  config.data.update(source='folders:text_atlas,anyword', language='en', least_text_height=8)
  # Two more tokens of text without [bot] and [eot].
  config.data.text_length = 249 if config.model.vpe else 251
  config.optim.ema = 0.0
  config.sample.guidance = 5.5
