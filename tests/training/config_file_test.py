"""Tests of config files and overrides."""

import pathlib
import re

import pytest

from tests.outcomes import refusal_of, result_of
from vpe_jax import systems
from vpe_jax.contracts import UserError
from vpe_jax.training import config_file

ROOT = pathlib.Path(__file__).parents[2]
T2I = str(ROOT / 'configs' / 't2i.py')
CODEC = str(ROOT / 'configs' / 'codec.py')


def test_overrides_set_fields_that_the_file_omits():
  values = config_file.load(
    f'{T2I}:debug',
    {
      'optim.lr': '3e-4',
      'checkpoint.keep_every': '7',
      'steps': '(3, 4)',
      'batch_size': '16',
      'data.source': 'folder:123',
      'data.encode': 'online',
    },
  )
  assert values['optim']['lr'] == 3e-4 and values['checkpoint']['keep_every'] == 7
  assert values['data']['source'] == 'folder:123' and values['preset'] == 'debug'
  system = config_file.systems.build(values)
  assert system.config.steps == (3, 4) and system.config.batch_size == (16, 16)


@pytest.mark.parametrize(
  'spec, overrides, message',
  [
    (f'{T2I}:debog', {}, "unknown preset 'debog'; did you mean 'debug'"),
    (T2I, {'optim.lrr': '1'}, "unknown config key 'optim.lrr'; did you mean 'lr'"),
    (T2I, {'optin.lr': '1'}, "unknown config key 'optin.lr'; did you mean 'optim'"),
    (T2I, {'seed.x': '1'}, "'seed' is a single value"),
    (T2I, {'optim': '5'}, "'optim' is a section: set one of its fields, as optim.NAME=VALUE"),
    (T2I, {'evals.heldout.every.x': '1'}, "'every' is a single value"),
    (T2I, {'optim.lr': 'fast'}, "'optim.lr' must be float, not 'fast'"),
    (T2I, {'optim.lr': '(1e-3, 1e-4, 1e-5)'}, 'must be one value, or one per stage .2.'),
    (T2I, {'optim.lr': '(1e-3, -1.0)'}, 'must be above 0 and finite'),
    (T2I, {'optim.accumulate': '(1, 0)'}, 'it must be at least 1'),
    (T2I, {'start_weights': 'state'}, 'name one run'),
    (T2I, {'start_weights': 'state', 'start': 'dit=run'}, 'name one run'),
    (T2I, {'steps': '(1, 2, 3)'}, 'config.steps has 3 entries for 2 stages'),
    (T2I, {'log.every': '0'}, "'log.every' is 0: it must be at least 1"),
    (CODEC + ':tiny,stage=features', {}, "unknown stage 'features'; did you mean 'feature_vq'"),
    (T2I, {'model.patch': '0'}, "'model.patch' is 0: it must be at least 1"),
    (T2I, {'model.ar.heads': '0'}, "'model.ar.heads' is 0: it must be at least 1"),
    (T2I, {'model.dual_path.encoder.width': '-1'}, "'model.dual_path.encoder.width' is -1"),
    (T2I, {'model.visual_prompt.siglip.patch': '0'}, "'model.visual_prompt.siglip.patch' is 0"),
    (T2I, {'model.multiple': '0'}, "'model.multiple' is 0: it must be at least 1"),
    (T2I, {'model.bos': '1024'}, "'model.bos' is 1024: it must be below text_vocab=1024"),
    (T2I, {'model.drop': '1.5'}, "'model.drop' is 1.5: it must be between 0 and 1"),
    (T2I, {'stages': "('joint', 'plan')"}, 'continues the previous one, in the order plan, joint'),
    (T2I, {'seed': '-' * 5000}, "'seed' must be int"),
    (str(ROOT / 'README.md'), {}, 'a config is a Python file'),
    (str(ROOT / 'configs' / 'common.py'), {}, r'has no get_config\(arg\)'),
    (str(ROOT / 'configs' / 't3i.py'), {}, 'no such file; did you mean .*t2i.py'),
  ],
)
def test_invalid_configs_are_one_line_errors_with_a_cure(spec, overrides, message):
  with pytest.raises(UserError, match=message) as error:
    config_file.load(spec, overrides)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'code, message',
  [
    ('def get_config(arg):', 'fails .*IndentationError'),
    ('import no_such_package', 'fails in line 1 .*no_such_package'),
    ('x = 1', 'has no get_config'),
    ('get_config = 3', 'has no get_config'),
    (
      'def get_config(arg):\n  return None',
      'returns NoneType: it must return a ConfigDict or a dict',
    ),
    ('def get_config(arg):\n  return 1 / 0', 'fails in line 2 .*division'),
    ('def get_config():\n  return {}', 'fails .*TypeError'),
    ('raise SystemExit(0)', 'fails in line 1 .*SystemExit'),
    ('import sys\ndef get_config(arg):\n  sys.exit("bye")', 'fails in line 3 .*bye'),
    ('def get_config(arg):\n  return {}', "config.system is 'None'"),
    ('\0', 'null bytes'),
    ('raise ValueError("two\\nlines")', 'mine.py: two lines'),
  ],
)
def test_failing_config_file_is_a_one_line_error(tmp_path, code, message):
  path = tmp_path / 'mine.py'
  path.write_text(code)
  with pytest.raises(UserError, match=message) as error:
    config_file.load(str(path), {})
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'spec, overrides, message',
  [
    ('t2i', {'log.profile': '-1'}, "'log.profile' is '-1': it must be a range of steps"),
    ('t2i', {'log.profile': '5:3'}, "'log.profile' is '5:3'"),
    ('t2i', {'log.profile': '0:2'}, "'log.profile' is '0:2'"),
    ('t2i', {'log.profile': '3:'}, "'log.profile' is '3:'"),
    ('t2i', {'seed': '-1'}, 'seed is -1: choose one from 0'),
    ('t2i', {'seed': str(2**64)}, 'choose one from 0'),
    ('t2i', {'evals.nope.every': '5'}, "unknown evaluator 'nope'"),
    ('t2i', {'evals.nope.every': '0'}, "unknown evaluator 'nope'"),
    ('t2i', {'evals.heldout.batchs': '5'}, "did you mean 'batches'"),
    ('t2i', {'evals.classes.every': '5'}, 'evaluator classes is for classes'),
    ('t2i', {'data.image_size': '63'}, 'data.image_size is 63: it must be 64'),
    ('t2i:tiny,arch=external', {'data.image_size': '128'}, 'data.image_size is 128'),
    ('edit', {'data.image_size': '63'}, 'data.image_size is 63'),
    ('text_rendering', {'data.image_size': '63'}, 'data.image_size is 63'),
    ('c2i_continuous', {'data.image_size': '63'}, 'data.image_size is 63: it must be 64'),
    ('c2i_discrete', {'data.image_size': '63'}, 'data.image_size is 63: .* multiple of 4'),
    ('codec', {'data.image_size': '63'}, 'data.image_size is 63: .* multiple of 4'),
    ('t2i:tiny,arch=single,arch=internal', {}, "'arch=internal': arch occurs twice"),
  ],
)
def test_values_that_a_run_would_refuse_later_are_refused_at_load(spec, overrides, message):
  assert re.search(message, refusal_of(config_file.load, spec, overrides))


