"""Generator: batching, reproducibility, what pictures say about themselves."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vpe_jax
from configs import t2i
from vpe_jax import generator as generator_lib
from vpe_jax import rng as rng_lib
from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import BatchSpec, Generated, Samples, UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.generator import Generator
from vpe_jax.sampling import images
from vpe_jax.sampling.settings import FlowSampling, TokenSampling


@dataclasses.dataclass(frozen=True)
class Sampling(FlowSampling, TokenSampling):
  """Settings of flow and tokens."""


class _Dice(Samples):
  """A system whose codes are drawn per example, and whose image shows codes and prompt."""

  capabilities = (Samples,)
  drafts = ('visual_prompt',)
  codes = 200

  def __init__(self):
    data = types.SimpleNamespace(text_length=16, image_size=4)
    self.config = types.SimpleNamespace(data=data, sample=Sampling(steps=7))
    self.batches = []  # batch size of each trace

  def batch_spec(self, batch_size):
    ints = lambda *shape: jax.ShapeDtypeStruct((batch_size, *shape), jnp.int32)
    encoded = {'visual_prompt': ints(4)}
    inputs = {'text': ints(16), 'text_length': ints()}
    return BatchSpec(inputs, encoded=encoded, codebooks={'visual_prompt': self.codes})

  def draft(self, params, request, rng, settings):
    draw = lambda key: jax.random.randint(key, (4,), 0, self.codes)
    return {'visual_prompt': rng_lib.per_example(draw, rng, 'codes', request.example)}

  def generate(self, params, frozen, request, rng, settings):
    self.batches.append(request.example.shape[0])
    codes = request.encoded['visual_prompt']
    shade = (codes + params['shift'] + request.inputs['text'][:, :4] % 50) / 255
    image = jnp.broadcast_to(shade[:, :, None, None], (*shade.shape, 4, 3))
    return Generated(image, {'visual_prompt': codes, 'latents': image * settings.guidance})


def _dice(batch_size=4):
  said = {'checkpoint': 'abc', 'weights': 'dice (ema)'}
  return Generator(_Dice(), {'shift': np.float32(1)}, {}, bpe.shipped(), said, batch_size)


def _same(a, b):
  np.testing.assert_array_equal(a.encoded['visual_prompt'], b.encoded['visual_prompt'])
  np.testing.assert_array_equal(a.image, b.image)
  assert a.metadata == b.metadata and (a.prompt, a.index) == (b.prompt, b.index)


def test_a_picture_is_the_same_alone_among_others_and_reordered():
  draws = _dice()
  prompts = ['a red fox', 'two green pears', 'a blue circle']
  together = draws(prompts, n=4, seed=3)
  assert [(p.prompt, p.index) for p in together] == [(p, i) for p in prompts for i in range(4)]
  _same(draws('two green pears', seed=3)[0], together[4])
  for ours, theirs in zip(draws('two green pears', n=3, seed=3), together[4:7]):
    _same(ours, theirs)
  reordered = draws(prompts[::-1], n=4, seed=3)
  for ours, theirs in zip(reordered, together[8:] + together[4:8] + together[:4]):
    _same(ours, theirs)


def test_a_prompt_that_comes_again_goes_on_with_its_next_pictures():
  draws = _dice()
  again = draws(['a red fox', 'two green pears', 'a red fox'], seed=3)
  assert [picture.index for picture in again] == [0, 0, 1]
  for ours, theirs in zip(again[::2], draws('a red fox', n=2, seed=3)):
    _same(ours, theirs)


def test_seed_prompt_and_place_each_change_the_picture():
  draws = _dice()
  first, second = draws('a red fox', n=2, seed=0)
  others = [second, draws('a red fox', seed=1)[0], draws('a red wolf', seed=0)[0]]
  codes = first.encoded['visual_prompt']
  assert all((other.encoded['visual_prompt'] != codes).any() for other in others)


def test_every_batch_has_the_same_rows_and_one_program_serves_all():
  draws, calls = _dice(batch_size=5), []
  assert len(draws(['a', 'b', 'c'], n=4, progress=lambda *at: calls.append(at))) == 12
  assert calls == [(5, 12), (10, 12), (12, 12)]
  draws('d')
  assert draws.system.batches == [5]  # traced once


def test_given_codes_are_rendered():
  draws = _dice()
  codes = np.arange(8).reshape(2, 4)
  own = draws(['a', 'b'], fixed={'visual_prompt': codes})
  np.testing.assert_array_equal([p.encoded['visual_prompt'] for p in own], codes)
  shared = draws(['a', 'b'], n=2, fixed={'visual_prompt': codes[0]})
  repeated = np.tile(codes[0], (4, 1))
  np.testing.assert_array_equal([p.encoded['visual_prompt'] for p in shared], repeated)
  for wrong in (np.zeros((3, 4)), np.zeros((2, 5)), np.zeros(3)):
    with pytest.raises(UserError, match=r'\(2, 4\)'):
      draws(['a', 'b'], fixed={'visual_prompt': wrong})
  for wrong in ([0, 1, 2, 200], [-1, 1, 2, 3], [0, 1, 2, 2**32 + 3]):
    with pytest.raises(UserError, match='the codebook has 0 to 199'):
      draws('a', fixed={'visual_prompt': np.asarray(wrong)})
  with pytest.raises(UserError, match='visual_prompt has dtype float64'):
    draws('a', fixed={'visual_prompt': np.asarray([0, 1, 2, 3.7])})


def test_settings_start_from_the_runs_own():
  draws = _dice()
  assert draws.settings() == Sampling(steps=7)
  assert draws.settings(guidance=2.0, top_k=None) == Sampling(steps=7, guidance=2.0)
  with pytest.raises(UserError, match="did you mean 'guidance'"):
    draws.settings(guidence=2.0)
  with pytest.raises(UserError, match='guidance.* is nan: it must be a finite number'):
    draws.settings(guidance=float('nan'))
  with pytest.raises(UserError, match='seed is 2147483648: choose one from 0 to 2147483647'):
    draws('a', seed=2**31)


def test_pictures_say_how_they_were_made(tmp_path):
  draws = _dice()
  picture = draws('a red fox', n=2, seed=9, settings=draws.settings(top_k=5))[1]
  picture.save(tmp_path / 'x.png')
  said = Image.open(tmp_path / 'x.png').text
  assert json.loads(said.pop('settings')) == dataclasses.asdict(Sampling(steps=7, top_k=5))
  assert said == {
    'prompt': 'a red fox',
    'seed': '9',
    'index': '1',
    'checkpoint': 'abc',
    'weights': 'dice (ema)',
    'version': f'vpe_jax {vpe_jax.__version__}',
    'generated': 'true',
  }


def test_sheet_joins_what_its_pictures_say():
  drawn = _dice()(['a red fox', 'two pears'], n=2, seed=9)
  image, said = images.sheet(drawn)
  assert said['prompt'] == 'a red fox\ntwo pears' and said['index'] == '0\n1'
  assert said['seed'] == '9' and said['generated'] == 'true'
  columns, _ = images.sheet(drawn[::2])
  single, _ = images.sheet(drawn[:1])
  assert image.height > columns.height and columns.width > single.width


@pytest.mark.parametrize(
  'prompts, n, message', [([], 1, 'nothing to generate'), ('a', 0, 'nothing to generate')]
)
def test_nothing_to_draw_is_an_error(prompts, n, message):
  with pytest.raises(UserError, match=message):
    _dice()(prompts, n)


def test_prompts_are_alike_however_they_are_spaced():
  plain, spaced = (_dice()(prompt)[0] for prompt in ('a red fox', '\ufeff a red fox \t\n'))
  _same(plain, spaced)
  for blank in ('', ' \n', '\ufeff'):
    with pytest.raises(UserError, match='prompt is blank'):
      _dice()(['a red fox', blank])


def test_over_long_prompt_is_an_error():
  with pytest.raises(UserError, match='shorten it'):
    _dice()('a red fox and a dog ' * 20)


def test_small_batches_are_refused():
  with pytest.raises(UserError, match='from 4 on'):
    _dice(batch_size=2)


def test_load_refuses_unknown_weights_and_folders(tmp_path):
  with pytest.raises(UserError, match="'ema'"):
    Generator.load('runs/x', weights='best')
  with pytest.raises(UserError, match='nowhere'):
    Generator.load(str(tmp_path / 'nowhere'))
  assert not (tmp_path / 'nowhere').exists()


def test_load_refuses_files_that_hold_something_else(tmp_path):
  path = str(tmp_path / 'x.safetensors')
  weights.save(path, {'a': np.zeros(2)}, {})
  with pytest.raises(UserError, match='have no config'):
    Generator.load(path)
  weights.save(path, {'a': np.zeros(2)}, {'config': '{}', 'weights': 'ema'}, overwrite=True)
  with pytest.raises(UserError, match='EMA weights only'):
    Generator.load(path, weights='raw')
  config = t2i.get_config('debug')
  config.data.source = 'synthetic'
  said = {'config': json.dumps(config.to_dict()), 'weights': 'ema'}
  weights.save(path, {'a': np.zeros(2)}, said, overwrite=True)
  with pytest.raises(UserError, match='synthetic latents'):
    Generator.load(path)


def _tampered(path, change, **said):
  """The shipped generator with other parameters and other words about them."""
  params, metadata = weights.load('assets:tiny')
  change(params)
  del metadata['fingerprint'], metadata['dtype']
  weights.save(path, params, metadata | said)
  return path


@pytest.mark.parametrize(
  'change, said, message',
  [
    (lambda p: p['embed'].pop('codes'), {}, "'embed/codes' is absent"),
    (lambda p: p.update(extra=np.zeros(2)), {}, r"'extra' is \[2\]"),
    (lambda p: p['embed'].update(text=np.zeros((3, 2))), {}, r"'embed/text' is \[3, 2\]"),
    (lambda p: None, {'config': '{"a": '}, 'the config in .* is damaged'),
    (lambda p: None, {'config': '[' * 100_000}, 'the config in .* is damaged'),
    (lambda p: None, {'config': '[1]'}, 'the config in .* is damaged'),
    (lambda p: None, {'stage': '7'}, "is of stage '7', and its config has 2 stages"),
    (lambda p: None, {'stage': 'x'}, "is of stage 'x'"),
  ],
)
def test_load_refuses_damaged_weights_in_one_line(tmp_path, change, said, message):
  path = _tampered(str(tmp_path / 'x.safetensors'), change, **said)
  with pytest.raises(UserError, match=message) as error:
    Generator.load(path)
  assert '\n' not in str(error.value)


def test_load_refuses_networks_that_do_not_draw_for_it(tmp_path):
  config = json.loads(weights.load('assets:tiny')[1]['config'])
  config['model']['image']['weights'] = 'assets:feature_vq'
  path = _tampered(str(tmp_path / 'x.safetensors'), lambda p: None, config=json.dumps(config))
  with pytest.raises(UserError, match='image=assets:feature_vq.* do not fit') as error:
    Generator.load(path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('stage, warned', [('0', True), ('1', False), (None, False)])
def test_load_warns_of_a_run_that_stopped_early(tmp_path, monkeypatch, caplog, stage, warned):
  path = str(tmp_path / 'x.safetensors')
  said = {'config': json.dumps(t2i.get_config('debug').to_dict()), 'weights': 'ema'}
  weights.save(path, {'a': np.zeros(2)}, said | ({'stage': stage} if stage else {}))
  monkeypatch.setattr(Generator, '__init__', lambda *_: None)
  monkeypatch.setattr(generator_lib.frozen_lib, 'check_sampling', lambda *_: None)
  Generator.load(path)
  assert [f"{path} stopped in stage 'plan'" in r.getMessage() for r in caplog.records] == (
    [True] if warned else []
  )


@pytest.mark.parametrize(
  'stages, start, warned',
  [
    (('plan',), '', True),
    (('plan',), 'ar=a run', True),
    (('plan',), 'dit=a run', False),
    (('plan',), 'a run', False),
    (('joint',), '', False),
  ],
)
def test_load_warns_of_a_run_that_trained_nothing_that_draws(
  tmp_path, monkeypatch, caplog, stages, start, warned
):
  path, config = str(tmp_path / 'x.safetensors'), t2i.get_config('debug')
  with config.unlocked():
    config.stages, config.start = stages, start
    config.steps, config.batch_size = (1,), (8,)
  params = {name: {'kernel': np.zeros(2)} for name in ('ar', 'dit')}
  weights.save(path, params, {'config': json.dumps(config.to_dict()), 'weights': 'ema'})
  monkeypatch.setattr(Generator, '__init__', lambda *_: None)
  monkeypatch.setattr(generator_lib.frozen_lib, 'check_sampling', lambda *_: None)
  Generator.load(path)
  said = f"{path} has no stage after 'plan', and its dit is untrained"
  assert [said in r.getMessage() for r in caplog.records] == ([True] if warned else [])


@pytest.fixture(scope='module')
def debug():
  """The debug model with random weights, none of which is zero, and a random autoencoder."""
  config = t2i.get_config('debug')
  config.data.source = 'synthetic'
  system = systems.build(config.to_dict())
  fresh, tree = jax.tree.flatten(jax.jit(system.init)(jax.random.key(0)))
  noise = np.random.default_rng(0)
  # Wide enough that what a branch is told shows in its pictures.
  params = [x + 0.1 * noise.normal(size=x.shape).astype(np.float32) for x in fresh]
  zeros = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 16, 16, 4))
  image = jax.jit(system.image.network.init)(jax.random.key(2), *zeros)['params']
  said = {'checkpoint': 'abc', 'weights': 'random (ema)'}
  tree = jax.tree.unflatten(tree, params)
  return Generator(system, tree, {'image': image}, bpe.shipped(), said)


def _close(a, b):
  np.testing.assert_array_equal(a.encoded['visual_prompt'], b.encoded['visual_prompt'])
  assert np.abs(a.image.astype(int) - b.image.astype(int)).max() <= 1


def test_debug_model_draws_the_same_alone_in_four_and_reordered(debug):
  prompts = ['a red fox', 'two green pears', 'three blue circles on a light gray background']
  together = debug(prompts, n=4, seed=1)
  assert len({p.encoded['visual_prompt'].tobytes() for p in together}) == 12
  for ours, theirs in zip(debug(prompts[1], n=4, seed=1), together[4:8]):
    _close(ours, theirs)
  for prompt, theirs in zip(prompts, together[::4]):
    _close(debug(prompt, seed=1)[0], theirs)
  for ours, theirs in zip(debug(prompts[::-1], seed=1), together[8::-4]):
    _close(ours, theirs)


def test_debug_model_follows_its_guidance(debug):
  first = np.zeros(debug.system.config.model.plan_tokens, np.int32)
  draw = lambda scale, codes: debug(
    'a red fox', fixed={'visual_prompt': codes}, settings=debug.settings(guidance=scale)
  )[0].image.astype(int)
  null, conditional = draw(0.0, first), draw(1.0, first)
  assert np.abs(null - conditional).max() > 1
  # The null branch sees neither prompt nor plan, and the noise doesn't depend on the plan.
  np.testing.assert_array_equal(draw(0.0, first + 7), null)
  assert np.abs(draw(1.0, first + 7) - conditional).max() > 1
  # Scales next to 0 and 1 run both branches; they come out where one branch alone does.
  assert np.abs(draw(1e-6, first) - null).max() <= 1
  assert np.abs(draw(1 - 1e-6, first) - conditional).max() <= 1


def test_debug_model_renders_given_codes(debug):
  own = debug('a red fox', n=2, seed=5)
  fixed = {'visual_prompt': np.stack([p.encoded['visual_prompt'] for p in own])}
  again = debug('a red fox', n=2, seed=5, fixed=fixed)
  for ours, theirs in zip(again, own):
    _close(ours, theirs)
