"""The table of golden cases: configs with settings for sampling.

Together they cover every config file, every architecture and every stage, at the size `debug`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Case:
  """A recorded config.

  Attributes:
    name: file name without its suffix.
    config: file and argument, as `--config` takes them.
    overrides: dotted field of the config -> value as text, as `--config.FIELD=VALUE` takes it.
    samples: name of a set of samples -> settings that differ from the config's own; empty where
      nothing is sampled. The set `given` renders visual prompts of held-out images.
    quick: whether XLA skips most optimizations, for fast compilation.
    shipped: whether the parameters are `assets:tiny` instead of redrawn ones; such a case has only
      the losses and gradients of the first step, and the images of four prompts.
  """

  name: str
  config: str
  overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
  samples: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
  quick: bool = True
  shipped: bool = False


_FILTERS = {'temperature': 0.9, 'top_k': 200, 'top_p': 0.95}
_GUIDED = {'guidance': 2.0, 'plan_guidance': 2.0, **_FILTERS}
_WITH_PROMPT = {'own': {}, 'led': _GUIDED, 'given': {'guidance': 1.0}}
_WITHOUT_PROMPT = {'own': {}, 'led': {'guidance': 2.0}}
_EDITS = {'own': {}, 'led': _GUIDED | {'image_guidance': 1.5}, 'given': {'guidance': 1.0}}
_CONTINUOUS = {'own': {}, 'led': {'guidance': 3.0, **_FILTERS}, 'given': {'guidance': 1.0}}

# Options that `tiny` adds to `debug`, and choices that the paper leaves open.
_T2I_OPTIONS = {
  'unroll': 'true',
  'model.layout': 'raster',
  'model.multiple': '16',
  'model.time_shift': '0.0',
  'model.inherit': '0.08',
  'model.drop_text': '0.25',
  'model.logits_chunk': '10',
  'model.vp_schedule': 'linear',
  'optim.weight_decay': '0.05',
  'optim.clip': '0.0',
  'optim.lr': '(1e-3, 5e-4)',
  'optim.ema': '(0.0, 0.9)',
}
_DISCRETE_OPTIONS = {
  'unroll': 'true',
  'model.positions': 'line',
  'model.class_rotation': 'zero',
  'model.mask_by': 'sample',
  'model.vp_schedule': 'linear',
  'model.token_dropout': '0.1',
  'model.residual_dropout': '0.1',
  'model.mlp_dropout': '0.1',
  'model.logits_chunk': '64',
  'optim.weight_decay': '0.05',
}
_CONTINUOUS_OPTIONS = {
  'unroll': 'true',
  'data.encode': 'online',
  'model.vp_schedule': 'off',
  'model.time_shift': '2.0',
  'model.logits_chunk': '10',
  'sample.shift': '3.0',
}
_EVALUATOR = {
  'seed': '1234',
  'data.source': 'scenes',
  'data.text_length': '24',
  'data.near_misses': '4',
  'model.siglip.image_size': '60',
  'model.siglip.patch': '12',
  'model.siglip.text_length': '24',
  'model.mask_tokens': '0.4',
  'model.recolour': '0.4',
}
_T2I, _EDIT = 'configs/t2i.py:debug', 'configs/edit.py:debug'
_TEXT, _SIGLIP = 'configs/text_rendering.py:debug', 'configs/siglip.py:debug'
_DISCRETE, _CONTINUOUS_FILE = 'configs/c2i_discrete.py:debug', 'configs/c2i_continuous.py:debug'
_CODEC = 'configs/codec.py:debug'

CASES = (
  Case('t2i_internal', _T2I, {}, _WITH_PROMPT),
  Case('t2i_single', f'{_T2I},arch=single', {}, _WITH_PROMPT),
  Case('t2i_external_prefix', f'{_T2I},arch=external', {}, _WITH_PROMPT),
  Case('t2i_external_keys', f'{_T2I},arch=external', {'model.condition': 'keys'}, _WITH_PROMPT),
  Case('t2i_external_cross', f'{_T2I},arch=external', {'model.condition': 'cross'}, _WITH_PROMPT),
  Case('t2i_internal_unplanned', f'{_T2I},vpe=false', {}, _WITHOUT_PROMPT),
  Case('t2i_single_unplanned', f'{_T2I},arch=single,vpe=false', {}, _WITHOUT_PROMPT),
  Case('t2i_online', _T2I, {'data.encode': 'online'}, {'own': {}}),
  Case('t2i_accumulate', _T2I, {'optim.accumulate': '2'}),
  Case('t2i_options', _T2I, _T2I_OPTIONS, _WITH_PROMPT),
  Case('edit_internal', _EDIT, {}, _EDITS),
  Case('edit_external', f'{_EDIT},arch=external', {}, _WITH_PROMPT),
  Case('edit_online', _EDIT, {'data.encode': 'online'}),
  Case('text_rendering', _TEXT, {}, _WITH_PROMPT),
  Case('text_rendering_unplanned', f'{_TEXT},vpe=false', {}, _WITHOUT_PROMPT),
  Case('c2i_discrete', _DISCRETE, {}, _WITH_PROMPT),
  Case('c2i_discrete_unplanned', f'{_DISCRETE},vpe=false', {}, _WITHOUT_PROMPT),
  Case('c2i_discrete_options', _DISCRETE, _DISCRETE_OPTIONS, {'own': {}}),
  Case('c2i_continuous', _CONTINUOUS_FILE, {}, _CONTINUOUS),
  Case('c2i_continuous_unplanned', f'{_CONTINUOUS_FILE},vpe=false', {}, _WITHOUT_PROMPT),
  Case('c2i_continuous_options', _CONTINUOUS_FILE, _CONTINUOUS_OPTIONS, {'own': {}}),
  Case('siglip', _SIGLIP),
  Case('siglip_evaluator_network', _SIGLIP, _EVALUATOR),
  Case('codec_feature_vq', f'{_CODEC},stage=feature_vq'),
  Case('codec_image', f'{_CODEC},stage=image'),
  Case('codec_image_codes', f'{_CODEC},stage=image_codes'),
  Case(
    'assets',
    'configs/t2i.py:tiny',
    {'data.examples': '64', 'batch_size': '(16, 16)'},
    quick=False,
    shipped=True,
  ),
)

PROMPTS = ('three red circles', 'a blue star above a green square', 'a dog', 'two yellow hearts')


def select(names: list[str]) -> list[Case]:
  """The cases with these names, in the order of the table; all cases if `names` is empty.

  Raises:
    ValueError: no case has a name of `names`.
  """
  known = [case.name for case in CASES]
  for name in names:
    if name not in known:
      raise ValueError(f"no case is called '{name}'; known: {', '.join(known)}")
  return [case for case in CASES if not names or case.name in names]
