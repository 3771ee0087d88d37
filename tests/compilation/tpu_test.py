"""Tests of the command vpe_jax.compile with libtpu; nothing runs on a TPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SMALL = (
  '--config=configs/t2i.py:debug', '--stage=plan', '--config.dtype=bfloat16',
  '--config.remat=full', '--config.model.ar.layers=3', '--config.model.dit.layers=3',
)  # fmt: skip


def _compile(*arguments: str, cwd: str, timeout: int = 590) -> subprocess.CompletedProcess:
  variables = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
  }
  command = [sys.executable, '-m', 'vpe_jax.compile', *arguments]
  return subprocess.run(
    command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=timeout
  )


@pytest.fixture
def root(request) -> str:
  """The folder of the repository, which contains configs/."""
  return str(request.config.rootpath)


def test_small_step_for_four_chips(tmp_path, root):
  file = tmp_path / 'fit.json'
  process = _compile(*SMALL, '--topology=v5litepod-4', f'--json={file}', cwd=root)
  assert process.returncode == 0, process.stderr[-2000:]
  report = json.loads(file.read_text())
  assert (report['topology'], report['cloud_name'], report['chips']) == (
    'v5e:2x2',
    'v5litepod-4',
    4,
  )
  assert 0 < report['hbm_fraction'] < 0.01 and report['fits']
  assert report['hbm_fraction'] == report['peak_bytes_per_device'] / report['hbm_bytes_per_device']
  assert report['collective_bytes'].keys() & {'all-gather', 'all-reduce'}
  # Recomputation and padding to 16 tokens add FLOPs.
  assert 1 <= report['hlo_flops_per_step'] / report['model_flops_per_step'] < 2
  assert report['bound_by'] in ('compute', 'hbm', 'ici')
  assert report['step_time_bound_s'] == max(report['bound_s'].values()) > 0
  assert 0 < report['mfu_bound'] < 1
  assert 'v5e:2x2 (v5litepod-4): 4 chips' in process.stdout and 'bound: a step' in process.stdout


def test_invalid_arguments_are_refused_before_compiling(tmp_path, root):
  (tmp_path / 'existing.json').write_text('kept')
  for arguments, message in (
    (('--topology=cpu:8', f'--json={tmp_path}/existing.json'), 'existing.json exists'),
    (('--topology=cpu:0',), 'virtual devices are from 1 to 4,096'),
    (('--write_card=',), '--write_card is missing'),
    (('--workdir=runs/x', '--topology=cpu:8'), 'give one of them'),
  ):
    process = _compile('--config=configs/t2i.py:debug', *arguments, cwd=root)
    assert process.returncode == 2 and message in process.stderr.splitlines()[-1]
    assert process.stderr.count('Traceback') == 0
  assert (tmp_path / 'existing.json').read_text() == 'kept'


def test_two_slices_need_the_mesh_axis_data(tmp_path, root):
  two_slices = ('--topology=v5e:2x2', '--slices=2')
  refused = _compile(*SMALL, *two_slices, cwd=root)
  assert refused.returncode == 2
  assert refused.stderr.strip().splitlines()[-1].startswith('error: 2 slices are connected by')
  file = tmp_path / 'fit.json'
  process = _compile(*SMALL, *two_slices, '--mesh=data=2,fsdp=4', f'--json={file}', cwd=root)
  assert process.returncode == 0, process.stderr[-2000:]
  report = json.loads(file.read_text())
  assert (report['chips'], report['slices']) == (8, 2)
  assert report['dcn_bytes'] > 0 and report['bound_s']['dcn'] > 0


def test_program_that_does_not_fit_lists_buffers_and_settings(root):
  # A wide MLP, as many small images would take longer to compile.
  wide = ('--config.remat=none', '--config.model.ar.mlp=1048576')
  oversized = ('--topology=v5e:1x1', '--images_per_chip=64', *wide)
  process = _compile(*SMALL, *oversized, cwd=root)
  assert process.returncode == 0, process.stderr[-2000:]
  for part in ('DOES NOT FIT', 'Largest buffers', 'GB  ', '--config.remat=full', 'microbatches'):
    assert part in process.stdout
