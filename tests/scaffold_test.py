"""Packaging, launch scripts, licences and the README."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vpe_jax

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ['.ci/run', *sorted(f'launch/{p.name}' for p in (ROOT / 'launch').glob('*.sh'))]

# A python3.11 that logs its calls; `-m venv` copies it, as a real one would.
FAKE_PYTHON = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  "-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  "-m pip install"*) [ ! -e "$CALLS.offline" ] ;;
  *-m\\ vpe_jax.main*)
    [ ! -e "$CALLS.bad_config" ] || exit 2
    [ ! -e "$CALLS.stopped" ] || { echo "preempted: saved step 7"; exit 143; } ;;
esac
"""


def _script(path: Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def _shell(text: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    ['/bin/bash', '-c', text],
    cwd=cwd,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=120,
  )


def _environment(text: str, **environment: str) -> subprocess.CompletedProcess:
  return _shell(f'set -euo pipefail; . launch/environment.sh; {text}', **environment)


def test_version_and_extras() -> None:
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  assert setup['metadata']['version'] == 'attr: vpe_jax.__version__'
  assert re.fullmatch(r'\d+\.\d+\.\d+', vpe_jax.__version__)
  extras = {'tpu', 'cuda', 'cuda13', 'gcs', 'test', 'tensorboard', 'eval', 'prepare'}
  assert set(setup['options.extras_require']) == extras
  assert not re.search(r'^(torch|tensorflow)\b(?!-)', setup['options']['install_requires'], re.M)


def test_data_libraries_work_without_tensorflow() -> None:
  code = (
    'import sys, tensorflow_datasets, clu.metrics, clu.parameter_overview\n'
    'assert "tensorflow" not in sys.modules\n'
    'print(tensorflow_datasets.data_source.__name__)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (0, 'data_source\n'), done.stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_parse_and_can_be_started(script: str) -> None:
  assert _shell(f'bash -n {script}').returncode == 0
  executable = os.access(ROOT / script, os.X_OK)
  assert executable == (script != 'launch/environment.sh')


@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    ({}, ''),
    ({'dev/accel0': ''}, 'tpu'),
    ({'dev/accel/accel0': ''}, ''),  # a laptop's neural processor
    ({'dev/nvidia0': ''}, 'cuda'),
    ({'dev/vfio/0': '', 'sys/bus/pci/devices/0/vendor': '0x10de'}, ''),
    (
      {
        'dev/vfio/0': '',
        'sys/bus/pci/devices/0/vendor': '0x1ae0',
        'sys/bus/pci/devices/0/class': '0x088000',
      },
      'tpu',
    ),
    (
      {  # a virtual machine of Google's with a network card of theirs, and no TPU
        'dev/vfio/0': '',
        'sys/bus/pci/devices/0/vendor': '0x1ae0',
        'sys/bus/pci/devices/0/class': '0x020000',
      },
      '',
    ),
  ],
)
def test_accelerator(tmp_path: Path, files: dict[str, str], expected: str) -> None:
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  assert _environment(f'accelerator {tmp_path}').stdout.strip() == expected


@pytest.mark.parametrize(('version', 'expected'), [('12.8', 'cuda'), ('13.0', 'cuda13')])
def test_the_driver_decides_cuda_12_or_13(tmp_path: Path, version: str, expected: str) -> None:
  _script(tmp_path / 'nvidia-smi', f'#!/bin/bash\necho "| CUDA Version: {version}  |"\n')
  path = f'{tmp_path}:{os.environ["PATH"]}'
  assert _environment('accelerator', PATH=path).stdout.strip() == expected


