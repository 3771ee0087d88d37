"""Programs of a run are compiled before its first step, and only once."""

from __future__ import annotations

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.compilations import compilations
from tests.outcomes import refusal_of
from vpe_jax import devices, sharding
from vpe_jax.checkpoints.frozen import FrozenNetworks
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import intervals
from vpe_jax.evaluation.report import Report
from vpe_jax.training import loop, metrics, programs
from vpe_jax.training.evaluations import Evaluations
from vpe_jax.training.logging import RunLog
from vpe_jax.training.workdir import CACHE

EVALS = {'heldout': {'every': 2, 'batches': 1}, 'sample_grid': {'every': 2}}
EVALUATED = {'encode', 'evaluate', 'generate', 'compare'}


def test_all_is_compiled_before_the_first_step(drawing_system, tmp_path, monkeypatch, capsys):
  """Also the step of the second stage, and what its evaluators run."""
  system = drawing_system(evals=EVALS)
  push, counts = RunLog.push, []

  def count(self, counters, values):
    counts.append(len(observed.all))
    push(self, counters, values)

  monkeypatch.setattr(RunLog, 'push', count)
  with compilations() as observed:
    loop.train(system.config, system, str(tmp_path))
  before, after = set(observed.all[: counts[0]]), set(observed.all[counts[0] :])
  assert EVALUATED | {'step'} <= before and not (EVALUATED | {'step'}) & after
  records = metrics.read(tmp_path)
  for step in (2, 6):
    assert {'sample/own/latent_distance', 'eval/noise'} <= records[step - 1].keys()
  output = capsys.readouterr().out
  assert output.count('MiB in heldout') == output.count('MiB in sample_grid') == 2
  assert output.index('MiB in sample_grid') < output.index('head 1/2')


def test_a_sampler_that_fails_to_compile_ends_the_run_at_once(drawing_system, tmp_path):
  system = drawing_system(evals=EVALS)

  def generate(*_):
    raise UserError('no such guidance')

  system.generate = generate
  with pytest.raises(UserError, match='no such guidance'):
    loop.train(system.config, system, str(tmp_path))
  assert metrics.read(tmp_path) == []


def test_a_sampler_that_does_not_fit_beside_the_state_ends_the_run_at_once(
  drawing_system, tmp_path, monkeypatch
):
  """The compiler knows the memory of the device, but not that of the state."""
  system = drawing_system(evals=EVALS)

  def generate(params, frozen, request, rng, settings):
    largest = jnp.sort(jnp.arange(2**20) * request.example[0].astype(jnp.float32))
    generated = type(system).generate(system, params, frozen, request, rng, settings)
    return dataclasses.replace(generated, image=generated.image + largest[0])

  system.generate = generate
  monkeypatch.setattr(programs, 'device_memory', lambda: 2**21)
  message = r'memory in sample_grid.* 4\.0 MiB .*f32\[1048576\].*batch_size'
  with pytest.raises(UserError, match=message):
    loop.train(system.config, system, str(tmp_path))
  assert metrics.read(tmp_path) == []


@pytest.fixture
def use_cache(monkeypatch):
  """Makes a folder JAX's compilation cache, also for programs that compile in no time."""
  names = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs')
  before = {f'jax_{name}': getattr(jax.config, f'jax_{name}') for name in names}

  def use(folder):
    compilation_cache.reset_cache()
    jax.config.update('jax_compilation_cache_dir', None)
    devices.use_compilation_cache(folder)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)

  yield use
  compilation_cache.reset_cache()
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_resumed_run_compiles_nothing_anew(drawing_system, tmp_path, use_cache):
  use_cache(tmp_path / CACHE)
  parts = []
  for steps in ((2, 2), (2, 4)):
    system = drawing_system(evals=EVALS)
    config = dataclasses.replace(system.config, steps=steps)
    with compilations() as observed:
      loop.train(config, system, str(tmp_path), ('steps',))
    parts.append(observed)
  assert (tmp_path / CACHE).is_dir()
  large = EVALUATED | {'step'}
  assert large <= set(parts[0].all) and 'generate' not in parts[0].cached
  assert large <= set(parts[1].cached) and not large & (set(parts[1].all) - set(parts[1].cached))


def test_a_step_that_does_not_fit_ends_the_run_with_its_buffers(line_system, frozen, tmp_path):
  """Tebibytes, which the CPU's compiler accepts and no machine has."""

  class Large(type(line_system())):
    """A system whose losses need 32 TiB."""

    def losses(self, params, *rest):
      terms = super().losses(params, *rest)
      start = jax.lax.stop_gradient(params['head']['bias'][0])
      largest = jnp.sort(jnp.arange(2.0**43) * start)[-1]
      return terms | {'watched': dataclasses.replace(terms['watched'], sum=largest)}

  system = Large(line_system().config, frozen)
  message = refusal_of(loop.train, system.config, system, str(tmp_path))
  assert re.search(r'memory in step \d: .*f32\[8796093022208\].*accumulate', message), message


EXHAUSTED = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 2097152 bytes')


def _exhausted(*_, **__):
  raise EXHAUSTED


def test_programs_and_states_that_do_not_fit_are_named(line_system, tmp_path, monkeypatch):
  system = line_system()
  lowered = types.SimpleNamespace(compile=_exhausted)
  arguments = ('evaluator sample_grid', system.config, 0, lowered)
  message = refusal_of(programs._compile, *arguments)
  assert re.search('memory in evaluator sample_grid: .*2.0 MiB', message), message
  monkeypatch.setattr(loop.frozen_lib, 'load', _exhausted)
  message = refusal_of(loop.train, system.config, system, str(tmp_path))
  assert re.search('memory in the frozen networks and the state: .*2.0 MiB', message), message


def test_evaluators_that_do_not_fit_are_named(drawing_system, tmp_path, monkeypatch):
  system = drawing_system(evals=EVALS)
  monkeypatch.setattr(Evaluations, 'run', _exhausted)
  message = refusal_of(loop.train, system.config, system, str(tmp_path))
  assert re.search('memory in the evaluators .*sample_grid.*: .*2.0 MiB', message), message


def test_generators_of_evaluators_hold_no_parameters_between_runs(drawing_system, tmp_path):
  system, subjects = drawing_system(evals={}), []
  mesh = sharding.make_mesh(system.config.mesh)
  networks = FrozenNetworks({}, {}, None)
  evaluations = Evaluations(system.config, system, networks, mesh, tmp_path)

  def run(subject):
    subjects.append(subject)
    return Report({'a': intervals.mean(np.array([len(subject.generator.params)]))})

  evaluations._evaluators['sampler'] = types.SimpleNamespace(run=run)
  state = {'stage': 0, 'stage_step': 0, 'params': {'w': jnp.ones(3)}, 'ema': {}}
  for _ in range(2):
    assert evaluations.run(['sampler'], state, 1) == {'a': 1}
    assert evaluations._generator.params == {}
  first, second = (subject.generator for subject in subjects)
  assert first._generate is second._generate  # one compiled program
