"""Generator: batching, reproducibility, and the metadata of generated images."""

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
from tests.compilations import compilations
from vpe_jax import generator as generator_lib
from vpe_jax import rng as rng_lib
from vpe_jax import sharding, systems
from vpe_jax.checkpoints import weights
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import BatchSpec, Generated, Samples, UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.generator import Generator
from vpe_jax.sampling import images
from vpe_jax.sampling.settings import FlowSampling, TokenSampling


@dataclasses.dataclass(frozen=True)
class Sampling(FlowSampling, TokenSampling):
  """Settings of flow and tokens."""


class _Dice(Samples):
  """A system whose codes are sampled per example, and whose image shows codes and prompt."""

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
    sample = lambda key: jax.random.randint(key, (4,), 0, self.codes)
    return {'visual_prompt': rng_lib.per_example(sample, rng, 'codes', request.example)}

  def generate(self, params, frozen, request, rng, settings):
    self.batches.append(request.example.shape[0])
    codes = request.encoded['visual_prompt']
    shade = (codes + params['shift'] + request.inputs['text'][:, :4] % 50) / 255
    image = jnp.broadcast_to(shade[:, :, None, None], (*shade.shape, 4, 3))
    return Generated(image, {'visual_prompt': codes, 'latents': image * settings.guidance})


def _dice(batch_size=4):
  metadata = {'checkpoint': 'abc', 'weights': 'dice (ema)'}
  return Generator(_Dice(), {'shift': np.float32(1)}, {}, bpe.shipped(), metadata, batch_size)


def _same(a, b):
  np.testing.assert_array_equal(a.encoded['visual_prompt'], b.encoded['visual_prompt'])
  np.testing.assert_array_equal(a.image, b.image)
  assert a.metadata == b.metadata and (a.prompt, a.index) == (b.prompt, b.index)


def test_an_image_does_not_depend_on_its_batch_or_the_order_of_prompts():
  generator = _dice()
  prompts = ['a red fox', 'two green pears', 'a blue circle']
  together = generator(prompts, n=4, seed=3)
  assert [(p.prompt, p.index) for p in together] == [(p, i) for p in prompts for i in range(4)]
  _same(generator('two green pears', seed=3)[0], together[4])
  for ours, theirs in zip(generator('two green pears', n=3, seed=3), together[4:7]):
    _same(ours, theirs)
  reordered = generator(prompts[::-1], n=4, seed=3)
  for ours, theirs in zip(reordered, together[8:] + together[4:8] + together[:4]):
    _same(ours, theirs)


def test_a_repeated_prompt_continues_with_its_next_images():
  generator = _dice()
  repeated = generator(['a red fox', 'two green pears', 'a red fox'], seed=3)
  assert [generated.index for generated in repeated] == [0, 0, 1]
  for ours, theirs in zip(repeated[::2], generator('a red fox', n=2, seed=3)):
    _same(ours, theirs)


def test_seed_prompt_and_index_each_change_the_image():
  generator = _dice()
  first, second = generator('a red fox', n=2, seed=0)
  variants = [second, generator('a red fox', seed=1)[0], generator('a red wolf', seed=0)[0]]
  codes = first.encoded['visual_prompt']
  assert all((variant.encoded['visual_prompt'] != codes).any() for variant in variants)


def test_all_batches_have_one_size_and_one_compiled_program():
  generator, calls = _dice(batch_size=5), []
  assert len(generator(['a', 'b', 'c'], n=4, progress=lambda *at: calls.append(at))) == 12
  assert calls == [(5, 12), (10, 12), (12, 12)]
  generator('d')
  assert generator.system.batches == [5]  # traced once


def test_fixed_codes_are_rendered():
  generator = _dice()
  codes = np.arange(8).reshape(2, 4)
  own = generator(['a', 'b'], fixed={'visual_prompt': codes})
  np.testing.assert_array_equal([p.encoded['visual_prompt'] for p in own], codes)
  shared = generator(['a', 'b'], n=2, fixed={'visual_prompt': codes[0]})
  repeated = np.tile(codes[0], (4, 1))
  np.testing.assert_array_equal([p.encoded['visual_prompt'] for p in shared], repeated)
  for wrong in (np.zeros((3, 4)), np.zeros((2, 5)), np.zeros(3)):
    with pytest.raises(UserError, match=r'\(2, 4\)'):
      generator(['a', 'b'], fixed={'visual_prompt': wrong})
  for wrong in ([0, 1, 2, 200], [-1, 1, 2, 3], [0, 1, 2, 2**32 + 3]):
    with pytest.raises(UserError, match='the codebook has 0 to 199'):
      generator('a', fixed={'visual_prompt': np.asarray(wrong)})
  with pytest.raises(UserError, match='visual_prompt has dtype float64'):
    generator('a', fixed={'visual_prompt': np.asarray([0, 1, 2, 3.7])})