def test_find_python_prefers_3_11_and_names_a_missing_version(tmp_path: Path) -> None:
  _script(tmp_path / 'old' / 'python3', '#!/bin/bash\n[ "$1" = --version ] && echo Python 3.9.2\n')
  only_old = {'PATH': str(tmp_path / 'old'), 'HOME': str(tmp_path), 'PYENV_ROOT': str(tmp_path)}
  done = _environment('find_python', **only_old)
  assert done.returncode == 2
  assert done.stderr.startswith('error: no Python from 3.11 to 3.13 found (python3 is Python 3.9')
  assert done.stderr.count('\n') == 1

  _script(tmp_path / 'new' / 'python3', '#!/bin/bash\nexit 0\n')
  newer = only_old | {'PATH': str(tmp_path / 'new')}
  assert _environment('find_python', **newer).stdout == f'{tmp_path}/new/python3\n'
  _script(tmp_path / 'versions/3.11.9/bin/python3.11', '#!/bin/bash\nexit 0\n')
  assert _environment('find_python', **newer).stdout.endswith('3.11.9/bin/python3.11\n')


def _clone(folder: Path) -> dict[str, str]:
  """A clone without the library, and an environment in which Python only logs its calls."""
  scripts = ('environment', 'quickstart', 'test', 'verify_device')
  for name in (*(f'launch/{script}.sh' for script in scripts), '.ci/run'):
    _script(folder / name, (ROOT / name).read_text())
  for name in ('setup.cfg', 'pyproject.toml'):
    (folder / name).write_text((ROOT / name).read_text())
  _script(folder / 'bin' / 'python3.11', FAKE_PYTHON)
  _script(folder / 'bin' / 'python3.12', FAKE_PYTHON)
  return {'PATH': f'{folder}/bin:{os.environ["PATH"]}', 'CALLS': str(folder / 'calls')}


def _calls(folder: Path) -> list[str]:
  """Calls `-m MODULE` of the fake Python since the last call of this function."""
  lines = (folder / 'calls').read_text().splitlines()
  (folder / 'calls').write_text('')
  return [line for line in lines if line.startswith('-m') and line != '-m pip --version']


def test_quickstart_installs_once_trains_and_samples(tmp_path: Path) -> None:
  environment = _clone(tmp_path)
  done = _shell('bash launch/quickstart.sh --config.seed=3', tmp_path, **environment)
  assert done.returncode == 0, done.stderr
  venv, pip, train, sample = _calls(tmp_path)
  assert venv == '-m venv --clear .venv'
  assert pip.startswith('-m pip install') and re.search(r'\.(\[(tpu|cuda|cuda13)\])?$', pip)
  assert train == (
    '-m vpe_jax.main --config=configs/t2i.py --workdir=runs/quickstart --config.seed=3'
  )
  assert sample.startswith('-m vpe_jax.sample --workdir=runs/quickstart --prompt=')
  assert '--out=runs/quickstart/sample.png' in sample
  assert re.search(r'== training took \d+ s', done.stdout)

  again = _shell('bash launch/quickstart.sh', tmp_path, **environment)
  assert '.venv is up to date' in again.stdout
  assert [call.split()[1] for call in _calls(tmp_path)] == ['vpe_jax.main', 'vpe_jax.sample']

  with (tmp_path / 'setup.cfg').open('a') as file:
    file.write('# another version\n')
  assert _shell('bash launch/quickstart.sh', tmp_path, **environment).returncode == 0
  assert [call.split()[1] for call in _calls(tmp_path)][0] == 'pip'


def test_a_failed_phase_ends_the_script_and_is_repeated(tmp_path: Path) -> None:
  environment = _clone(tmp_path)
  (tmp_path / 'calls.offline').touch()
  assert _shell('bash launch/quickstart.sh', tmp_path, **environment).returncode == 1
  assert not any('vpe_jax' in call for call in _calls(tmp_path))
  (tmp_path / 'calls.offline').unlink()
  (tmp_path / 'calls.bad_config').touch()
  failed = _shell('bash launch/quickstart.sh', tmp_path, **environment)
  assert failed.returncode == 2 and 'Look at' not in failed.stdout
  assert [call.split()[1] for call in _calls(tmp_path)] == ['pip', 'vpe_jax.main']


