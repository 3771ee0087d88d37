"""The convert command: in, out, and mistakes in one line with nothing left behind."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from vpe_jax import convert
from vpe_jax.checkpoints import parity, sources, weights
from vpe_jax.contracts import UserError
from vpe_jax.sharding import by_path


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """The shipped SigLIP as transformers would have it."""
  folder = tmp_path_factory.mktemp('out') / 'siglip'
  lines = convert.send_out('siglip', 'assets:siglip', str(folder))
  assert '1,9' in lines[0] and lines[-1] == f'wrote {folder}'
  return folder


def test_what_is_trained_here_is_opened_by_transformers(published):
  import torch
  import transformers

  model, found = transformers.SiglipModel.from_pretrained(published, output_loading_info=True)
  assert not found['missing_keys'] and not found['unexpected_keys']
  token = weights.load('assets:siglip')[0]['text']['token']
  ours = model.text_model.embeddings.token_embedding.weight.detach()
  assert torch.equal(ours, torch.tensor(token))


def test_in_and_out_again_changes_no_bit(published, tmp_path):
  kept, again = str(tmp_path / 'kept'), str(tmp_path / 'again')
  lines = convert.bring_in('siglip', str(published), kept)
  assert 'tensors (float32)' in lines[0] and 'parameters' in lines[0]
  params, metadata = weights.load(kept)
  assert json.loads(metadata['config'])['family'] == 'siglip'
  wanted = by_path(weights.load('assets:siglip')[0])
  for path, leaf in by_path(params).items():
    np.testing.assert_array_equal(leaf, wanted[path])
  convert.send_out('siglip', kept, again)
  before, after = (sources.open_source(str(folder)) for folder in (published, again))
  assert before.config == after.config
  for key, tensor in before.tensors.items():
    np.testing.assert_array_equal(tensor.read(), after.tensors[key].read())


def test_a_check_compares_with_the_reference_before_anything_is_kept(
  published, tmp_path, monkeypatch
):
  lines = convert.bring_in('siglip', str(published), str(tmp_path / 'kept'), check=True)
  assert 'parity with the reference holds' in lines[-2]
  monkeypatch.setattr(parity, 'TOLERANCE', 0.0)
  with pytest.raises(UserError, match='FAILS'):
    convert.bring_in('siglip', str(published), str(tmp_path / 'other'), check=True)
  assert not (tmp_path / 'other').exists()
  golden = pathlib.Path(__file__).parent / 'golden' / 'showo2'
  with pytest.raises(UserError, match='no reference library'):
    convert.bring_in('showo2', str(golden), str(tmp_path / 'other'), check=True)


def test_a_narrow_dtype_can_be_asked_for(tmp_path):
  convert.send_out('siglip', 'assets:siglip', str(tmp_path / 'out'), 'bfloat16')
  kinds = {str(t.dtype) for t in sources.open_source(str(tmp_path / 'out')).tensors.values()}
  assert kinds == {'bfloat16'}


def test_nothing_is_overwritten(published, tmp_path):
  for call in (
    lambda: convert.send_out('siglip', 'assets:siglip', str(tmp_path)),
    lambda: convert.bring_in('siglip', str(published), str(tmp_path)),
  ):
    with pytest.raises(UserError, match='exists'):
      call()


def test_what_can_not_go_out_is_said(tmp_path):
  with pytest.raises(UserError, match='trains no network of a published family'):
    convert.send_out('siglip', 'assets:image', str(tmp_path / 'out'))
  assert not list(tmp_path.iterdir())


def test_sizes_are_missed(published, tmp_path):
  alone = tmp_path / 'alone'
  alone.mkdir()
  (alone / 'model.safetensors').write_bytes((published / 'model.safetensors').read_bytes())
  with pytest.raises(UserError, match=r'no config\.json'):
    convert.bring_in('siglip', str(alone), str(tmp_path / 'kept'))
  (alone / 'config.json').write_text('{"model_type": "qwen2"}')
  with pytest.raises(UserError, match='another family'):
    convert.bring_in('siglip', str(alone), str(tmp_path / 'kept'))
  config = json.loads((published / 'config.json').read_text())
  config['vision_config']['num_hidden_layers'] += 1
  (alone / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='encoder.layers.4.*is missing'):
    convert.bring_in('siglip', str(alone), str(tmp_path / 'kept'))
  assert [path.name for path in tmp_path.iterdir()] == ['alone']


@pytest.mark.parametrize(
  'field, value',
  [('num_hidden_layers', value) for value in ('abc', None, 1.5, 0, -1, [1], 10**9, 10**4, True)]
  + [('num_attention_heads', 0), ('num_attention_heads', 7), ('patch_size', 0)]
  + [('patch_size', 10**9), ('hidden_size', 'x'), ('hidden_act', 3), ('layer_norm_eps', None)],
)
def test_a_field_that_can_not_be_is_one_line_quickly(published, tmp_path, field, value):
  alone = tmp_path / 'alone'
  alone.mkdir()
  (alone / 'model.safetensors').symlink_to(published / 'model.safetensors')
  config = json.loads((published / 'config.json').read_text())
  config['vision_config'][field] = value
  (alone / 'config.json').write_text(json.dumps(config))
  began = time.monotonic()
  with pytest.raises(UserError) as error:
    convert.bring_in('siglip', str(alone), str(tmp_path / 'kept'))
  assert '\n' not in str(error.value) and len(str(error.value)) < 1000
  assert time.monotonic() - began < 60
  assert [path.name for path in tmp_path.iterdir()] == ['alone']


def test_what_is_written_lies_outside_the_source(published):
  with pytest.raises(UserError, match='lies within the source'):
    convert.bring_in('siglip', str(published), str(published / 'kept'))


@pytest.mark.parametrize(
  'flags, words',
  [
    ([], '--family is missing'),
    (['--family=sigli'], 'siglip'),
    (['--family=siglip', '--source=nowhere', '--to=out'], 'no hub id'),
    (['--family=siglip', '--source=', '--to=out'], '--source is missing'),
    (['--family=siglip', '--source=nowhere', '--to=s3://b/x'], 's3://b/x is out of reach'),
  ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, flags, words):
  command = [sys.executable, '-m', 'vpe_jax.convert', *flags]
  ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
  assert ran.returncode == 2 and words in ran.stderr
  assert 'Traceback' not in ran.stderr and not list(tmp_path.iterdir())
