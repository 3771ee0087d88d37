"""Visual-prompt flags of the sample command: valid and invalid combinations."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest
from absl import flags
from PIL import Image

from vpe_jax.contracts import UserError
from vpe_jax.sampling.images import GeneratedImage
from vpe_jax.systems.vpe.visual_prompts import files
from vpe_jax.systems.vpe.visual_prompts import flags as plan_flags

BOOK = files.Codebook(40, '0f3a5c7e9b1d')


def _plans(prompts=('a red fox', 'two pears')):
  codes = np.arange(4 * len(prompts), dtype=np.int32).reshape(-1, 4)
  return files.VisualPrompts(codes, prompts, tuple(range(len(prompts))), BOOK, {'by': 'sampled'})


@pytest.fixture
def parse(monkeypatch, tmp_path):
  """Parses a command line; paths are in a folder with a few files."""
  values = flags.FlagValues()
  defines = (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_enum, flags.DEFINE_float)
  into = {define.__name__: functools.partial(define, flag_values=values) for define in defines}
  monkeypatch.setattr(plan_flags, 'flags', types.SimpleNamespace(**into))
  monkeypatch.setattr(plan_flags, 'FLAGS', values)
  plan_flags.define()
  # Flags of vpe_jax.sample that are read too.
  into['DEFINE_integer']('n', 1, '')
  into['DEFINE_float']('plan_guidance', None, '')
  flags.DEFINE_bool('overwrite', False, '', flag_values=values)
  _plans().save(str(tmp_path / 'two.json'))
  _plans(('', 'x')).save(str(tmp_path / 'blank.npz'))
  (tmp_path / 'cut.json').write_text('{"format": ')
  Image.new('RGB', (20, 10), 'red').save(tmp_path / 'red.png')
  monkeypatch.chdir(tmp_path)

  def read(*args):
    for name in values:
      values[name].unparse()
    values(['sample', *args])
    return plan_flags.requested()

  return read


@pytest.mark.parametrize(
  'args, message',
  [
    (['--visual_prompt=two.json', '--plans=4'], '--visual_prompt and --plans each say where'),
    (['--visual_prompt=two.json', '--visual_prompt_from=red.png'], 'give one of them'),
    (['--visual_prompt_from=red.png', '--plans=4'], '--visual_prompt_from and --plans each say'),
    (['--render=2'], '--render needs --plans=N'),
    (['--rank=likelihood'], '--rank needs --plans=N'),
    (['--plans=0'], '--render=1 of --plans=0: render at least 1, and no more'),
    (['--plans=4', '--render=5'], '--render=5 of --plans=4'),
    (['--plans=4', '--render=0'], '--render=0 of --plans=4'),
    (['--plans=4', '--n=2'], '--plans generates --render images: leave --n out'),
    (['--visual_prompt=two.json', '--n=1'], 'one image for each entry: leave --n out'),
    (['--visual_prompt=two.json', '--plan_guidance=2'], '--visual_prompt supplies one'),
    (['--visual_prompt_from=red.png', '--plan_guidance=2'], '--plan_guidance guides'),
    (['--visual_prompt=cut.json'], 'cut.json is no whole file of visual prompts'),
    (['--visual_prompt=red.png'], "'red.png' is no file of visual prompts: .*.json or .npz"),
    (['--visual_prompt='], '--visual_prompt is empty'),
    (['--visual_prompt_from=two.json'], 'unreadable image two.json'),
    (['--visual_prompt_from=none.png'], 'unreadable image none.png'),
    (['--save_visual_prompt=two.json'], 'two.json exists: .*--overwrite'),
    (['--save_visual_prompt=x.txt'], "'x.txt' is no file of visual prompts"),
    (['--save_visual_prompt=red.png/x.json'], 'cannot write to red.png'),
  ],
)
def test_contradictory_flags_are_refused(parse, args, message):
  with pytest.raises(UserError, match=message) as error:
    parse(*args)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'args, prompts, message',
  [
    (['--visual_prompt=blank.npz'], [], 'visual prompt 0 has no prompt: .*--prompt'),
    (['--visual_prompt=two.json'], ['a', 'b', 'c'], '3 prompts for 2 visual prompts'),
  ],
)
def test_visual_prompts_need_a_prompt_each(parse, args, prompts, message):
  with pytest.raises(UserError, match=message):
    parse(*args).with_prompts(prompts)


class _Prompter:
  """Stands in for VisualPrompter and records its calls."""

  calls: list

  def __init__(self, generator):
    self.generator = generator

  def __getattr__(self, name):
    return lambda *args, **more: self.calls.append((name, args, more))

  def read(self, images):
    self.calls.append(('read', tuple(image.shape for image in images), {}))
    return types.SimpleNamespace(codes=np.asarray([[1, 2, 3, 4]]))


def _generator(prompts, n, seed, settings, **more):
  _Prompter.calls.append(('call', (prompts, n), more))
  image = np.zeros((4, 4, 3), np.uint8)
  return [GeneratedImage(image, prompt, 0, seed, {}, {}) for prompt in prompts]


@pytest.fixture(autouse=True)
def _no_calls(monkeypatch):
  _Prompter.calls = []
  monkeypatch.setattr(plan_flags, 'VisualPrompter', _Prompter)


def _generate(request, prompts, n=1):
  return request.generate(_generator, prompts, n, 5, None)


def test_a_file_is_rendered_with_its_own_prompts_or_new_ones(parse):
  request = parse('--visual_prompt=two.json')
  own, reprompted = request.with_prompts([]), request.with_prompts(['x'])
  assert own.count(0, 1) == 2
  for variant, prompts in ((own, ('a red fox', 'two pears')), (reprompted, ('x', 'x'))):
    _Prompter.calls.clear()
    _generate(variant, [])
    ((name, (loaded, seed, _), _),) = _Prompter.calls
    assert name == 'render' and loaded.prompts == prompts and seed == 5
    np.testing.assert_array_equal(loaded.codes, _plans().codes)
    assert loaded.provenance['by'].endswith('two.json')


def test_the_best_of_many_are_rendered(parse):
  request = parse('--plans=16', '--render=4', '--rank=similarity').with_prompts(['a', 'b'])
  assert request.count(2, 1) == 8
  _generate(request, ['a', 'b'])
  assert _Prompter.calls == [
    ('best_of', (['a', 'b'], 16, 4, 'similarity'), {'seed': 5, 'settings': None, 'progress': None})
  ]


def test_the_visual_prompt_of_an_image_is_fixed_for_all(parse):
  request = parse('--visual_prompt_from=red.png').with_prompts(['a', 'b'])
  assert request.count(2, 3) == 6
  images = _generate(request, ['a', 'b'], 3)
  (_, shapes, _), (name, arguments, more) = _Prompter.calls
  assert name == 'call' and arguments == (['a', 'b'], 3) and shapes == ((10, 20, 3),)
  np.testing.assert_array_equal(more['fixed']['visual_prompt'], [1, 2, 3, 4])
  assert {image.metadata['visual_prompt'] for image in images} == {'read from red.png'}


def test_visual_prompts_are_saved_with_save_visual_prompt(parse, tmp_path, monkeypatch):
  request = parse('--save_visual_prompt=new/x.json')
  images = _generate(request, ['a'])
  assert [name for name, *_ in _Prompter.calls] == ['check_codebook', 'call']
  of = lambda self, images: _plans(tuple(image.prompt for image in images))
  monkeypatch.setattr(_Prompter, 'of', of, raising=False)
  request.save(_generator, images, False)
  assert files.load(str(tmp_path / 'new' / 'x.json')).prompts == ('a',)
  assert parse() is None