def test_an_interrupted_run_is_not_sampled(tmp_path: Path) -> None:
  environment = _clone(tmp_path)
  (tmp_path / 'calls.stopped').touch()
  stopped = _shell('bash launch/quickstart.sh', tmp_path, **environment)
  assert stopped.returncode == 143 and 'run this command again' in stopped.stdout
  assert 'Look at' not in stopped.stdout
  assert [call.split()[1] for call in _calls(tmp_path)][-1] == 'vpe_jax.main'


def test_test_script_checks_style_tests_and_the_newer_python(tmp_path: Path) -> None:
  environment = _clone(tmp_path)
  done = _shell('bash .ci/run', tmp_path, **environment)
  assert done.returncode == 0, done.stderr
  calls = _calls(tmp_path)
  set_up, rest = sorted(calls[:4]), calls[4:]
  assert set_up[2:] == ['-m venv --clear .venv', '-m venv --clear .venv312']
  assert sum('.[test' in call for call in set_up) == 1
  modules = [call.split()[1] for call in rest]
  assert modules == ['ruff', 'pytest', 'vpe_jax.main', 'vpe_jax.sample']
  assert '--config=configs/t2i.py:debug' in rest[2]


def test_verify_device_goes_through_all_phases_and_reports(tmp_path: Path) -> None:
  environment = _clone(tmp_path)
  done = _shell('bash launch/verify_device.sh --cpu --out=r.json', tmp_path, **environment)
  assert done.returncode == 0, done.stderr
  calls = [' '.join(call.split()[1:3]) for call in _calls(tmp_path)]
  trained = ['vpe_jax.main --config=configs/t2i.py:debug', 'vpe_jax.sample --workdir=']
  assert calls[2] == 'pytest -q' and calls[-2].startswith('tests.benchmarks.attention')
  assert [call.split()[0] for call in calls[3:7]] == [t.split()[0] for t in trained] * 2
  assert calls[-1].startswith('tests.benchmarks.device_report')
  (tmp_path / 'r.json').touch()
  refused = _shell('bash launch/verify_device.sh --cpu --out=r.json', tmp_path, **environment)
  assert refused.returncode == 2 and 'r.json exists' in refused.stderr


