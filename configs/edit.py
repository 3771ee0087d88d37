r"""Image editing with visual prompts: stage 3 of both architectures (arXiv 2606.04457, 4.3).

  python -m vpe_jax.main --config=configs/t2i.py                          (its stages 1 and 2 first)
  python -m vpe_jax.main --config=configs/edit.py                         (tiny, any machine)
  python -m vpe_jax.main --config=configs/t2i.py:tiny,arch=external --workdir=runs/external
  python -m vpe_jax.main --config=configs/edit.py:tiny,arch=external --workdir=runs/edit-external
  python -m vpe_jax.sample --workdir=runs/edit-tiny --image=before.png \
      --prompt="replace the red circle with a dog"

A run of configs/t2i.py (`--config.start=RUN`; runs/t2i-PRESET, or runs/external) goes on with the
picture before in its token row, embedded by a second dual path: Show-o2's where `model.init_from`
names one (`paper`), else a copy of the run's own. `arch=internal` trains everything, on flow
matching and on cross-entropy at the constant weight .1; `arch=external` the token expert alone, on
cross-entropy: its flow loss is evaluated and not trained on. Both have 4,570.0M parameters at paper
size.

Of App. D's rows the last three are 5 % of the examples each: without instruction (and plan),
without the picture before, without both; external's, whose plan always stays, lack one of the two.
Guidance has two scales (sample.guidance and sample.image_guidance, 2.5 and 1), which lead the
internal picture away from the one without instruction and plan, and from the one with nothing; at 1
the latter isn't computed. Two more choices that the paper leaves open, for external: 2.5 leads its
picture away from the one without plan, as its stage 2 was trained to; and its plan isn't led
(sample.plan_guidance leads it away from the one without instruction).

`tiny` and `debug` edit scenes and OpenMoji variants (data.source=edits): things are added, removed,
recoloured, replaced and moved; skin tones, hair and genders change. `paper` takes the paper's four
sets with its up-sampling, 5.45M in all: NHR-Edit x 3 (2.16M), UnicEdit (2.03M), ShareGPT-4o-Image
x 5 (0.23M) and Pico-Banana x 4 (1.03M), as folders in data.root whose captions.jsonl has a
`reference` in each line (vpe_jax.data.recipes), or one of your own
(--config.data.source=folder:PATH): the paper's 5 images a chip on 24 chips, two microbatches a
step, 70,000 of which are 35,000 steps; here both are one batch (--config.optim.accumulate=2 and
--config.mesh.fsdp=8 cut it again). It runs on a multiple of 16 chips; those beyond 16 share the
work within the layers.

`tiny` of both, and the runs that they start from, trained on an H100 in float32: held-out
cross-entropy .868 internal and .842 external, flow loss .271 and .514 (there not trained on). Of
256 held-out edits (vpe_jax.evaluate, combinations) the internal picture is nearer to the target
than to the picture before, where they differ, in 62.1 % with its own plan and 96.5 % with the true
one; external 60.9 and 67.6 %; pictures for another edit 48.0 and 51.2 %, noise 47.7 %. Less than
half as far from the target as the picture before are 26.2 and 62.1 %, external 14.1 and 19.5 %.
--workdir=runs/edit-tiny,runs/edit-external puts both on one sheet.

Compiled for pods by launch/compile_all.sh, which writes this table:
  config               stage  topology   images  memory   HBM  step at least     MFU at most
  paper,arch=external  edit   v5p:4x4x4  240     6.8 GB   7%   0.26 s (compute)  69%
  paper,arch=external  edit   v6e:8x8    240     6.8 GB   20%  0.24 s (hbm)      38%
  paper,arch=internal  edit   v5p:4x4x4  240     13.2 GB  13%  0.54 s (compute)  74%
  paper,arch=internal  edit   v6e:8x8    240     13.2 GB  39%  0.45 s (hbm)      44%
(end of the table)
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, t2i


def get_config(arg: str = '') -> ConfigDict:
  """The config of a preset, with `arch=internal|external`."""
  presets = {'tiny': _tiny, 'debug': _debug, 'paper': _paper}
  preset, options = common.parse_arg(arg, tuple(presets), arch='internal')
  config = t2i.get_config(f'{preset},arch={options["arch"]}')
  config.name = config.system = 'edit'
  external = options['arch'] == 'external'
  config.start = 'runs/external' if external else f'runs/t2i-{preset}'
  # The run is done: it draws with its averages, and external's picture expert stays at them.
  config.start_weights = 'ema'
  config.stages = ('edit',)
  for field in ('steps', 'batch_size'):
    config[field] = config[field][-1:]
  config.data.references = True
  config.model.update(inherit=0.0, drop=0.0 if external else 0.05, drop_text=0.05)
  config.sample.update(guidance=2.5, image_guidance=1.0, plan_guidance=1.0)
  presets[preset](config)
  return config


def _tiny(config: ConfigDict) -> None:
  config.steps = (1500,)
  config.batch_size = (32,)
  config.data.update(source='edits', scenes_share=0.8, text_length=40, examples=16384)
  config.model.eoi = 6
  config.optim.lr = 1e-3
  config.evals = {'heldout': {'every': 250}, 'sample_grid': {'every': 500}}


def _debug(config: ConfigDict) -> None:
  config.data.update(source='edits', text_length=40)
  config.model.eoi = 6


def _paper(config: ConfigDict) -> None:
  """Table 9 of the paper: 5 x 24 images a microbatch, two of which are a step: one batch here."""
  config.steps = (35_000,)
  config.batch_size = (240,)
  config.data.source = 'folders:nhr_edit*3,unic_edit,sharegpt_4o_image*5,pico_banana*4'
  config.model.eoi = 151_653
  config.optim.lr = 5e-5
  # 240 = 16 x 15: the batch goes to 16 devices, each layer to what is left (12 heads to 4 of 64).
  config.mesh = {'data': 1, 'fsdp': 16, 'tensor': -1, 'strategy': 'fsdp_tensor'}
