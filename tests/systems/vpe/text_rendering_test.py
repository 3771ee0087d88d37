"""Text rendering: sizes of the paper, and Show-o2's sequence without visual prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import text_rendering as config_file
from tests.small_systems import encoded_examples, host_params, request_of, with_inputs
from vpe_jax import rng, systems
from vpe_jax.contracts import UserError
from vpe_jax.data.sources import open_source
from vpe_jax.sampling import flow as flow_lib
from vpe_jax.sharding import leaves_by_path
from vpe_jax.systems.vpe.text_to_image import Sampling

KEY = rng.run_key(0)
B = 4
ALL = jnp.ones(B, bool)


def _system(arg: str, **model):
  config = config_file.get_config(arg)
  config.data.source = 'synthetic'
  if not arg.startswith('paper'):
    config.data.text_length = 5
    config.model.dual_path.encoder.layers = config.model.head.layers = 1
  config.model.update(model)
  return systems.build(config.to_dict())


def _networks(arg: str):
  """The system with the frozen networks that a run on its own data loads."""
  return systems.build(config_file.get_config(arg).to_dict())


@pytest.fixture(scope='module')
def plain():
  return _system('debug,vpe=false')


@pytest.fixture(scope='module')
def params(plain):
  return host_params(plain)


def _tree(arg: str):
  return leaves_by_path(jax.eval_shape(_system(arg).init, KEY))


# Tokens of the sequences in App. D; the tail [eoi] [eos] is left out.
_PROMPT = [('bot', 1), ('codes', 576), ('eot', 1)]
_SEQUENCES = {
  'paper': (1856, [('bos', 1), ('text', 249), *_PROMPT]),
  'paper,vpe=false': (1280, [('bos', 1), ('text', 251)]),
}


@pytest.mark.parametrize('arg', _SEQUENCES)
def test_sequences_are_the_papers(arg):
  length, condition = _SEQUENCES[arg]
  spans = [(span.name, span.length) for span in _system(arg).layout.spans]
  assert spans == [*condition, ('boi', 1), ('time', 1), ('latents', 1024)]
  tail = 2
  assert sum(count for _, count in spans) + tail == length


def test_parameter_counts_are_the_papers():
  """reference: Show-o2 is 2,830.8M; 16,384 codes and two markers, tied, make it 2,855.9M."""
  totals = [sum(leaf.size for leaf in _tree(arg).values()) for arg in _SEQUENCES]
  assert totals == [2_830_777_056 + (16_384 + 2) * 1536, 2_830_777_056]


def test_recipe_is_the_papers():
  for arg, batch, losses in (
    ('paper', 24 * 8, ('next_token', 'flow')),
    ('paper,vpe=false', 24 * 12, ('flow',)),
  ):
    system = _system(arg)
    config, (stage,) = system.config, system.stages
    assert (stage.name, tuple(stage.losses), stage.ema) == ('joint', losses, False)
    assert (config.steps, config.batch_size) == ((100_000,), (batch,))
    assert (config.optim.lr, config.optim.warmup) == (1e-4, 2000)
    assert config.sample.guidance == 5.5
    assert system.initialization.pretrained[0].source == 'showlab/show-o2-1.5B-HQ'
  scaled = _system('paper,vpe=false,chips=96').config
  assert (scaled.batch_size, scaled.steps, scaled.optim.lr) == ((96 * 12,), (25_000,), 2e-4)


@pytest.mark.parametrize('preset', ['debug', 'tiny', 'paper'])
def test_the_visual_prompt_adds_code_embeddings_alone(preset):
  plain, prompted = _tree(f'{preset},vpe=false'), _tree(preset)
  assert prompted.keys() - plain.keys() == {'embed/codes'} and plain.keys() < prompted.keys()
  assert all(leaf.shape == prompted[path].shape for path, leaf in plain.items())


def test_only_networks_in_use_are_loaded():
  embedded = lambda arg: set(_networks(arg).frozen)
  assert embedded('debug') == {'siglip', 'feature_vq', 'image'}
  assert embedded('debug,vpe=false') == {'image'}
  paper = _networks('paper,vpe=false')
  assert set(paper.frozen) == set(paper.frozen_shapes()) == {'image'}
  assert paper.frozen['image'].published is not None


def test_the_flow_is_the_only_loss(plain, params):
  batch, (stage,) = encoded_examples(plain, B), plain.stages
  assert batch.encoded.keys() == plain.batch_spec(B).encoded.keys() == {'latents'}
  weights = {}

  @jax.jit
  def run(params):
    terms = plain.losses(params, {}, batch, KEY, 0, stage)
    weights.update({name: term.weight for name, term in terms.items()})
    return {name: (term.sum, term.count) for name, term in terms.items()}

  (loss, count) = run(params)['flow']
  assert weights == {'flow': 1.0} and np.isfinite(loss) and loss > 0
  elements = batch.encoded['latents'].size
  assert float(count) == float(plain.counts(batch, KEY, 0, stage)['flow']) == elements


def test_images_follow_the_uncached_velocity(plain, params):
  """Guided: the cached prefix `[bos] text [boi]` and the null prefix equal training's."""
  batch, scale = encoded_examples(plain, B), 2.0
  settings = Sampling(steps=2, guidance=scale, plan_guidance=3.0)
  no_codes = jnp.zeros((B, 0), jnp.int32)

  @jax.jit
  def both(params, text):
    prompts = with_inputs(batch, text=text)
    request = request_of(prompts)
    codes, latents = plain.sample(params, request, KEY, settings)

    def velocity(x, time, step):
      clock = jnp.full((B,), 1.0 - time)
      regions = (plain.experts.regions(prompts, no_codes, keep) for keep in (ALL, ~ALL))
      conditional, unconditional = (plain.model(params, region, x, clock)[1] for region in regions)
      return -(unconditional + scale * (conditional - unconditional))

    noise = lambda key: jax.random.normal(key, batch.encoded['latents'].shape[1:])
    start = rng.per_example(noise, KEY, 'noise', batch.example)
    times = flow_lib.time_grid(settings.steps, settings.shift)
    return codes, latents, flow_lib.integrate(velocity, start, times)

  codes, latents, expected = both(params, batch.inputs['text'])
  assert codes.shape == (B, 0)
  np.testing.assert_allclose(latents, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
  _, reversed_text, _ = both(params, batch.inputs['text'][:, ::-1])
  assert float(jnp.abs(latents - reversed_text).max()) > 1e-2


def test_the_data_are_images_of_words():
  config = _networks('debug').config
  assert open_source(config.data)[0].group == 'words'
  assert config.data == _networks('debug,vpe=false').config.data


def test_errors_name_the_field():
  for arg in ('tiny,vpe=no', 'tiny,chips=4', 'paper,chips=all', 'tiny,arch=single'):
    with pytest.raises(ValueError, match=arg.split(',')[1].split('=')[0]):
      config_file.get_config(arg)
  with pytest.raises(UserError, match="stage 'plan' learns to write visual prompts"):
    config = config_file.get_config('debug,vpe=false')
    systems.build(config.to_dict() | {'stages': ('plan', 'joint')})