def test_device_report_names_the_failed_phase(tmp_path: Path) -> None:
  (tmp_path / 'phases').write_text('kernels 0 12\nfloat32 1 3\n')
  (tmp_path / 'float32.log').write_text('working\nerror: no memory\n')
  command = [sys.executable, '-m', 'tests.benchmarks.device_report', str(tmp_path)]
  done = subprocess.run(
    [*command, str(tmp_path / 'out.json')], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 1 and 'failed: float32' in done.stdout, done.stderr
  report = json.loads((tmp_path / 'out.json').read_text())
  assert not report['passed'] and report['phases']['kernels']['passed']
  assert report['phases']['float32']['end'][-1] == 'error: no memory'
  assert report['devices'] and report['versions']['jax']


TPU = 'bash launch/tpu_pod.sh --name=vpe --zone=us-east5-b --type=v6e-16 --workdir=gs://b/run'


def test_tpu_pod_dry_run_prints_every_command() -> None:
  done = _shell(f'{TPU} --dry_run --spot --delete --project=p -- "--config.data.source=it\'s"')
  assert done.returncode == 0, done.stderr
  commands = [
    shlex.split(line.replace("$'", "'").replace(r'\n', '\n').replace(r'\'', ''))
    for line in done.stdout.splitlines()
  ]
  location = ['--zone=us-east5-b', '--project=p']
  assert commands[0] == [
    *'gcloud compute tpus tpu-vm create vpe'.split(),
    *location,
    '--accelerator-type=v6e-16',
    '--version=v2-alpha-tpuv6e',
    '--spot',
  ]
  assert [command[:5] for command in commands[1:]] == [
    'git archive --format=tar.gz --prefix=vpe_jax/'.split() + [commands[1][4]],
    *[f'gcloud compute tpus tpu-vm {verb}'.split() for verb in ('scp',)],
    ['rm', commands[1][4].removeprefix('--output=')],
    *[f'gcloud compute tpus tpu-vm {verb}'.split() for verb in ('ssh', 'ssh', 'ssh')],
    ['mkdir', '-p', 'runs/pod-vpe'],
    *[f'gcloud compute tpus tpu-vm {verb}'.split() for verb in ('ssh', 'delete')],
  ]
  no_delete = _shell(f'{TPU} --dry_run --spot --project=p')
  assert 'delete' not in no_delete.stdout and 'costs money' not in no_delete.stdout
  set_up, start, follow = commands[4:7]
  assert '--worker=all' in set_up and 'install .venv' in set_up[-1]
  assert '--worker=all' in start and '-m vpe_jax.main --config=configs/t2i.py' in start[-1]
  assert '--workdir=gs://b/run' in start[-1]
  assert '--worker=0' in follow and 'tail' in follow[-1]


def test_tpu_pod_worker_commands_are_shell() -> None:
  done = _shell(f'{TPU} --dry_run --queued --repo=https://example.org/r.git -- "--config.x=it\'s"')
  remote = re.findall(r"(?<= )\$'--command=.*?(?<!\\)'(?= ?$)", done.stdout, re.M)
  assert len(remote) == 2 and 'git clone' in remote[0]
  for word in remote:
    assert _shell(f'text={word}; bash -n <<< "${{text#--command=}}"').returncode == 0
  assert '--config.x=it' in remote[1]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ('--zone=z --type=v6e-16 --workdir=gs://b/run', 'set --name=NAME'),
    ('--name=n --zone=z --type=v6e-16 --workdir=runs/x', 'set --workdir=gs://'),
    ('--name=n --zone=z --type=h100 --workdir=gs://b/run', 'no image known for --type=h100'),
    ('--nane=n', "unknown option '--nane=n'"),
  ],
)
def test_tpu_pod_mistakes(arguments: str, message: str) -> None:
  done = _shell(f'bash launch/tpu_pod.sh --dry_run {arguments}')
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ' + message) and done.stderr.count('\n') == 1


def test_tpu_pod_needs_a_config_of_the_commit(tmp_path: Path) -> None:
  script = TPU.replace('launch/', f'{ROOT}/launch/')
  git = f'cd {tmp_path} && git -c user.name=n -c user.email=n@example.org'
  assert _shell(f'{git} init -q && {git} commit -q --allow-empty -m x').returncode == 0
  (tmp_path / 'new.py').write_text('')
  run = f'cd {tmp_path} && {script} --dry_run --config=new.py:debug'
  refused = _shell(run)
  assert (refused.returncode, refused.stdout) == (2, '')
  assert refused.stderr.startswith('error: --config=new.py:debug is not in the commit')
  assert _shell(f'{git} add new.py && {git} commit -q -m y && {run}').returncode == 0


FAKE_GCLOUD = """#!/bin/bash
# Imitates a slice: answers each query with the next line of a file.
next() { head -n 1 "$PLAY/$1"; sed -i 1d "$PLAY/$1"; }
status() { local code; code=$(next "$1"); exit "${code:-0}"; }
echo "$*" | tr '\\n' ' ' | cut -c 1-400 >> "$PLAY/calls"
case "$*" in
  *" describe "*) answer=$(next states); [ "$answer" != ABSENT ] && echo "$answer" ;;
  *" create "*) answer=$(next creates); [ -z "$answer" ] || { echo "$answer" >&2; exit 1; } ;;
  *"install .venv"*) status set_ups ;;
  *"--command=tail -n +1"*) status ends ;;
esac
"""


