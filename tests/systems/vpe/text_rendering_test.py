"""Text rendering: sizes of the paper, and Show-o2's row without visual prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import text_rendering as config_file
from tests.small_systems import encoded_examples, request_of, with_inputs
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
  """With the networks that a run on its own data reads."""
  return systems.build(config_file.get_config(arg).to_dict())


@pytest.fixture(scope='module')
def plain():
  return _system('debug,vpe=false')


@pytest.fixture(scope='module')
def params(plain):
  """Drawn on the host, so that nothing is zero or the identity and nothing is compiled for it."""
  draw = np.random.default_rng(1)
  normal = lambda leaf: jnp.asarray(0.15 * draw.standard_normal(leaf.shape), jnp.float32)
  one = lambda path: float('scale' in jax.tree_util.keystr(path))
  shapes = jax.eval_shape(plain.init, KEY)
  return jax.tree_util.tree_map_with_path(lambda path, leaf: one(path) + normal(leaf), shapes)


def _tree(arg: str):
  return leaves_by_path(jax.eval_shape(_system(arg).init, KEY))


# Tokens of the row as App. D draws it, of which the tail [eoi] [eos] is left out.
_PLAN = [('bot', 1), ('codes', 576), ('eot', 1)]
_ROWS = {
  'paper': (1856, [('bos', 1), ('text', 249), *_PLAN]),
  'paper,vpe=false': (1280, [('bos', 1), ('text', 251)]),
}


@pytest.mark.parametrize('arg', _ROWS)
def test_rows_of_the_paper(arg):
  length, told = _ROWS[arg]
  spans = [(span.name, span.length) for span in _system(arg).layout.spans]
  assert spans == [*told, ('boi', 1), ('time', 1), ('latents', 1024)]
  tail = 2
  assert sum(count for _, count in spans) + tail == length


def test_totals_of_the_paper():
  """reference: Show-o2 is 2,830.8M; 16,384 tied rows and two more make it 2,855.9M."""
  totals = [sum(leaf.size for leaf in _tree(arg).values()) for arg in _ROWS]
  assert totals == [2_830_777_056 + (16_384 + 2) * 1536, 2_830_777_056]


def test_recipe_of_the_paper():
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
  spread = _system('paper,vpe=false,chips=96').config
  assert (spread.batch_size, spread.steps, spread.optim.lr) == ((96 * 12,), (25_000,), 2e-4)


@pytest.mark.parametrize('preset', ['debug', 'tiny', 'paper'])
def test_the_visual_prompt_adds_its_rows_alone(preset):
  plain, planned = _tree(f'{preset},vpe=false'), _tree(preset)
  assert planned.keys() - plain.keys() == {'embed/codes'} and plain.keys() < planned.keys()
  assert all(leaf.shape == planned[path].shape for path, leaf in plain.items())


def test_only_what_is_used_is_loaded():
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


def test_pictures_are_drawn_along_the_whole_rows_velocity(plain, params):
  """Guided: the cached prefix `[bos] text [boi]` and the null row are those of training."""
  batch, scale = encoded_examples(plain, B), 2.0
  settings = Sampling(steps=2, guidance=scale, plan_guidance=3.0)
  no_codes = jnp.zeros((B, 0), jnp.int32)

  @jax.jit
  def both(params, text):
    told = with_inputs(batch, text=text)
    request = request_of(told)
    codes, latents = plain.sample(params, request, KEY, settings)

    def velocity(x, time, step):
      clock = jnp.full((B,), 1.0 - time)
      rows = (plain.experts.regions(told, no_codes, keep) for keep in (ALL, ~ALL))
      flow, null = (plain.model(params, row, x, clock)[1] for row in rows)
      return -(null + scale * (flow - null))

    noise = lambda key: jax.random.normal(key, batch.encoded['latents'].shape[1:])
    start = rng.per_example(noise, KEY, 'noise', batch.example)
    times = flow_lib.time_grid(settings.steps, settings.shift)
    return codes, latents, flow_lib.integrate(velocity, start, times)

  codes, latents, wanted = both(params, batch.inputs['text'])
  assert codes.shape == (B, 0)
  np.testing.assert_allclose(latents, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
  _, others, _ = both(params, batch.inputs['text'][:, ::-1])
  assert float(jnp.abs(latents - others).max()) > 1e-2


def test_words_are_what_is_drawn():
  config = _networks('debug').config
  assert open_source(config.data)[0].group == 'words'
  assert config.data == _networks('debug,vpe=false').config.data


def test_mistakes_are_named():
  for arg in ('tiny,vpe=no', 'tiny,chips=4', 'paper,chips=all', 'tiny,arch=single'):
    with pytest.raises(ValueError, match=arg.split(',')[1].split('=')[0]):
      config_file.get_config(arg)
  with pytest.raises(UserError, match="stage 'plan' learns to write visual prompts"):
    config = config_file.get_config('debug,vpe=false')
    systems.build(config.to_dict() | {'stages': ('plan', 'joint')})