def test_settings_default_to_those_of_the_run():
  generator = _dice()
  assert generator.settings() == Sampling(steps=7)
  assert generator.settings(guidance=2.0, top_k=None) == Sampling(steps=7, guidance=2.0)
  with pytest.raises(UserError, match="did you mean 'guidance'"):
    generator.settings(guidence=2.0)
  with pytest.raises(UserError, match='guidance.* is nan: it must be a finite number'):
    generator.settings(guidance=float('nan'))
  with pytest.raises(UserError, match='seed is 2147483648: choose one from 0 to 2147483647'):
    generator('a', seed=2**31)


def test_saved_images_have_metadata(tmp_path):
  generator = _dice()
  generated = generator('a red fox', n=2, seed=9, settings=generator.settings(top_k=5))[1]
  generated.save(tmp_path / 'x.png')
  metadata = Image.open(tmp_path / 'x.png').text
  assert json.loads(metadata.pop('settings')) == dataclasses.asdict(Sampling(steps=7, top_k=5))
  assert metadata == {
    'prompt': 'a red fox',
    'seed': '9',
    'index': '1',
    'checkpoint': 'abc',
    'weights': 'dice (ema)',
    'version': f'vpe_jax {vpe_jax.__version__}',
    'generated': 'true',
  }


def test_a_sheet_joins_the_metadata_of_its_images():
  generated = _dice()(['a red fox', 'two pears'], n=2, seed=9)
  image, metadata = images.sheet(generated)
  assert metadata['prompt'] == 'a red fox\ntwo pears' and metadata['index'] == '0\n1'
  assert metadata['seed'] == '9' and metadata['generated'] == 'true'
  columns, _ = images.sheet(generated[::2])
  single, _ = images.sheet(generated[:1])
  assert image.height > columns.height and columns.width > single.width


@pytest.mark.parametrize(
  'prompts, n, message', [([], 1, 'nothing to generate'), ('a', 0, 'nothing to generate')]
)
def test_nothing_to_generate_is_an_error(prompts, n, message):
  with pytest.raises(UserError, match=message):
    _dice()(prompts, n)


def test_surrounding_whitespace_of_a_prompt_is_ignored():
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


def test_load_refuses_files_that_it_cannot_sample_from(tmp_path):
  path = str(tmp_path / 'x.safetensors')
  weights.save(path, {'a': np.zeros(2)}, {})
  with pytest.raises(UserError, match='have no config'):
    Generator.load(path)
  weights.save(path, {'a': np.zeros(2)}, {'config': '{}', 'weights': 'ema'}, overwrite=True)
  with pytest.raises(UserError, match='EMA weights only'):
    Generator.load(path, weights='raw')
  config = t2i.get_config('debug')
  config.data.source = 'synthetic'
  metadata = {'config': json.dumps(config.to_dict()), 'weights': 'ema'}
  weights.save(path, {'a': np.zeros(2)}, metadata, overwrite=True)
  with pytest.raises(UserError, match='synthetic latents'):
    Generator.load(path)


def _write_changed(path, change, **changed_metadata):
  """The shipped generator with changed parameters and changed metadata."""
  params, metadata = weights.load('assets:tiny')
  change(params)
  del metadata['fingerprint'], metadata['dtype']
  weights.save(path, params, metadata | changed_metadata)
  return path


