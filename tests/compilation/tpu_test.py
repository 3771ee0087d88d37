"""The command, compiling for real TPU slices with libtpu; nothing here runs on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHRUNK = (
  '--config=configs/t2i.py:debug', '--stage=plan', '--config.dtype=bfloat16',
  '--config.remat=full', '--config.model.ar.layers=3', '--config.model.dit.layers=3',
)  # fmt: skip


def _compile(*arguments: str, cwd: str, timeout: int = 590) -> subprocess.CompletedProcess:
  ours = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
  }
  command = [sys.executable, '-m', 'vpe_jax.compile', *arguments]
  return subprocess.run(
    command, cwd=cwd, env=os.environ | ours, capture_output=True, text=True, timeout=timeout
  )


@pytest.fixture
def root(request) -> str:
  """The folder of the clone, where configs/ is."""
  return str(request.config.rootpath)


def test_a_shrunk_step_for_four_chips(tmp_path, root):
  file = tmp_path / 'fit.json'
  done = _compile(*SHRUNK, '--topology=v5litepod-4', f'--json={file}', cwd=root)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(file.read_text())
  assert (found['topology'], found['cloud_name'], found['chips']) == ('v5e:2x2', 'v5litepod-4', 4)
  assert 0 < found['hbm_fraction'] < 0.01 and found['fits']
  assert found['hbm_fraction'] == found['peak_bytes_per_chip'] / found['hbm_bytes_per_chip']
  assert found['collective_bytes'].keys() & {'all-gather', 'all-reduce'}
  # Recomputation and padding to 16 tokens: more than the model's, but of its order.
  assert 1 <= found['hlo_flops_per_step'] / found['model_flops_per_step'] < 2
  assert found['bound_by'] in ('compute', 'hbm', 'ici')
  assert found['step_time_bound_s'] == max(found['bound_s'].values()) > 0
  assert 0 < found['mfu_bound'] < 1
  assert 'v5e:2x2 (v5litepod-4): 4 chips' in done.stdout and 'bound: a step' in done.stdout


def test_what_would_be_in_vain_is_refused_before_compiling(tmp_path, root):
  (tmp_path / 'kept.json').write_text('kept')
  for arguments, message in (
    (('--topology=cpu:8', f'--json={tmp_path}/kept.json'), 'kept.json exists: name another file'),
    (('--topology=cpu:0',), 'virtual devices are from 1 to 4,096'),
    (('--write_header=',), '--write_header is missing'),
  ):
    done = _compile('--config=configs/t2i.py:debug', *arguments, cwd=root)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert done.stderr.count('Traceback') == 0
  assert (tmp_path / 'kept.json').read_text() == 'kept'


def test_two_slices_are_connected_by_the_axis_data(tmp_path, root):
  two = ('--topology=v5e:2x2', '--slices=2')
  refused = _compile(*SHRUNK, *two, cwd=root)
  assert refused.returncode == 2
  assert refused.stderr.strip().splitlines()[-1].startswith('error: 2 slices are connected by')
  file = tmp_path / 'fit.json'
  done = _compile(*SHRUNK, *two, '--mesh=data=2,fsdp=4', f'--json={file}', cwd=root)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(file.read_text())
  assert (found['chips'], found['slices']) == (8, 2)
  assert found['dcn_bytes'] > 0 and found['bound_s']['dcn'] > 0


def test_what_does_not_fit_is_said_with_its_buffers_and_cures(root):
  one = ('--topology=v5e:1x1', '--images_per_chip=65536', '--config.remat=none')
  done = _compile(*SHRUNK, *one, cwd=root)
  assert done.returncode == 0, done.stderr[-2000:]
  for part in ('DOES NOT FIT', 'Largest buffers', 'GB  ', '--config.remat=full', 'microbatches'):
    assert part in done.stdout
