"""The sample command on visual prompts: flags that make sense together, and those that don't."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest
from absl import flags
from PIL import Image

from vpe_jax import plan_flags
from vpe_jax.contracts import UserError
from vpe_jax.sampling import plans as plans_io
from vpe_jax.sampling.pictures import Picture

BOOK = plans_io.Codebook(40, '0f3a5c7e9b1d')


def _plans(prompts=('a red fox', 'two pears')):
  codes = np.arange(4 * len(prompts), dtype=np.int32).reshape(-1, 4)
  return plans_io.Plans(codes, prompts, tuple(range(len(prompts))), BOOK, {'by': 'drawn'})


@pytest.fixture
def given(monkeypatch, tmp_path):
  """Reads a command line, and wishes what it asks for; paths are in a folder with a few files."""
  values = flags.FlagValues()
  defines = (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_enum, flags.DEFINE_float)
  into = {one.__name__: functools.partial(one, flag_values=values) for one in defines}
  monkeypatch.setattr(plan_flags, 'flags', types.SimpleNamespace(**into))
  monkeypatch.setattr(plan_flags, 'FLAGS', values)
  plan_flags.define()
  # Those of vpe_jax.sample that are read too.
  into['DEFINE_integer']('n', 1, '')
  into['DEFINE_float']('plan_guidance', None, '')
  flags.DEFINE_bool('overwrite', False, '', flag_values=values)
  _plans().save(str(tmp_path / 'two.json'))
  _plans(('', 'x')).save(str(tmp_path / 'untold.npz'))
  (tmp_path / 'cut.json').write_text('{"format": ')
  Image.new('RGB', (20, 10), 'red').save(tmp_path / 'red.png')
  monkeypatch.chdir(tmp_path)

  def read(*args):
    for name in values:
      values[name].unparse()
    values(['sample', *args])
    return plan_flags.wish()

  return read


@pytest.mark.parametrize(
  'args, message',
  [
    (['--visual_prompt=two.json', '--plans=4'], '--visual_prompt and --plans each say where'),
    (['--visual_prompt=two.json', '--visual_prompt_from=red.png'], 'give one of them'),
    (['--visual_prompt_from=red.png', '--plans=4'], '--visual_prompt_from and --plans each say'),
    (['--render=2'], '--render chooses among plans: .* --plans=N'),
    (['--rank=likelihood'], '--rank chooses among plans'),
    (['--plans=0'], '--render=1 of --plans=0: render at least 1, and no more'),
    (['--plans=4', '--render=5'], '--render=5 of --plans=4'),
    (['--plans=4', '--render=0'], '--render=0 of --plans=4'),
    (['--plans=4', '--n=2'], '--plans draws --render pictures: leave --n out'),
    (['--visual_prompt=two.json', '--n=1'], 'a picture of each plan in it: leave --n out'),
    (['--visual_prompt=two.json', '--plan_guidance=2'], '--visual_prompt gives one: leave it out'),
    (['--visual_prompt_from=red.png', '--plan_guidance=2'], '--plan_guidance leads plans that'),
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
def test_what_makes_no_sense_is_refused(given, args, message):
  with pytest.raises(UserError, match=message) as error:
    given(*args)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'args, prompts, message',
  [
    (['--visual_prompt=untold.npz'], [], 'plan 0 has no prompt: .*--prompt'),
    (['--visual_prompt=two.json'], ['a', 'b', 'c'], '3 prompts for 2 visual prompts'),
  ],
)
def test_plans_need_a_prompt_each(given, args, prompts, message):
  with pytest.raises(UserError, match=message):
    given(*args).told(prompts)


class _Generator:
  """Writes down what it is asked."""

  def __init__(self):
    self.asked = []

  def __getattr__(self, name):
    return lambda *args, **more: self.asked.append((name, args, more))

  def __call__(self, prompts, n, seed, settings, **more):
    self.asked.append(('call', (prompts, n), more))
    image = np.zeros((4, 4, 3), np.uint8)
    return [Picture(image, prompt, 0, seed, np.zeros(4, np.int32), {}) for prompt in prompts]

  def read(self, pictures):
    self.shapes = [picture.shape for picture in pictures]
    return types.SimpleNamespace(codes=np.asarray([[1, 2, 3, 4]]))


def _draw(wish, prompts, n=1):
  generator = _Generator()
  drawn = wish.draw(generator, prompts, n, 5, None)
  return generator, drawn


def test_a_file_is_rendered_with_its_own_prompts_or_others(given):
  wish = given('--visual_prompt=two.json')
  own, other = wish.told([]), wish.told(['x'])
  assert own.count(0, 1) == 2
  for one, prompts in ((own, ('a red fox', 'two pears')), (other, ('x', 'x'))):
    generator, _ = _draw(one, [])
    ((name, (plans, seed, _), _),) = generator.asked
    assert name == 'render' and plans.prompts == prompts and seed == 5
    np.testing.assert_array_equal(plans.codes, _plans().codes)
    assert plans.made['by'].startswith('given in ') and plans.made['by'].endswith('two.json')


def test_many_plans_are_written_and_the_best_drawn(given):
  wish = given('--plans=16', '--render=4', '--rank=similarity').told(['a', 'b'])
  assert wish.count(2, 1) == 8
  generator, _ = _draw(wish, ['a', 'b'])
  assert generator.asked == [
    ('best_of', (['a', 'b'], 16, 4, 'similarity'), {'seed': 5, 'settings': None})
  ]


def test_a_picture_gives_the_plan_of_all_that_is_drawn(given):
  wish = given('--visual_prompt_from=red.png').told(['a', 'b'])
  assert wish.count(2, 3) == 6
  generator, drawn = _draw(wish, ['a', 'b'], 3)
  ((name, asked, more),) = generator.asked
  assert name == 'call' and asked == (['a', 'b'], 3) and generator.shapes == [(10, 20, 3)]
  np.testing.assert_array_equal(more['codes'], [1, 2, 3, 4])
  assert {picture.metadata['visual_prompt'] for picture in drawn} == {'read from red.png'}


def test_plans_are_kept_where_that_is_asked_for(given, tmp_path):
  generator, drawn = _draw(given('--save_visual_prompt=new/x.json'), ['a'])
  assert [name for name, *_ in generator.asked] == ['check_plans', 'call']
  generator.plans_of = lambda drawn: _plans(tuple(picture.prompt for picture in drawn))
  given('--save_visual_prompt=new/x.json').save(generator, drawn, False)
  assert plans_io.load(str(tmp_path / 'new' / 'x.json')).prompts == ('a',)
  generator, drawn = _draw(given(), ['a'])
  given().save(generator, drawn, False)
  assert [name for name, *_ in generator.asked] == ['call']