@pytest.mark.parametrize(
  'change, metadata, message',
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
def test_load_refuses_damaged_weights_in_one_line(tmp_path, change, metadata, message):
  path = _write_changed(str(tmp_path / 'x.safetensors'), change, **metadata)
  with pytest.raises(UserError, match=message) as error:
    Generator.load(path)
  assert '\n' not in str(error.value)


def test_load_refuses_frozen_networks_that_do_not_fit(tmp_path):
  config = json.loads(weights.load('assets:tiny')[1]['config'])
  config['model']['image']['weights'] = 'assets:feature_vq'
  path = _write_changed(str(tmp_path / 'x.safetensors'), lambda p: None, config=json.dumps(config))
  with pytest.raises(UserError, match='image=assets:feature_vq.* do not fit') as error:
    Generator.load(path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('stage, warned', [('0', True), ('1', False), (None, False)])
def test_load_warns_of_a_run_that_stopped_early(tmp_path, monkeypatch, caplog, stage, warned):
  path = str(tmp_path / 'x.safetensors')
  metadata = {'config': json.dumps(t2i.get_config('debug').to_dict()), 'weights': 'ema'}
  weights.save(path, {'a': np.zeros(2)}, metadata | ({'stage': stage} if stage else {}))
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
def test_load_warns_of_a_run_whose_renderer_is_untrained(
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
  warning = f"{path} has no stage after 'plan', and its dit is untrained"
  assert [warning in r.getMessage() for r in caplog.records] == ([True] if warned else [])


@pytest.fixture(scope='module')
def debug():
  """The debug model with random weights, none of which is zero, and a random autoencoder."""
  config = t2i.get_config('debug')
  config.data.source = 'synthetic'
  system = systems.build(config.to_dict())
  leaves, treedef = jax.tree.flatten(jax.jit(system.init)(jax.random.key(0)))
  noise = np.random.default_rng(0)
  # Enough noise that images depend on the condition.
  params = [x + 0.1 * noise.normal(size=x.shape).astype(np.float32) for x in leaves]
  zeros = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 16, 16, 4))
  image = jax.jit(system.image.network.init)(jax.random.key(2), *zeros)['params']
  metadata = {'checkpoint': 'abc', 'weights': 'random (ema)'}
  params = jax.tree.unflatten(treedef, params)
  return Generator(system, params, {'image': image}, bpe.shipped(), metadata)


def _close(a, b):
  np.testing.assert_array_equal(a.encoded['visual_prompt'], b.encoded['visual_prompt'])
  assert np.abs(a.image.astype(int) - b.image.astype(int)).max() <= 1


def test_debug_model_images_do_not_depend_on_the_batch_or_the_order_of_prompts(debug):
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
  first = np.zeros(debug.system.config.model.visual_prompt_tokens, np.int32)
  sample = lambda scale, codes: debug(
    'a red fox', fixed={'visual_prompt': codes}, settings=debug.settings(guidance=scale)
  )[0].image.astype(int)
  null, conditional = sample(0.0, first), sample(1.0, first)
  assert np.abs(null - conditional).max() > 1
  # The null branch sees neither text nor visual prompt, and the noise ignores the latter.
  np.testing.assert_array_equal(sample(0.0, first + 7), null)
  assert np.abs(sample(1.0, first + 7) - conditional).max() > 1
  # Scales next to 0 and 1 run both branches; the result is that of one branch alone.
  assert np.abs(sample(1e-6, first) - null).max() <= 1
  assert np.abs(sample(1 - 1e-6, first) - conditional).max() <= 1


def test_debug_model_renders_fixed_codes(debug):
  own = debug('a red fox', n=2, seed=5)
  fixed = {'visual_prompt': np.stack([p.encoded['visual_prompt'] for p in own])}
  again = debug('a red fox', n=2, seed=5, fixed=fixed)
  for ours, theirs in zip(again, own):
    _close(ours, theirs)


def test_programs_compiled_ahead_are_those_that_sample(debug):
  settings = debug.settings(steps=2)
  ahead = [lowered.compile() for lowered in debug.programs(settings)]
  with compilations() as observed:
    debug('a red fox', settings=settings)
  assert len(ahead) == 3 and not {'generate', 'draft'} & set(observed.all)


def test_programs_compiled_ahead_for_a_mesh_are_those_that_sample():
  """They are lowered under the generator's mesh, over which networks shard their activations."""
  system, mesh = _Dice(), sharding.make_mesh(MeshConfig())
  generate, meshes = system.generate, []

  def observed(*args):
    meshes.append(jax.sharding.get_abstract_mesh())
    return generate(*args)

  system.generate = observed
  params = {'shift': jax.device_put(np.float32(1), sharding.replicated(mesh))}
  generator = Generator(system, params, {}, bpe.shipped(), {}, mesh=mesh)
  generator.programs(generator.settings())
  assert meshes == [mesh.abstract_mesh]