def test_values_that_a_run_accepts_are_loaded():
  overrides = {'log.profile': '10:13', 'evals.heldout.batches': '2', 'seed': '7'}
  values = result_of(config_file.load, 't2i', overrides)
  assert systems.build(values).config.log.profiled_steps == range(10, 13)
  result_of(config_file.load, 't2i', {'data.source': 'synthetic', 'data.image_size': '32'})
  result_of(config_file.load, 'codec:tiny,stage=feature_vq', {'data.image_size': '63'})


def test_config_may_be_a_dict(tmp_path):
  values = config_file.load(f'{T2I}:debug', {})
  path = tmp_path / 'mine.py'
  path.write_text(f'def get_config(arg):\n  return {values!r}')
  assert config_file.load(str(path), {}) == values


def test_overrides_are_split_from_the_command_line():
  overrides, arguments = config_file.split_overrides(
    ['main', '--config=a.py', '--config.optim.lr=1', '-config.seed', '--workdir=x', 'config.b=1']
  )
  assert overrides == {'optim.lr': '1', 'seed': 'true'}
  assert arguments == ['main', '--config=a.py', '--workdir=x', 'config.b=1']
  with pytest.raises(UserError, match="'seed' must be int, not True"):
    config_file.load(f'{T2I}:debug', overrides)


def test_selected_stages_keep_their_steps_and_batch_sizes():
  spec, overrides = f'{T2I}:debug,arch=external', {'start': 'RUN', 'stages': "('render',)"}
  config = config_file.systems.build(config_file.load(spec, overrides)).config
  assert (config.stages, config.steps, config.batch_size) == (('render',), (12,), (8,))
  values = config_file.load(f'{T2I}:debug', {'stages': 'plan', 'steps': '3'})
  config = config_file.systems.build(values).config
  assert (config.stages, config.steps, config.batch_size) == (('plan',), (3,), (8,))
  with pytest.raises(UserError, match="config.start_weights is 'emma'; known: raw, ema"):
    config_file.load(spec, overrides | {'start_weights': 'emma'})
  values = config_file.load(f'{T2I}:debug', {'stages': 'plan', 'optim.lr': '1e-4'})
  assert config_file.systems.build(values).config.optim.lr == 1e-4


def test_selected_stage_keeps_its_learning_rate(tmp_path):
  values = config_file.load(f'{T2I}:debug', {'optim.lr': '(1e-4, 5e-5)', 'optim.warmup': '(7, 9)'})
  assert values['optim']['lr'] == (1e-4, 5e-5)
  path = tmp_path / 'mine.py'
  path.write_text(f'def get_config(arg):\n  return {values!r}')
  selected = config_file.load(str(path), {'stages': 'joint', 'start': 'RUN', 'optim.warmup': '3'})
  optim = config_file.systems.build(selected).config.optim
  assert optim.of(0).lr == 5e-5 and optim.warmup == 3


