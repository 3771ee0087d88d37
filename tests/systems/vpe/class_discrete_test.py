"""LlamaGen with a visual prompt: sequences, masks, losses, and sampling with a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import c2i_discrete as config_file
from tests.small_systems import encoded_examples, redrawn, request_of, with_encoded, with_inputs
from vpe_jax import rng, sharding, systems
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.compilation import program
from vpe_jax.config import MeshConfig, to_dict
from vpe_jax.contracts import Batch, UserError
from vpe_jax.evaluation.heldout import make_eval_step
from vpe_jax.ops.flops import matrix_flops
from vpe_jax.sampling.guidance import UNGUIDED
from vpe_jax.systems.vpe import llamagen_sampler
from vpe_jax.systems.vpe.class_discrete import Sampling
from vpe_jax.training import encode

KEY = rng.run_key(0)
CODES, PLAN_CODES, CLASSES = 24, 16, 9


def _system(arg: str = 'debug', **model):
  """A small system on synthetic codes: 4 x 4 of the image, 3 x 3 of the visual prompt."""
  config = config_file.get_config(arg)
  if not arg.startswith('paper'):
    config.data.update(source='synthetic', image_size=16)
    config.model.image = {'codes': CODES, 'patch': 1}
    config.model.visual_prompt = {'codes': PLAN_CODES, 'siglip': {'image_size': 24, 'patch': 8}}
  config.model.update(model)
  return systems.build(config.to_dict())


@pytest.fixture(scope='module')
def system():
  return _system()


@pytest.fixture(scope='module')
def params(system):
  """Fresh parameters with noise on each, so that no map is zero."""
  return redrawn(jax.jit(system.init)(KEY), 0.2)


def _batch(system, B: int = 4) -> Batch:
  classes = np.random.default_rng(0).integers(0, CLASSES, (B, 1))
  return with_inputs(encoded_examples(system, B), text=jnp.asarray(classes, jnp.int32))


def _abstract(arg: str):
  return jax.eval_shape(_system(arg).init, KEY)


def _total(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_presets_build_one_module_tree():
  trees = [set(sharding.leaves_by_path(_abstract(arg))) for arg in ('debug', 'tiny', 'paper')]
  assert trees[0] == trees[1] == trees[2]
  assert trees[0] - set(sharding.leaves_by_path(_abstract('paper,vpe=false'))) == {
    'embed/prefix',
    'embed/pad',
  }


def test_parameter_counts_and_lengths_are_the_papers():
  """reference: 731.48M in the body, 1,001 classes, twice 131,072 and twice 16,384 codes."""
  without_prompt, with_prompt = _abstract('paper,vpe=false'), _abstract('paper')
  assert abs(_total(without_prompt) - 1_068.3e6) < 0.1e6
  assert abs(_total(with_prompt) - _total(without_prompt) - 41.9e6) < 0.1e6
  for arg, length in (('paper', 1221), ('paper,vpe=false', 1025)):
    system = _system(arg)
    batch = system.batch_spec(2).batch(cached=True)
    x = jax.eval_shape(
      lambda p, b, s=system: s.model.inputs(
        p,
        b.inputs['text'][:, 0],
        b.encoded['latents'].reshape(2, -1),
        b.encoded.get('visual_prompt'),
      ),
      _abstract(arg),
      batch,
    )
    # The last code is predicted and never fed.
    assert x.shape == (2, length - 1, 1280) and system.tokens(system.stages[0]) == length - 1
  assert system.model.config.codes == 131_072


def test_paper_shards_evenly():
  system = _system('paper')
  mesh = sharding.make_mesh(MeshConfig())
  params = _abstract('paper')
  shardings = sharding.param_shardings(params, system.logical_axes, mesh, 'fsdp')
  sharding.check_sharded_enough(params, shardings)
  assert not system.stages[0].ema and _system('tiny').stages[0].ema


def test_visual_prompt_and_image_share_one_position_grid():
  """Cell (7, 7) of 14 x 14 has the position of (16, 16) of 32 x 32; the class isn't rotated."""
  model = _system('paper').model
  stream = model.stream(jnp.zeros((1, 1221, 1)))
  cos, sin = (np.asarray(table[0, :, 0]) for table in stream.rotation)
  plan, image = 1 + 7 * 14 + 7, 1 + 196 + 16 * 32 + 16
  np.testing.assert_allclose(cos[plan], cos[image], atol=1e-6)
  np.testing.assert_allclose(sin[plan], sin[image], atol=1e-6)
  assert np.abs(sin[plan + 1] - sin[image + 1]).max() > 0.1
  assert (cos[0] == 1).all() and (sin[0] == 0).all()
  # Grid rows rotate the first half of the pairs, columns the second.
  assert (sin[1 + 7, :16] == 0).all() and (sin[1 + 7, 16:] != 0).any()


