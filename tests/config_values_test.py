"""Every field of every config section refuses wrong values in one line, or has a reason."""

import dataclasses
import math

import pytest

from vpe_jax import config, systems
from vpe_jax.contracts import UserError
from vpe_jax.training import config_file

CONFIGS = ('t2i', 'edit', 'text_rendering', 'c2i_discrete', 'c2i_continuous', 'codec', 'siglip')
WRONG = (None, (), math.nan, math.inf, -math.inf, 1e39, -1, 10**400, 'x', {'x': 1}, True)


def _sections(section):
  """The section and all sections within it."""
  yield section
  for field in dataclasses.fields(section):
    if dataclasses.is_dataclass(value := getattr(section, field.name)):
      yield from _sections(value)


def _builders():
  """Type of a section -> (a section, a function that builds one from its fields)."""
  known = {}
  for name in CONFIGS:
    full = systems.build(config_file.load(f'configs/{name}.py:debug', {})).config
    build = lambda values, c=full: config.from_dict(values, type(c.model), type(c.sample))
    known.setdefault(type(full), (full, build))
    for section in _sections(full):
      kind = type(section)
      known.setdefault(kind, (section, lambda values, k=kind: config.build_section(k, values)))
  return known


# (field, value) that a section accepts -> reason.
ACCEPTED = {
  **{(name, -1): 'the other devices' for name in ('data', 'fsdp', 'tensor')},
  **{(name, -1): 'a scale may be negative' for name in ('plan_guidance', 'image_guidance')},
  ('guidance', -1): 'a scale may be negative',
  ('mean', -1): 'the logarithm of a ratio',
  ('depth', -1): 'the usual features of a tower',
  ('seed', -1): 'refused by rng.check_seed',
  ('seed', 10**400): 'refused by rng.check_seed',
  ('rope_scaling', None): 'no scaling',
  ('end', None): 'the largest id of a caption',
  ('fonts', ()): 'all fonts',
  ('fonts', 'x'): 'checked where the source is opened',
}
# Texts that are checked where they are opened or looked up; a section knows no list of them.
TEXTS = {
  'autoencoder_weights', 'encoder_weights', 'image_weights', 'init_from', 'siglip_weights', 'start',
  'tower_weights', 'weights', 'weights_dtype', 'root', 'language', 'name', 'preset', 'system',
  'strategy', 'profile', 'kind', 'positions', 'class_rotation',
}  # fmt: skip


def _may_accept(name, default, value):
  is_text = value == 'x' and isinstance(default, str) and name in TEXTS
  is_flag = value is True and isinstance(default, bool)
  return is_text or is_flag or (not isinstance(value, dict) and (name, value) in ACCEPTED)


def test_no_field_of_any_section_takes_a_wrong_value():
  failures = []
  for kind, (section, build) in _builders().items():
    values = config.to_dict(section)
    for field in dataclasses.fields(section):
      for value in WRONG:
        where = f'{kind.__module__}.{kind.__name__}.{field.name}={value!r:.40}'
        try:
          build(values | {field.name: value})
        except UserError as error:
          if '\n' in str(error) or field.name not in str(error):
            failures.append(f'{where}: {error}')
        else:
          if not _may_accept(field.name, getattr(section, field.name), value):
            failures.append(f'{where} is accepted')
  assert not failures, '\n'.join(failures)


@pytest.mark.parametrize('key', ['system', 'model.image.kind', 'model.visual_prompt.kind'])
def test_a_name_of_the_wrong_type_is_one_line(key):
  values = config_file.load('configs/t2i.py:debug', {})
  *sections, name = key.split('.')
  section = values
  for inner in sections:
    section = section[inner]
  section[name] = {}
  with pytest.raises(UserError, match=f'{key}.* is .*{{}}'):
    systems.build(values)
