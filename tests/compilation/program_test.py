"""Traced model FLOPs against compiled programs, attention kernels, and the traffic of FSDP."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import c2i_continuous, c2i_discrete, t2i
from vpe_jax import rng, sharding, systems
from vpe_jax.compilation import hlo, program, traffic
from vpe_jax.contracts import Batch, System, visible
from vpe_jax.models import unified
from vpe_jax.ops.attention import chooser
from vpe_jax.ops.flops import matrix_flops
from vpe_jax.training import resume
from vpe_jax.training.model_flops import step_flops
from vpe_jax.training.state import first_state
from vpe_jax.training.step import make_train_step


def _system(arg: str, expert: dict, head: dict, **changes) -> System:
  config = t2i.get_config(arg)
  config.data.source = 'synthetic'
  config.update(changes)
  for name, sizes in (('ar', expert), ('dit', expert), ('head', head)):
    config.model[name].update(sizes)
  config.model.dual_path.encoder.update(width=64, mlp=128)
  return systems.build(config.to_dict())


@pytest.mark.parametrize(
  'arg, stage',
  [
    ('debug', 1),
    ('debug,arch=single,vpe=false', 0),
    pytest.param('debug', 0, marks=pytest.mark.exhaustive),
    pytest.param('debug,arch=single', 1, marks=pytest.mark.exhaustive),
  ],
)
def test_model_flops_equal_the_compiled_dots(arg, stage):
  """Without scans, recomputation, attention kernels and sharding, both count the same products."""
  system = _system(arg, {}, {'layers': 3}, unroll=True)
  state = jax.eval_shape(lambda: first_state(system.init(rng.run_key(0)), system.stages[stage]))
  step = make_train_step(system, system.stages[stage], system.config.optim)
  compiled = step.lower(state, {}, system.batch_spec(4).batch(True), rng.run_key(0)).compile()
  work = traffic.work_of(hlo.parse(compiled.as_text()), [0])
  assert not work.unknown_loops
  assert step_flops(system, system.stages[stage], 4).total == pytest.approx(work.flops, rel=0.03)


@pytest.mark.parametrize(
  'arg', ['debug', pytest.param('debug,vpe=false', marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize('config_file', [c2i_discrete, c2i_continuous])
def test_model_flops_of_class_to_image_equal_the_compiled_dots(config_file, arg):
  config = config_file.get_config(arg)
  config.unroll = True
  config.data.source = 'synthetic'
  system = systems.build(config.to_dict())
  stage = system.stages[0]
  state = jax.eval_shape(lambda: first_state(system.init(rng.run_key(0)), stage))
  step = make_train_step(system, stage, system.config.optim)
  compiled = step.lower(state, {}, system.batch_spec(4).batch(True), rng.run_key(0)).compile()
  work = traffic.work_of(hlo.parse(compiled.as_text()), [0])
  assert step_flops(system, stage, 4).total == pytest.approx(work.flops, rel=0.03)


def test_scans_and_recomputation_are_in_the_compiled_count():
  system = _system('debug', {'layers': 3}, {}, remat='full')
  stage = system.stages[0]
  state = jax.eval_shape(lambda: first_state(system.init(rng.run_key(0)), stage))
  step = make_train_step(system, stage, system.config.optim)
  compiled = step.lower(state, {}, system.batch_spec(4).batch(True), rng.run_key(0)).compile()
  work = traffic.work_of(hlo.parse(compiled.as_text()), [0])
  # The forward pass of the layers runs twice, except for products that the backward pass doesn't
  # read.
  assert 1.1 < work.flops / step_flops(system, stage, 4).total < 4 / 3


def test_attention_kernels_execute_visible_pairs(monkeypatch):
  """Two products forward and seven backward; full remat repeats those of the forward pass."""
  monkeypatch.setattr(chooser, 'device', lambda: ('tpu', 'TPU v5p'))
  system = _system('debug', {'layers': 3}, {'layers': 1}, attention='pallas_tpu')
  c, length = system.config.model, system.config.data.text_length
  text, codes = np.zeros((1, length), np.int32), np.zeros((1, c.visual_prompt_tokens), np.int32)
  lengths = np.array([length], np.int32)
  batch = Batch(np.zeros(1, np.int32), {'text': text, 'text_length': lengths})
  regions = system.experts.regions(batch, codes, np.ones(1, bool))
  visibility = unified.sequence_visibility(regions)
  keys_per_query = np.asarray(visible(visibility, visibility))[0].sum(1)
  tokens, patches = regions['ar'].ids.shape[1], c.image_tokens
  ar_pairs, dit_pairs = keys_per_query[:tokens].sum(), keys_per_query[tokens:].sum()
  flops_per_pair = lambda part: 4 * part.layers * part.heads * part.head_width
  plan = flops_per_pair(c.ar) * ar_pairs
  encoder = 4 * c.dual_path.encoder.layers * c.dual_path.encoder.width * patches**2
  head = flops_per_pair(c.head) * (ar_pairs + dit_pairs)
  joint = plan + flops_per_pair(c.dit) * dit_pairs + head + encoder
  for stage, forward in zip(system.stages, (plan, joint), strict=True):
    flops = step_flops(system, stage, 8, rng.run_key(0))
    assert program.kernel_flops(flops, 'attention') == 8 * 4.5 * forward
    assert program.kernel_flops(flops, 'full') == 8 * 5.5 * forward


def test_online_encoders_are_counted():
  config = t2i.get_config('debug')
  cached = systems.build(config.to_dict())
  config.data.encode = 'online'
  online = systems.build(config.to_dict())
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
  frozen = online.frozen_shapes()
  assert set(frozen) == set(online.frozen)
  plan, joint = (
    step_flops(online, stage, 1).total - step_flops(cached, stage, 1).total
    for stage in online.stages
  )
  for extra, used in ((plan, ['visual_prompt']), (joint, ['visual_prompt', 'latents'])):

    @jax.jit
    def encode(frozen, image, used=used):
      encoded = online.encode(frozen, {'image': image}, rng.run_key(0))
      return [encoded[name] for name in used]

    work = traffic.work_of(hlo.parse(encode.lower(frozen, image).compile().as_text()), [0])
    assert extra == pytest.approx(work.flops, rel=0.01)
  assert joint > plan > 0


@pytest.mark.parametrize('stage', [0, 1])
def test_fsdp_traffic_equals_the_formula(stage):
  """Every device receives the rest of each parameter, and its shard of every gradient.

  With n devices, P bytes of parameters that the stage runs and shards, and Q bytes of trainable
  parameters, in float32:
    all-gather   (n - 1) / n (P + P'), where P' is the part inside scans: the backward pass gathers
                 it again;
    reduction    (n - 1) / n Q, and once more for the all-reduce that this backend compiles.
  The head is small because the tokens of both experts pass through it, and the compiler gathers
  some of its weights once for each expert.
  """
  sizes = {'width': 64, 'heads': 4, 'kv_heads': 2, 'head_width': 16}
  expert, head = sizes | {'mlp': 256, 'layers': 3}, sizes | {'mlp': 128}
  system = _system('debug', expert, head, remat='full')
  mesh = sharding.make_mesh(system.config.mesh)
  lowered = program.lower(program.Job(system, stage, program.TRAIN, 8, mesh))
  work = traffic.work_of(hlo.parse(lowered.lowered.compile().as_text()), [0] * 8)
  state = resume.abstract_state(system.config, system, stage, mesh)
  gathered = reduced = 0.0
  for path, leaf in sharding.leaves_by_path(state['params']).items():
    if path not in lowered.trainable:  # in stage `plan` they don't run at all
      continue
    size = 4 * np.prod(leaf.shape) * 7 / 8
    reduced += 2 * size
    if leaf.sharding.shard_shape(leaf.shape) != leaf.shape:
      gathered += size * (2 if re.search('layers|blocks|encoder', path) else 1)
  collective_bytes = work.collective_bytes()
  assert 'reduce-scatter' not in collective_bytes
  assert collective_bytes['all-gather'] == pytest.approx(gathered, rel=0.05)
  assert collective_bytes['all-reduce'] == pytest.approx(reduced, rel=0.05)


@pytest.mark.parametrize('condition', unified.CONDITIONS)
def test_stage_render_runs_the_ar_expert_forward_only(condition):
  """The AR expert's backward pass would exceed the tolerance of 2 % by far."""
  config = t2i.get_config('debug,arch=external')
  config.data.source, config.unroll = 'synthetic', True
  config.model.condition = condition
  config.model.dual_path.encoder.layers = 1
  system = systems.build(config.to_dict())
  stage = system.stages[1]
  state = jax.eval_shape(lambda: first_state(system.init(rng.run_key(0)), stage))
  step = make_train_step(system, stage, system.config.optim)
  arguments = (state, {}, system.batch_spec(4).batch(True), rng.run_key(0))
  if condition == 'prefix':
    compiled = step.lower(*arguments).compile()
    flops = traffic.work_of(hlo.parse(compiled.as_text()), [0]).flops
  else:  # Compiling takes long, and compiled FLOPs differ little from traced ones.
    flops = matrix_flops(step, *arguments)
  model = step_flops(system, stage, 4).total
  assert 0.97 < flops / model < 1.02
  c, tokens = system.config.model, sum(span.length for span in system.layout.spans)
  backward = 4 * 4 * c.ar.layers * tokens * c.ar.width * (2 * c.ar.width + 3 * c.ar.mlp)
  assert backward > 0.04 * model
