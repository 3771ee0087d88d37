"""Tests of the start-up report."""

import jax
import jax.numpy as jnp
from etils import epath

from vpe_jax import sharding
from vpe_jax.config import MeshConfig, OptimConfig
from vpe_jax.training import report
from vpe_jax.training.programs import Program, StagePrograms


def test_parameter_table_has_a_row_for_each_group(line_system):
  system = line_system()
  mesh = sharding.make_mesh(MeshConfig())
  abstract = jax.eval_shape(system.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    abstract,
    sharding.param_shardings(abstract, system.logical_axes, mesh, 'fsdp'),
  )
  networks = report.Networks(system.networks(), {'encoder': 'assets:x'})
  origins = {'backbone/kernel': 'a (ema)', 'head/kernel': 'b (raw)', 'head/bias': 'random'}
  optim = OptimConfig(lr=0.25, multipliers='head/bias=2')
  text = report.parameters_text(params, networks, system.stages[0], optim, origins)
  header, backbone, head, encoder = [line.split() for line in text.splitlines()]
  assert text.splitlines()[1].endswith('  a (ema)')
  assert text.splitlines()[2].endswith('  b (raw) 96%, random 4%')
  assert header[:3] == ['group', 'parameters', 'state']
  assert backbone[:5] == ['backbone', '384', 'frozen', '-', 'float32'] and 'fsdp' in text
  assert head[:3] == ['head', '800', 'trains']
  assert head[3:8] == ['0.25', '96%,', '0.5', '4%', 'float32']
  assert encoder[:3] == ['encoder', '3,072', 'frozen'] and encoder[-1] == 'assets:x'


def test_every_parameter_is_listed_in_the_workdir(tmp_path):
  mesh = sharding.make_mesh(MeshConfig())
  sharded = jax.device_put(jnp.ones((16, 8)), jax.NamedSharding(mesh, jax.P('fsdp')))
  report.write_parameters(epath.Path(tmp_path), {'head': {'kernel': sharded}, 'bias': jnp.ones(3)})
  text = (tmp_path / report.PARAMETERS_FILE).read_text()
  assert 'head/kernel' in text and '(16, 8)' in text and "('fsdp',)" in text
  assert 'Total: 131 -- 524 bytes' in text


def _program(name, run, *shapes):
  lowered = jax.jit(run).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
  return Program(name, lowered, lowered.compile())


def test_memory_line_has_the_step_and_the_evaluators():
  """While an evaluator runs, the step's arguments are in memory, too."""
  step = _program('step', lambda x: (x @ x).sum(), (1024, 1024))
  grid = _program('sample_grid', lambda x: jnp.outer(x, x), (2048,))
  text = report.memory_text(StagePrograms(step, (grid,)))
  assert 'memory per device: ' in text and 'frozen networks and batch 4.0 MiB,' in text
  assert '; 20.0 MiB in sample_grid' in text
  step.compiled.memory_analysis = lambda: None
  assert 'does not report' in report.memory_text(StagePrograms(step, ()))


def test_sample_line_has_shapes_and_caption(line_system):
  batch = line_system().batch(4)
  text = report.sample_text(batch, 'a red fox')
  assert 'image [4, 8, 8, 3] uint8' in text and 'text [4, 32] int32' in text
  assert "'a red fox'" in text


def test_stage_lines_give_steps_rate_ema_and_losses(line_system):
  schedule = {'schedule': ('constant', 'cosine'), 'lr_end': 1e-4}
  system = line_system(optim={'lr': (1e-2, 5e-3), 'warmup': 2, 'ema': 0.99} | schedule)
  first, second = (
    report.stage_text(stage, system.config, index).splitlines()
    for index, stage in enumerate(system.stages)
  )
  for part in ('stage head (1 of 2)', '2 steps of 8', 'adamw', 'rate 0.01 after 2', 'no EMA'):
    assert part in first[0]
  for part in ('4 steps of 8', 'rate 0.005 after', 'EMA decay 0.99', 'cosine to 0.0001 at step 4'):
    assert part in second[0]
  assert first[1] == '  losses: tokens x 1; logged only: watched'
  assert second[1] == '  losses: tokens x 1, noise x rising; logged only: watched'


def test_origin_is_the_last_stage_that_trained_a_parameter(line_system):
  initial = {'backbone/kernel': 'a', 'head/kernel': 'b', 'head/bias': 'random'}
  stages = line_system().stages
  assert report.origins_after((), initial) == initial
  after = report.origins_after(stages[:1], initial)
  assert after == {'backbone/kernel': 'a', 'head/kernel': 'stage head', 'head/bias': 'stage head'}
  assert set(report.origins_after(stages, initial).values()) == {'stage all'}