def _play(folder: Path, **lines: list[object]) -> tuple[subprocess.CompletedProcess, list[str]]:
  """Runs the script against the imitated slice: (finished process, verbs of its gcloud calls)."""
  _script(folder / 'bin' / 'gcloud', FAKE_GCLOUD)
  for name in ('states', 'creates', 'set_ups', 'ends'):
    (folder / name).write_text(''.join(f'{line}\n' for line in lines.get(name, [])))
  done = _shell(
    f'{TPU} --poll=0 --repo=https://example.org/r.git --logs={folder}/logs',
    PATH=f'{folder}/bin:{os.environ["PATH"]}',
    PLAY=str(folder),
  )
  verbs = [line.split()[3] for line in (folder / 'calls').read_text().splitlines()]
  return done, [verb for verb in verbs if verb != 'describe']


def test_tpu_pod_resumes_after_preemption(tmp_path: Path) -> None:
  done, verbs = _play(
    tmp_path,
    states=['ABSENT', 'CREATING', 'READY', 'PREEMPTED', 'ABSENT', 'READY'],
    ends=[255, 0],
  )
  assert done.returncode == 0, done.stderr
  once = ['ssh', 'ssh', 'ssh']  # set up, start, follow
  assert verbs == ['create', *once, 'delete', 'create', *once, 'ssh']
  assert 'complete: results in gs://b/run' in done.stdout


def test_tpu_pod_waits_for_capacity(tmp_path: Path) -> None:
  none = 'ERROR: (gcloud) RESOURCE_EXHAUSTED: There is no more capacity in the zone'
  done, verbs = _play(
    tmp_path,
    states=['ABSENT', 'ABSENT', 'ABSENT', 'READY'],
    creates=[none, 'ERROR: {"code": 14, "status": "UNAVAILABLE"}'],
    ends=[0],
  )
  assert done.returncode == 0, done.stderr
  assert verbs.count('create') == 3 and none in done.stderr


@pytest.mark.parametrize(
  'message',
  [
    "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProject' has been exceeded.",
    'ERROR: (gcloud) You do not currently have an active account selected.',
    "ERROR: (gcloud) NOT_FOUND: The accelerator v6e-17 was not found in zone 'us-east5-b'",
  ],
)
def test_tpu_pod_ends_on_errors_that_waiting_does_not_fix(tmp_path: Path, message: str) -> None:
  done, verbs = _play(tmp_path, states=['ABSENT'] * 9, creates=[message] * 9)
  assert done.returncode == 2 and verbs == ['create']
  last = done.stderr.splitlines()[-1]
  assert last.startswith('error: ') and message in last


def test_tpu_pod_needs_gcloud(tmp_path: Path) -> None:
  for tool in ('bash', 'sed'):
    (tmp_path / tool).symlink_to(f'/bin/{tool}')
  done = _shell(TPU, PATH=str(tmp_path))
  assert done.returncode == 2 and done.stderr.startswith('error: gcloud is not installed')


def test_tpu_pod_distinguishes_a_saved_run_from_a_complete_one(tmp_path: Path) -> None:
  done, verbs = _play(
    tmp_path,
    states=['READY', 'TERMINATED', 'ABSENT', 'READY'],
    ends=[143, 0],
  )
  assert done.returncode == 0, done.stderr
  assert verbs.count('create') == 1 and verbs.count('delete') == 1


def test_tpu_pod_retries_if_workers_refuse_connections(tmp_path: Path) -> None:
  done, verbs = _play(
    tmp_path, states=['READY'] * 3, set_ups=[255, 1, 0], ends=[0]
  )
  assert done.returncode == 0, done.stderr
  assert verbs == ['ssh'] * 6  # two failed set-ups; set up, start, follow, logs

  hopeless, verbs = _play(tmp_path, states=['READY'] * 5, set_ups=[1] * 5)
  assert hopeless.returncode == 2 and 'could not set up all workers' in hopeless.stderr


