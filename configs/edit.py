r"""Image editing with visual prompts: stage 3 of both architectures (arXiv 2606.04457, 4.3).

  python -m vpe_jax.main --config=configs/edit.py:tiny,from_scratch=true  (all three stages)
  python -m vpe_jax.main --config=configs/t2i.py                          (stages 1 and 2 alone)
  python -m vpe_jax.main --config=configs/edit.py                         (stage 3 alone)
  python -m vpe_jax.main --config=configs/t2i.py:tiny,arch=external --workdir=runs/external
  python -m vpe_jax.main --config=configs/edit.py:tiny,arch=external --workdir=runs/edit-external
  python -m vpe_jax.sample --workdir=runs/edit-tiny --image=before.png \
      --prompt="replace the red circle with a dog"

Continues a run of configs/t2i.py with the source image in the AR expert's sequence:
`--config.start=RUN`, by default runs/t2i-PRESET, or runs/external for `arch=external`. With
`from_scratch=true`, both runs are one command, in WORKDIR/t2i and WORKDIR/edit.
`arch=internal` trains everything, `arch=external` the AR expert alone. Results, data and open
choices: configs/README.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, t2i


def get_config(arg: str = '') -> ConfigDict | dict[str, dict[str, ConfigDict]]:
  """The config of a preset.

  Options: `arch=internal|external`; `from_scratch=true`, a chain of the run of configs/t2i.py and
  this one; and, for `paper` only, `init=HQ|1.5B`.
  """
  presets = {'tiny': _tiny, 'debug': _debug, 'paper': _paper}
  defaults = {'arch': 'internal', 'from_scratch': 'false', 'init': ''}
  preset, options = common.parse_arg(arg, tuple(presets), **defaults)
  init = f',init={options["init"]}' if options['init'] else ''
  argument = f'{preset},arch={options["arch"]}{init}'
  if common.is_true('from_scratch', options):
    edit = get_config(argument)
    edit.start = 't2i'
    return {'runs': {'t2i': t2i.get_config(argument), 'edit': edit}}
  config = t2i.get_config(argument)
  config.name = config.system = 'edit'
  external = options['arch'] == 'external'
  config.start = 'runs/external' if external else f'runs/t2i-{preset}'
  # The parent run is complete, so start from its EMA weights. External's diffusion expert stays
  # frozen at these weights.
  config.start_weights = 'ema'
  config.stages = ('edit',)
  for field in ('steps', 'batch_size'):
    config[field] = config[field][-1:]
  config.data.source_images = True
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
  """Table 9 of the paper: 240 images a step (there, two microbatches of 5 x 24 images)."""
  config.steps = (35_000,)
  config.batch_size = (240,)
  config.data.filters = {}
  config.data.source = 'folders:nhr_edit*3,unic_edit,sharegpt_4o_image*5,pico_banana*4'
  config.model.eoi = 151_653
  config.optim.lr = 5e-5
  # Axis `fsdp` shards the batch (240 = 16 x 15) and the parameters; axis `tensor` has the remaining
  # devices and shards heads, MLPs and the vocabulary (on 64 devices, 12 heads over 4).
  config.mesh = {'data': 1, 'fsdp': 16, 'tensor': -1, 'strategy': 'fsdp_tensor'}