def test_text_fields_may_differ_between_stages():
  overrides = {'optim.name': "('muon', 'adamw')", 'optim.multipliers': '(ar|dit)/=0.5'}
  optim = config_file.systems.build(config_file.load(f'{T2I}:debug', overrides)).config.optim
  assert (optim.of(0).name, optim.of(1).name) == ('muon', 'adamw')
  assert optim.of(1).factors == (('(ar|dit)/', 0.5),)


def test_overridden_kind_resets_the_section_to_its_defaults():
  overrides = {
    'model.visual_prompt.weights': 'OWNER/NAME',
    'model.visual_prompt.kind': 'siglip_vq',
    'model.visual_prompt.codes': '512',
    'model.inherit': '0.0',
  }
  config = config_file.systems.build(config_file.load(f'{T2I}:tiny', overrides)).config
  prompt = config.model.visual_prompt
  assert (prompt.kind, prompt.weights, prompt.image_size) == ('siglip_vq', 'OWNER/NAME', 384)
  with pytest.raises(UserError, match="did you mean 'siglip_vq'"):
    config_file.load(f'{T2I}:tiny', {'model.visual_prompt.kind': 'siglip'})
  with pytest.raises(UserError, match="'model.image.body' is missing"):
    config_file.load(f'{T2I}:tiny', {'model.image.kind': 'wan_vae'})


def _c2i(argument):
  return f'{ROOT / "configs" / "c2i_continuous.py"}:{argument}'


def test_a_chain_has_its_runs_in_order_and_starts_from_their_folders():
  chain = config_file.load_chain(_c2i('debug,fork=both'), {'optim.lr': '0.5', 'vpe.seed': '3'})
  runs = config_file.in_folder(chain, 'gs://bucket/fork')
  folders = [f'gs://bucket/fork/{name}' for name in ('shared', 'baseline', 'vpe')]
  assert list(runs) == folders
  assert [run['start'] for run in runs.values()] == ['', folders[0], folders[0]]
  assert [run['model']['vpe'] for run in runs.values()] == [False, False, True]
  assert [run['optim']['lr'] for run in runs.values()] == [0.5] * 3
  assert [run['seed'] for run in runs.values()] == [0, 0, 3]


def test_a_single_run_is_a_chain_of_one_without_a_name():
  chain = config_file.load_chain(_c2i('debug'), {'start': 'shared'})
  assert chain == {'': config_file.load(_c2i('debug'), {'start': 'shared'})}
  (workdir, run), *others = config_file.in_folder(chain, 'runs/x').items()
  assert (workdir, run['start'], others) == ('runs/x', 'shared', [])


def test_commands_for_a_single_run_refuse_a_chain():
  with pytest.raises(UserError, match='chain of runs .shared, baseline, vpe'):
    config_file.load(_c2i('debug,fork=both'), {})


@pytest.mark.parametrize('arch, stages', [('internal', 'joint'), ('external', 'render')])
def test_editing_from_scratch_has_all_three_stages(arch, stages):
  edit = str(ROOT / 'configs' / 'edit.py')
  chain = config_file.load_chain(f'{edit}:debug,arch={arch},from_scratch=true', {})
  runs = config_file.in_folder(chain, 'runs/e')
  assert [run['stages'] for run in runs.values()] == [['plan', stages], ['edit']]
  first, last = runs.values()
  assert (first['start'], last['start'], last['start_weights']) == ('', 'runs/e/t2i', 'ema')
  assert (first['data']['source'], last['data']['source']) == ('mixture', 'edits')
  alone = config_file.load(f'{edit}:debug,arch={arch}', {})
  assert last == alone | {'start': 'runs/e/t2i'}


@pytest.mark.parametrize('file', ['t2i', 'edit', 'text_rendering'])
def test_the_released_show_o2_is_an_option(file):
  """The grids of both: 32 x 32 image tokens of 512 x 512, and 27 x 27 of 432 x 432."""
  releases = {'': ('show-o2-1.5B-HQ', 512, 64), ',init=HQ': ('show-o2-1.5B-HQ', 512, 64)}
  releases[',init=1.5B'] = ('show-o2-1.5B', 432, 54)
  for option, (name, side, grid) in releases.items():
    values = config_file.load(f'{ROOT / "configs" / file}.py:paper{option}', {})
    assert values['model']['init_from'] == f'showlab/{name}'
    assert (values['data']['image_size'], values['model']['latent_size']) == (side, grid)
    assert values['model']['dual_path']['table'] == 27
  with pytest.raises(UserError, match='init=7B'):
    config_file.load(f'{ROOT / "configs" / file}.py:paper,init=7B', {})
  with pytest.raises(UserError, match='init=HQ: only paper'):
    config_file.load(f'{ROOT / "configs" / file}.py:tiny,init=HQ', {})