def test_tpu_pod_stops_when_the_run_itself_fails(tmp_path: Path) -> None:
  done, verbs = _play(tmp_path, states=['READY', 'READY'], ends=[2])
  assert done.returncode == 2
  assert 'the run ended with status 2' in done.stderr
  assert 'create' not in verbs and 'delete' not in verbs


WORKER_GCLOUD = """#!/bin/bash
# A slice of one worker: its home is a folder, in which its commands run.
command=$(for word; do case $word in --command=*) echo "${word#--command=}" ;; esac; done)
case "$*" in
  *" describe "*) echo READY ;;
  *"install .venv"*) ;;
  *"--output-directory="*)
    all=$*
    folder=${all##*--output-directory=}
    (cd "$HOME_OF_WORKER" && bash -c "$command") > "$folder/0.log" ;;
  *) cd "$HOME_OF_WORKER" && exec bash -c "$command" ;;
esac
"""


@pytest.mark.parametrize('status', [0, 3])
def test_tpu_pod_runs_detached_and_reports_the_status(tmp_path: Path, status: int) -> None:
  _script(tmp_path / 'bin' / 'gcloud', WORKER_GCLOUD)
  python = '#!/bin/bash\nsleep 0.3\nprintf "[%s]\\n" "$@"\nexit ' + str(status) + '\n'
  _script(tmp_path / 'worker' / 'vpe_jax' / '.venv' / 'bin' / 'python', python)
  done = _shell(
    f'{TPU} --poll=0 --repo=https://example.org/r.git --logs={tmp_path}/logs -- "--a=it\'s b"',
    PATH=f'{tmp_path}/bin:{os.environ["PATH"]}',
    HOME_OF_WORKER=str(tmp_path / 'worker'),
  )
  assert done.returncode == (0 if status == 0 else 2), done.stderr
  log = (tmp_path / 'worker' / 'run.log').read_text()
  assert log.splitlines()[-2:] == ['[--workdir=gs://b/run]', "[--a=it's b]"]
  assert log in done.stdout
  assert (tmp_path / 'logs' / '0.log').read_text() == log
  assert (tmp_path / 'worker' / 'run.status').read_text() == f'{status}\n'


def test_third_parties_have_licence_and_provenance() -> None:
  table = (ROOT / 'third_party' / 'README.md').read_text()
  folders = sorted(p for p in (ROOT / 'third_party').iterdir() if p.is_dir())
  assert folders
  for folder in folders:
    assert f'[{folder.name}]({folder.name})' in table
    assert len((folder / 'LICENSE').read_text()) > 1000
    provenance = (folder / 'PROVENANCE').read_text()
    assert 'Licence:' in provenance and 'Source:' in provenance
    for path in re.findall(r'\b(?:vpe_jax|tests)/[\w/.]*\w', provenance):
      assert (ROOT / path).exists(), f'{folder.name}/PROVENANCE names {path}'
  for path in (ROOT / 'vpe_jax').rglob('*.py'):
    for name in re.findall(r'third_party/(\w+)', path.read_text()):
      assert (ROOT / 'third_party' / name).is_dir(), f'{path} names third_party/{name}'
  assert 'All emojis designed by' in table and 'CC BY-SA 4.0' in table


def test_readme_names_only_what_exists() -> None:
  text = (ROOT / 'README.md').read_text()
  for module in set(re.findall(r'-m vpe_jax\.([\w.]+)', text)):
    assert (ROOT / 'vpe_jax' / f'{module.replace(".", "/")}.py').exists(), f'vpe_jax.{module}'
  for path in set(re.findall(r'\b((?:launch|configs|tests|vpe_jax)/[\w./]*\w)', text)):
    assert (ROOT / path).exists(), path
  for link in re.findall(r'\]\((?!https?:)([^)#]+)\)', text):
    assert (ROOT / link).exists(), link
