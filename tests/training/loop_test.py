"""Tests of whole runs: resume, crashes, preemption, sharding, errors."""

import dataclasses
import functools
import json
import os
import signal
import sys
import time
import types

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from vpe_jax import front_door, sharding
from vpe_jax.checkpoints.store import Store
from vpe_jax.config import OPTIMIZERS
from vpe_jax.contracts import UserError
from vpe_jax.data import cache
from vpe_jax.training import encode, loop, optimizer, workdir
from vpe_jax.training.logging import RunLog


@pytest.fixture
def build(line_system, frozen):
  """Builds (config, system) with a frozen network on disk."""

  def make(**changes):
    system = line_system(**changes)
    system.frozen = frozen
    return system.config, system

  return make


def _records(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def _assert_equal(first, second):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


def test_run_writes_all_its_files(build, tmp_path, capsys):
  config, system = build()
  state = loop.train(config, system, str(tmp_path / 'run'))
  assert [int(state[n]) for n in ('stage', 'step', 'stage_step', 'examples_seen')] == [1, 6, 4, 48]
  records = _records(tmp_path / 'run')
  assert [record['step'] for record in records] == [1, 2, 3, 4, 5, 6]
  assert [record['stage'] for record in records] == ['head'] * 2 + ['all'] * 4
  assert [record['stage_step'] for record in records] == [1, 2, 1, 2, 3, 4]
  expected = {'loss', 'loss/tokens', 'lr', 'grad_norm', 'step_time', 'images_per_s', 'tokens_per_s'}
  assert all(expected <= record.keys() for record in records)
  assert (tmp_path / 'run' / 'curves.png').exists()
  output = capsys.readouterr().out
  for text in ('run: new', 'memory per device', 'frozen', 'first caption', 'head 1/2', 'ETA'):
    assert text in output, text


def test_waiting_for_data_is_recorded(build, tmp_path, monkeypatch):
  put_batch = sharding.put_batch

  def slowly(batch, mesh):
    time.sleep(0.3)
    return put_batch(batch, mesh)

  monkeypatch.setattr(sharding, 'put_batch', slowly)
  config, system = build(steps=(1, 8))
  loop.train(config, system, str(tmp_path))
  waits = [record['data_wait'] for record in _records(tmp_path)]
  assert all(0 <= wait <= 1 for wait in waits) and max(waits[3:]) > 0.3


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_resumed_run_equals_uninterrupted_run_bitwise(build, tmp_path, monkeypatch, name):
  """The run is stopped between the stages, then in the middle of the second."""
  monkeypatch.setattr(optimizer, 'MIN_FACTORED', 16)
  schedule = {'schedule': 'cosine', 'decay_steps': 5, 'mu_dtype': 'bfloat16'}
  optim = {'lr': 1e-2, 'warmup': 2} | (schedule if name == 'muon' else {})
  config, system = build(optim=optim | {'name': name, 'multipliers': 'head/kernel=0.5'})
  whole = loop.train(config, system, str(tmp_path / 'whole'))
  for steps in ((2, 0), (2, 2), (2, 4)):
    part = dataclasses.replace(config, steps=steps)
    resumed = loop.train(part, system, str(tmp_path / 'parts'), ('steps',))
  _assert_equal(whole, resumed)
  wholes, parts = _records(tmp_path / 'whole'), _records(tmp_path / 'parts')
  losses = lambda records: [(r['step'], r['loss'], r['grad_norm']) for r in records]
  assert losses(wholes) == losses(parts)


class _Crash(Exception):
  pass


@pytest.mark.parametrize('crash_step', [2, 3, 5])
def test_crash_loses_and_repeats_no_record(build, tmp_path, monkeypatch, crash_step):
  config, system = build()
  whole = loop.train(config, system, str(tmp_path / 'whole'))
  push = RunLog.push

  def crash(self, counters, metrics):
    push(self, counters, metrics)
    if counters['step'] == crash_step:
      raise _Crash

  monkeypatch.setattr(RunLog, 'push', crash)
  with pytest.raises(_Crash):
    loop.train(config, system, str(tmp_path / 'run'))
  monkeypatch.undo()
  with open(tmp_path / 'run' / 'metrics.jsonl', 'a', encoding='utf-8') as stream:
    stream.write('{"step": 4, "lo')  # a line that a kill cut off
  resumed = loop.train(config, system, str(tmp_path / 'run'))
  _assert_equal(whole, resumed)
  assert [record['step'] for record in _records(tmp_path / 'run')] == [1, 2, 3, 4, 5, 6]


def test_records_are_on_disk_before_their_checkpoint(build, tmp_path, monkeypatch):
  config, system = build()
  save, saves = Store.save, []

  def record_save(self, state, *arguments):
    saves.append((int(state['step']), [r['step'] for r in _records(tmp_path / 'run')]))
    return save(self, state, *arguments)

  monkeypatch.setattr(Store, 'save', record_save)
  loop.train(config, system, str(tmp_path / 'run'))
  assert [step for step, _ in saves] == [2, 4, 6]
  assert all(records == list(range(1, step + 1)) for step, records in saves)


def test_sigterm_saves_and_returns(build, tmp_path, monkeypatch, capsys):
  config, system = build(checkpoint={'every': 100})
  push = RunLog.push

  def terminate(self, counters, metrics):
    push(self, counters, metrics)
    if counters['step'] == 4:
      os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(RunLog, 'push', terminate)
  assert loop.train(config, system, str(tmp_path / 'run')) is None
  monkeypatch.undo()
  assert signal.getsignal(signal.SIGTERM) is before
  assert 'preempted: saved step 4' in capsys.readouterr().out
  assert [record['step'] for record in _records(tmp_path / 'run')] == [1, 2, 3, 4]
  resumed = loop.train(config, system, str(tmp_path / 'run'))
  assert 'resumes after step 4' in capsys.readouterr().out
  _assert_equal(loop.train(config, system, str(tmp_path / 'whole')), resumed)


def _own_images(folder, count):
  """The data section of a config for new images."""
  folder.mkdir(exist_ok=True)
  for number in range(count):
    Image.new('RGB', (8, 8), (number, 0, 0)).save(folder / f'{number:03d}.png')
    (folder / f'{number:03d}.txt').write_text(f'image {number}')
  return {'source': f'folder:{folder}', 'examples': 0}


def test_changed_data_are_refused_unless_allowed(build, tmp_path, capsys):
  data = _own_images(tmp_path / 'images', 12)
  config, system = build(data={**data, 'image_size': 8, 'text_length': 32})
  workdir = str(tmp_path / 'run')
  loop.train(config, system, workdir)
  os.utime(tmp_path / 'images' / '004.png', (1, 1))
  loop.train(config, system, workdir)
  (tmp_path / 'images' / '003.txt').write_text('rewritten')
  with pytest.raises(UserError, match='data changed .*captions: 12 .* now 12 .*') as error:
    loop.train(config, system, workdir)
  assert '--allow_change=data' in str(error.value) and 'images:' not in str(error.value)
  (tmp_path / 'images' / '005.png').unlink()
  with pytest.raises(UserError, match='images: 12 .*, now 11 '):
    loop.train(config, system, workdir, ('data.examples',))
  loop.train(config, system, workdir, ('data',))
  assert 'config change: images: 12' in capsys.readouterr().out


def test_own_data_have_held_out_losses(build, tmp_path, capsys):
  data = _own_images(tmp_path / 'images', 20) | {'image_size': 8, 'text_length': 32}
  config, system = build(data={**data, 'held_out': 0.4}, evals={'heldout': {'every': 6}})
  loop.train(config, system, str(tmp_path / 'run'))
  assert _records(tmp_path / 'run')[-1]['eval/tokens'] > 0
  config, system = build(data=data, evals={'heldout': {'every': 6}})
  loop.train(config, system, str(tmp_path / 'without'))
  assert 'data.held_out makes one' in capsys.readouterr().out


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_encoding_which_continues_later(
  drawing_system, tmp_path, monkeypatch, capsys, number
):
  monkeypatch.setenv('VPE_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(encode, 'CHUNK', 8)
  monkeypatch.setattr(encode, 'REPORT_EVERY', -1.0)
  monkeypatch.setattr(cache, 'write_cache', functools.partial(cache.write_cache, shard=16))
  system = drawing_system(data={'encode': 'cached'})
  say = encode._say

  def interrupt(text):
    say(text)
    if '40/70' in text:
      os.kill(os.getpid(), number)

  train = lambda: loop.train(system.config, system, str(tmp_path / 'run'))
  handlers = {
    signal.SIGTERM: lambda *_: sys.exit(front_door.TERMINATED),
    signal.SIGINT: signal.default_int_handler,  # Processes in the background ignore it.
  }
  before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
  try:
    with monkeypatch.context() as patch:
      patch.setattr(encode, '_say', interrupt)
      with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        train()
  finally:
    for one, handler in before.items():
      signal.signal(one, handler)
  assert '48/70' not in capsys.readouterr().out
  assert not list((tmp_path / 'cache').rglob('*.part*'))
  assert train() is not None
  lines = [line for line in capsys.readouterr().out.splitlines() if 'encoding images' in line]
  assert lines[0].startswith('encoding images: 40/70') and len(lines) == 5


def test_another_config_is_refused_unless_allowed(build, tmp_path, capsys):
  config, system = build()
  workdir = str(tmp_path / 'run')
  loop.train(config, system, workdir)
  optim = dataclasses.replace(config.optim, lr=0.5)
  log = dataclasses.replace(config.log, every=7)
  changed = dataclasses.replace(config, optim=optim, log=log, seed=1)
  with pytest.raises(UserError, match=r'optim\.lr was 0\.01, now 0\.5; seed was 0, now 1') as error:
    loop.train(changed, system, workdir)
  assert '--allow_change=optim.lr,seed' in str(error.value) and 'log.every' not in str(error.value)
  with pytest.raises(UserError, match='seed'):
    loop.train(changed, system, workdir, ('optim',))
  assert len(_records(tmp_path / 'run')) == 6  # nothing was overwritten
  loop.train(changed, system, workdir, ('optim', 'seed'))
  assert 'config change: log.every was 1, now 7' in capsys.readouterr().out


def test_finished_run_is_not_changed(build, tmp_path):
  config, system = build()
  workdir = tmp_path / 'run'
  first = loop.train(config, system, str(workdir))
  before = (workdir / 'metrics.jsonl').read_text()
  _assert_equal(first, loop.train(config, system, str(workdir)))
  assert (workdir / 'metrics.jsonl').read_text() == before


def test_eight_devices_match_one(build, tmp_path, monkeypatch):
  """The order of summation differs. In a longer run, losses differed by 4e-7 after 106 steps."""
  losses, shares, make_mesh = {}, {}, sharding.make_mesh
  for devices in (1, 8):
    few = jax.devices()[:devices]
    monkeypatch.setattr(sharding, 'make_mesh', lambda config, few=few: make_mesh(config, few))
    config, system = build(steps=(6, 20))
    state = loop.train(config, system, str(tmp_path / str(devices)))
    losses[devices] = [record['loss'] for record in _records(tmp_path / str(devices))]
    kernels = [state['params']['backbone']['kernel'], state['opt_state']['mu']['head']['kernel']]
    kernels.append(state['ema']['backbone']['kernel'])
    shares[devices] = [leaf.addressable_shards[0].data.nbytes / leaf.nbytes for leaf in kernels]
  assert shares == {1: [1.0] * 3, 8: [1 / 8] * 3}
  np.testing.assert_allclose(losses[8], losses[1], rtol=1e-5)


def test_batch_size_that_does_not_divide_is_refused_before_writing(build, tmp_path):
  config, system = build(batch_size=(12,))
  with pytest.raises(UserError, match='batch_size 12 does not divide over 8 batch shards'):
    loop.train(config, system, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_workdir_in_use_is_refused_before_loading(build, tmp_path, monkeypatch):
  config, system = build()
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(loop.frozen_lib, 'load', lambda *_: pytest.fail('loaded'))
  with workdir.locked(epath.Path(tmp_path / 'run')):
    with pytest.raises(UserError, match='run is in use by another process'):
      loop.train(config, system, '~/run')
  assert [path.name for path in (tmp_path / 'run').iterdir()] == [workdir.LOCK]


def test_misfitting_networks_are_refused_before_initialization(build, tmp_path, monkeypatch):
  config, system = build()
  system.encode = lambda frozen, inputs, rng: frozen['siglip']
  monkeypatch.setattr(system, 'init', lambda key: pytest.fail('initialised'))
  with pytest.raises(UserError, match='do not fit'):
    loop.train(config, system, str(tmp_path / 'run'))


def test_run_without_finite_gradients_stops(build, tmp_path):
  config, system = build(model={'weight': 3e38}, steps=(20, 1))
  with pytest.raises(UserError, match='not finite in 5 .*step 5.*optim.lr'):
    loop.train(config, system, str(tmp_path / 'run'))
  records = _records(tmp_path / 'run')
  assert [record['skipped'] for record in records] == [1.0] * 5
  assert records[-1]['loss'] is None


def test_each_stage_is_compiled_once(build, tmp_path):
  class Counting(type(build()[1])):
    """Counts how often its losses are traced."""

    traced = 0

    def losses(self, *args):
      self.traced += 1
      return super().losses(*args)

  config, plain = build(steps=(5, 5))
  system = Counting(config, plain.frozen)
  loop.train(config, system, str(tmp_path / 'run'))
  assert system.traced == 2 * len(system.stages)  # for its step and for its FLOPs


def test_each_stage_has_its_own_rate_ema_and_microbatches(build, tmp_path, capsys):
  optim = {'lr': (1e-2, 5e-3), 'warmup': 0, 'accumulate': (1, 2), 'ema': (0.0, 0.5)}
  config, system = build(optim=optim, batch_size=(16,))
  state = loop.train(config, system, str(tmp_path / 'run'))
  rates = [record['lr'] for record in _records(tmp_path / 'run')]
  np.testing.assert_allclose(rates, [1e-2] * 2 + [5e-3] * 4)
  # Microbatches don't change the result, and the first stage never has an EMA.
  uniform = optim | {'accumulate': 1, 'ema': 0.5}
  uniform_config, uniform_system = build(optim=uniform, batch_size=(16,))
  uniform_state = loop.train(uniform_config, uniform_system, str(tmp_path / 'uniform'))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
  jax.tree.map(close, state['ema'], uniform_state['ema'])
  output = capsys.readouterr().out
  assert 'stage head (1 of 2): 2 steps of 16 examples, adamw with learning rate 0.01' in output
  table = [line.split('  ')[-1] for line in output.splitlines() if line.startswith('  backbone')]
  assert table[:2] == ['initialized', 'initialized']
  heads = [line.split('  ')[-1] for line in output.splitlines() if line.startswith('  head ')]
  assert heads[:2] == ['initialized', 'stage head']


def test_resumed_run_is_the_origin_of_its_parameters(build, tmp_path, capsys):
  config, system = build(steps=(1, 2))
  loop.train(dataclasses.replace(config, steps=(1, 1)), system, str(tmp_path))
  capsys.readouterr()
  loop.train(config, system, str(tmp_path), ('steps',))
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('  backbone')]
  assert lines[0].endswith('this run, step 2')


def test_a_step_without_evaluators_does_not_wait_for_its_state():
  """Reading a counter of the state would: the devices would idle between steps."""
  asked = []
  evaluations = types.SimpleNamespace(due=lambda *args: asked.append(args) or [])
  watchers, unread = types.SimpleNamespace(evaluations=evaluations), None
  loop._evaluate(None, watchers, unread, None, {'stage': 1, 'step': 7}, False)
  assert asked == [(1, 7, False)]