def test_positions_along_a_line():
  model = _system(positions='line').model
  cos, _ = model.stream(jnp.zeros((1, 26, 1))).rotation
  # Width 16: the first pair rotates by one radian a position.
  np.testing.assert_allclose(cos[0, :, 0, 0], np.cos(np.arange(26)), atol=1e-5)


@pytest.mark.parametrize('arg', ['debug', 'debug,vpe=false'])
def test_losses_and_counts(arg):
  system = _system(arg)
  batch, stage = _batch(system), system.stages[0]
  run = jax.jit(lambda p, b: system.losses(p, {}, b, KEY, jnp.int32(3), stage))
  terms, counts = run(jax.jit(system.init)(KEY), batch), system.counts(batch, KEY, 3, stage)
  assert {name: float(t.count) for name, t in terms.items()} == {
    name: float(count) for name, count in counts.items()
  }
  assert set(terms) == set(stage.losses)
  # A fresh head is uniform over the joint vocabulary.
  vocabulary = CODES + PLAN_CODES if system.codes else CODES
  nats = float(terms['next_token'].sum / terms['next_token'].count)
  assert nats == pytest.approx(np.log(vocabulary), rel=1e-5)
  assert {name for name, term in terms.items() if term.weight != 0.0} == {'next_token'}
  if system.codes:
    assert terms['next_token'].sum == pytest.approx(terms['plan'].sum + terms['image'].sum)
    assert float(counts['next_token']) == float(counts['plan'] + counts['image'])
    assert float(counts['image']) == 4 * 16


def _masks(system, step: int, examples: int = 512) -> np.ndarray:
  """The masks of many examples at a step."""
  batch = dataclasses.replace(_batch(system, 1), example=jnp.arange(examples, dtype=jnp.int32))
  return np.asarray(system._masked(batch, KEY, step))


