"""The sample command: mistakes are one line and status 2, and nothing is written."""

import pytest

from tests import commands


@pytest.mark.parametrize(
  'args, message',
  [
    (['--prompt=x'], '--workdir is missing'),
    (['--workdir=w'], 'the prompt is missing'),
    (['--workdir=w', '--prompt=x', 'y'], "unexpected argument 'y'"),
    (['--workdir=w', '--promt=x'], "Unknown command line flag 'promt'"),
    (['--workdir=w', '--prompt=x', '--steps=many'], '--steps=many'),
    (['--workdir=w', '--prompt=x', '--out={tmp}/old.png/x.png'], 'cannot write to {tmp}/old.png'),
    (['--workdir=w', '--prompts=/no/such/file'], 'cannot read --prompts=/no/such/file'),
    (['--workdir=w', '--prompt= '], 'a prompt is blank'),
    (['--workdir=w', '--prompts={tmp}/old.png'], 'old.png is blank'),
    (['--workdir=w', '--prompt=x', '--out='], '--out is empty'),
    (['--workdir=w', '--prompt=x', '--out={tmp}/x.jpg'], 'x.jpg: image files end in .png'),
    (['--workdir=w', '--prompt=x', '--out=s3://b/x.png'], 's3://b is out of reach'),
    (['--workdir=w', '--prompt=x', '--out=https://h/x.png'], 'https://h/x.png is out of reach'),
    (['--workdir=/no/such/run', '--prompt=x', '--out={tmp}/new.png'], '/no/such/run'),
    (['--workdir=w', '--prompt=x', '--out={tmp}/old.png'], 'old.png exists'),
    (['--workdir=/no/run', '--prompt=x', '--n=0'], '--n=0 images per prompt'),
    (['--workdir=/no/run', '--prompt=x', '--seed=-1'], 'seed is -1'),
    (['--workdir=w', '--prompt=x', '--image=gs://b/x.png'], 'gs://b/x.png is on an object store'),
    (
      ['--workdir=w', '--prompt=x', '--visual_prompt_from=gs://b/x.png'],
      'gs://b/x.png is on an object store',
    ),
    (['--workdir=w', '--prompt=x', '--n=1000000'], '1,000,000 images: at most 100,000'),
    (['--workdir=w', '--prompt=x', '--plans=1000000'], '1,000,000 visual prompts: at most 100,000'),
    (['--workdir=w', '--prompt=x', '--image={tmp}/old.png', '--out={tmp}/new.png'], 'old.png'),
  ],
)
def test_mistakes_are_one_line_and_status_2(args, message, tmp_path):
  (tmp_path / 'old.png').write_text(' \n')
  done = commands.run('vpe_jax.sample', *(arg.replace('{tmp}', str(tmp_path)) for arg in args))
  assert done.returncode == 2
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith('error: ') and message.replace('{tmp}', str(tmp_path)) in line
  assert 'Traceback' not in done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ['old.png']
  assert (tmp_path / 'old.png').read_text() == ' \n'


def test_help_has_an_example_and_the_settings():
  text = commands.run('vpe_jax.sample', '--help').stdout
  assert 'python -m vpe_jax.sample --workdir=assets:tiny --prompt=' in text
  settings = ('guidance', 'steps', 'temperature', 'min_p', 'image_guidance', 'plan_guidance')
  for name in (*settings, '[no]no_metadata', 'prompts', 'image'):
    assert f'--{name}:' in text