def test_masks_follow_the_schedule(system):
  """reference: Eq. 2 at s/S = 0, 1/4, 1/2, 3/4, 1."""
  total = system.config.steps[0]
  expected = [0.9440, 0.8817, 0.5, 0.1183, 0.0560]
  shares = [_masks(system, total * quarter // 4).mean() for quarter in range(5)]
  np.testing.assert_allclose(shares, expected, atol=0.03)
  half = _masks(system, total // 2)
  assert 0 < half.any(1).mean() and not half.all(1).any()
  by_sample = _masks(_system(mask_by='sample'), total // 2)
  assert (by_sample.all(1) == by_sample.any(1)).all() and abs(by_sample.mean() - 0.5) < 0.1
  assert not _masks(_system(vp_schedule='off'), 0).any()
  constant = _system(vp_schedule='constant', mask_start=0.25)
  assert (_masks(constant, 0) == _masks(constant, total)).all()
  assert abs(_masks(constant, total).mean() - 0.25) < 0.03
  linear = _masks(_system(vp_schedule='linear'), total // 4).mean()
  assert abs(linear - (0.75 * 0.95 + 0.25 * 0.05)) < 0.03


def test_masks_depend_on_the_example_and_not_its_batch(system):
  batch = _batch(system)
  reversed_batch = jax.tree.map(lambda leaf: leaf[::-1], batch)
  ours, theirs = (np.asarray(system._masked(b, KEY, 6)) for b in (batch, reversed_batch))
  np.testing.assert_array_equal(ours, theirs[::-1])
  assert (ours[0] != ours[1]).any()


def test_a_masked_code_is_neither_an_input_nor_a_target(system, params):
  """Other codes at masked positions change nothing; other codes at visible positions do."""
  batch, stage = _batch(system), system.stages[0]
  step = system.config.steps[0] // 2
  masked = system._masked(batch, KEY, step)
  run = jax.jit(lambda codes: _sums(system, params, batch, codes, stage, step))
  codes = batch.encoded['visual_prompt']
  changed_codes = (codes + 1) % PLAN_CODES
  expected = run(codes)
  masked_changed, all_changed = run(jnp.where(masked, changed_codes, codes)), run(changed_codes)
  assert masked.any() and not masked.all()
  for name in ('plan', 'image'):
    np.testing.assert_allclose(masked_changed[name], expected[name], rtol=1e-6)
    assert abs(all_changed[name] - expected[name]) > 1e-3


def _sums(system, params, batch, codes, stage, step):
  batch = with_encoded(batch, visual_prompt=codes)
  return {n: t.sum for n, t in system.losses(params, {}, batch, KEY, step, stage).items()}


def test_losses_equal_the_cross_entropy_of_all_logits(system, params):
  """Targets `s_1 .. s_P z_1 .. z_N` in the joint vocabulary; visual prompt weighed 1 - mask."""
  batch, stage, step = _batch(system), system.stages[0], 5
  masked = system._masked(batch, KEY, step)
  plan, codes = batch.encoded['visual_prompt'], batch.encoded['latents'].reshape(4, -1)
  classes = system._classes(batch, KEY)
  logits = jax.jit(system.model)(params, classes, codes, plan, masked)
  targets = jnp.concatenate([plan + CODES, codes], 1)
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
  sums = jax.jit(lambda codes: _sums(system, params, batch, codes, stage, step))(plan)
  np.testing.assert_allclose(sums['plan'], -jnp.sum(log_probs[:, :9] * ~masked), rtol=1e-4)
  np.testing.assert_allclose(sums['image'], -jnp.sum(log_probs[:, 9:]), rtol=1e-4)


RATES = {'token_dropout': 0.1, 'residual_dropout': 0.2, 'mlp_dropout': 0.3}


def _gradient(system, params, batch, stage):
  total = lambda p: system.losses(p, {}, batch, KEY, 4, stage)['next_token'].sum
  return jax.jit(jax.grad(total))(params)


@pytest.mark.parametrize('rates', [{}, RATES])
def test_microbatches_unrolled_layers_and_chunks_change_no_gradient(params, rates):
  """Nor does the order of a batch: dropout depends on the example and on the layer."""
  system = _system(**rates)
  batch, stage = _batch(system), system.stages[0]
  whole = _gradient(system, params, batch, stage)
  halves = [jax.tree.map(lambda leaf, i=i: leaf[i::2][::-1], batch) for i in range(2)]
  accumulated = jax.tree.map(jnp.add, *(_gradient(system, params, half, stage) for half in halves))
  changed = to_dict(system.config) | {'unroll': True, 'remat': 'full'}
  changed['model'] = {**changed['model'], 'logits_chunk': 5}
  unrolled = _gradient(systems.build(changed), params, batch, stage)
  for tree in (accumulated, unrolled):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), whole, tree)


@pytest.fixture(scope='module')
def dropping():
  """The small system with dropout everywhere."""
  return _system(**RATES)


@pytest.mark.parametrize('rates', [{}, RATES])
def test_dropout_differs_between_examples(params, rates):
  """Other example numbers get other dropout, where nothing else is random."""
  system = _system(drop=0.0, vp_schedule='off', **rates)
  batch, stage = _batch(system), system.stages[0]
  loss = jax.jit(lambda b: system.losses(params, {}, b, KEY, 4, stage)['image'].sum)
  later = dataclasses.replace(batch, example=batch.example + 4)
  assert (abs(loss(batch) - loss(later)) > 0.1) == bool(rates)


def test_nothing_is_dropped_at_rate_0_or_in_evaluation(system, dropping, params):
  """Gradients and losses are equal to the bit; dropout in training costs no matrix FLOP."""
  batch, stage = _batch(system), system.stages[0]
  evaluating = dataclasses.replace(stage, training=False)
  ours = _gradient(system, params, batch, stage)
  jax.tree.map(np.testing.assert_array_equal, ours, _gradient(dropping, params, batch, evaluating))
  step, key = jnp.int32(4), rng.run_key(1)
  losses = [make_eval_step(s, stage)(params, {}, batch, key, step) for s in (system, dropping)]
  jax.tree.map(np.testing.assert_array_equal, *losses)
  loss = lambda s: jax.grad(lambda p: s.losses(p, {}, batch, KEY, 4, stage)['next_token'].sum)
  assert matrix_flops(loss(dropping), params) == matrix_flops(loss(system), params)


def test_nothing_is_dropped_in_sampling(system, dropping, params):
  """Neither code by code with a cache, nor over whole sequences."""
  batch = _batch(system)
  settings = Sampling(guidance=2.0)
  run = lambda s: jax.jit(
    lambda p, b: (
      llamagen_sampler.sample(s.model, settings, p, request_of(b), KEY),
      llamagen_sampler.plan_likelihood(s.model, p, b),
      s.model(p, *_model_inputs(b)),
    )
  )(params, batch)
  jax.tree.map(np.testing.assert_array_equal, run(system), run(dropping))


def _model_inputs(batch: Batch):
  """Classes, codes and visual prompts: the arguments of the network."""
  codes = batch.encoded['latents'].reshape(4, -1)
  return batch.inputs['text'][:, 0], codes, batch.encoded['visual_prompt']


def _uncached(system, params, classes, plan, codes):
  """Logits of both blocks without a cache, each over the vocabulary of its block."""
  logits = jax.jit(system.model)(params, classes, codes, plan)
  return logits[:, :9, CODES:], logits[:, 9:, :CODES]


@pytest.mark.parametrize('prepared', [False, True])
def test_cached_logits_equal_uncached(system, params, prepared):
  batch = _batch(system)
  weights = system.prepare(params, 'cpu') if prepared else params
  x = system.model.inputs(params, *_model_inputs(batch))

  @jax.jit
  def one_by_one(weights):
    prefix = llamagen_sampler._start(system.model, weights, batch, UNGUIDED.branches)

    def step(prefix, at):
      token = jax.lax.dynamic_slice_in_dim(x, at, 1, 1)
      return llamagen_sampler._feed(system.model, weights, token, prefix, at), prefix.state

    last, hidden = jax.lax.scan(step, prefix, jnp.arange(1, x.shape[1]))
    hidden = jnp.concatenate([hidden[:, :, 0], last.state[None, :, 0]]).swapaxes(0, 1)
    return system.model.logits(weights, hidden)

  expected = jax.jit(system.model)(params, *_model_inputs(batch))
  np.testing.assert_allclose(one_by_one(weights), expected, atol=1e-4)


@pytest.mark.parametrize('scales', [(1.0, 1.0), (3.0, 2.0)])
def test_greedy_codes_are_the_likeliest_of_their_block(system, params, scales):
  """Each is the argmax of the uncached guided logits over the vocabulary of its block."""
  batch = _batch(system)
  settings = Sampling(temperature=0.0, guidance=scales[0], plan_guidance=scales[1])
  sample = jax.jit(lambda p, r: llamagen_sampler.sample(system.model, settings, p, r, KEY))
  encoded, codes = sample(params, request_of(batch))
  plan = encoded['visual_prompt']
  assert plan.shape == (4, 9) and codes.shape == (4, 16)
  assert int(plan.max()) < PLAN_CODES and int(codes.max()) < CODES
  conditional = _uncached(system, params, batch.inputs['text'][:, 0], plan, codes)
  unconditional = _uncached(system, params, jnp.full((4,), CLASSES), plan, codes)
  for sampled, cond, uncond, scale in zip(
    (plan, codes), conditional, unconditional, scales[::-1], strict=True
  ):
    guided = uncond + scale * (cond - uncond)
    chosen = jnp.take_along_axis(guided, sampled[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, guided.max(-1), rtol=1e-4, atol=1e-4)
  # The same visual prompt, passed as input, is followed by the same image.
  resampled = sample(params, with_encoded(request_of(batch), visual_prompt=plan))
  np.testing.assert_array_equal(resampled[1], codes)
  np.testing.assert_array_equal(resampled[0]['visual_prompt'], plan)


def test_samples_do_not_depend_on_their_batch(system, params):
  settings = Sampling(guidance=2.0, min_p=0.0)
  sample = jax.jit(lambda r: llamagen_sampler.sample(system.model, settings, params, r, KEY))
  request = request_of(_batch(system))
  samples = sample(request)
  reversed_samples = sample(jax.tree.map(lambda leaf: leaf[::-1], request))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), samples, reversed_samples)
  other_examples = sample(dataclasses.replace(request, example=request.example + 7))
  assert (other_examples[1] != samples[1]).any()


def test_without_a_visual_prompt_only_image_codes_are_sampled():
  system = _system('debug,vpe=false')
  params = jax.jit(system.init)(KEY)
  settings = Sampling(guidance=1.0, plan_guidance=3.0)
  sample = jax.jit(lambda p, r: llamagen_sampler.sample(system.model, settings, p, r, KEY))
  encoded, codes = sample(params, request_of(_batch(system)))
  assert not encoded and codes.shape == (4, 16)
  assert set(system.batch_spec(4).encoded) == {'latents'}


@pytest.mark.parametrize('kind', program.KINDS)
def test_both_programs_lower_for_a_mesh(system, kind):
  values = to_dict(system.config)
  values['data'] |= {'source': 'openmoji'}  # with codecs
  job = program.Job(systems.build(values), 0, kind, 8, sharding.make_mesh(MeshConfig()))
  lowered = program.lower(job)
  assert lowered.parameters[0] == lowered.parameters[1] == _total(_abstract('debug'))
  # Sampling computes each token of the sequence once; training all but the last, three times.
  assert lowered.flops > 8 * sum(2 * leaf.size for leaf in jax.tree.leaves(_abstract('debug')))


def test_classes_are_dropped_at_the_configured_rate(system):
  batch = dataclasses.replace(_batch(system, 1), example=jnp.arange(4096, dtype=jnp.int32))
  share = lambda drop: float(jnp.mean(_system(drop=drop)._classes(batch, KEY) == CLASSES))
  assert abs(share(0.1) - 0.1) < 0.02 and share(0.0) == 0.0 and share(1.0) == 1.0


def test_synthetic_codes_cover_both_vocabularies(system):
  frozen = frozen_lib.FrozenNetworks({}, {}, system.encode)
  data = encode.open_training_data(system.config, system, frozen, None)
  with data.batches(0, 64) as batches:
    batch = next(batches)
  codes, latents = batch.encoded['visual_prompt'], batch.encoded['latents']
  assert codes.shape == (64, 9) and latents.shape == (64, 4, 4)
  assert codes.max() == PLAN_CODES - 1 and latents.max() == CODES - 1
  assert latents.dtype == np.int32


def test_the_tokenizer_must_match_the_classes_of_the_model():
  config = config_file.get_config('debug')
  config.data.tokenizer = 'classes:10'
  system = systems.build(config.to_dict())
  with pytest.raises(UserError, match='has 10 tokens, but model.classes is 9'):
    encode.open_training_data(system.config, system, frozen_lib.FrozenNetworks({}, {}, None), None)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'drop': 1.5}, "'model.drop' is 1.5"),
    ({'mlp_dropout': 1.0}, "'model.mlp_dropout' is 1.0: it must be at least 0 and below 1"),
    ({'vp_schedule': 'cosine'}, "'model.vp_schedule' is 'cosine': it must be one of sigmoid, line"),
    ({'mask_by': 'row'}, "'model.mask_by' is 'row'"),
    ({'positions': 'spiral'}, "'model.positions' is 'spiral'"),
    ({'classes': 0}, "'model.classes' is 0"),
  ],
)
def test_errors_name_the_field(change, message):
  with pytest.raises(UserError, match=message):
    _system(**change)


def test_errors_name_options_and_stages():
  for arg in ('tiny,vpe=yes', 'tiny,data=imagenet', 'paper,data=cifar10'):
    with pytest.raises(ValueError, match=arg.split(',')[1].split('=')[0]):
      config_file.get_config(arg)
  assert config_file.get_config('tiny,data=cifar10').model.classes == 10
  values = config_file.get_config('debug').to_dict()
  with pytest.raises(UserError, match="no stage 'joint'"):
    systems.build(values | {'stages': ('joint',)})
  with pytest.raises(UserError, match='a class is one token'):
    systems.build(values | {'data': {**values['data'], 'text_length': 4}})
