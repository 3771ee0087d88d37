"""Tests of vpe_jax.convert: imports, exports and one-line errors that leave no files."""

from __future__ import annotations

import json
import pathlib
import shutil
import time
import types

import numpy as np
import pytest

from tests import commands
from vpe_jax import convert
from vpe_jax.checkpoints import conversion, parity, sources, weights
from vpe_jax.contracts import UserError
from vpe_jax.sharding import leaves_by_path


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """The shipped SigLIP, exported for transformers."""
  folder = tmp_path_factory.mktemp('out') / 'siglip'
  lines = convert.export_weights('siglip', 'assets:siglip', str(folder))
  assert '1,9' in lines[0] and lines[-1] == f'wrote {folder}'
  return folder


def test_transformers_opens_an_export(published):
  import torch
  import transformers

  model, info = transformers.SiglipModel.from_pretrained(published, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  token = weights.load('assets:siglip')[0]['text']['token']
  ours = model.text_model.embeddings.token_embedding.weight.detach()
  assert torch.equal(ours, torch.tensor(token))


def test_import_and_export_are_exact(published, tmp_path):
  imported, exported = str(tmp_path / 'imported'), str(tmp_path / 'exported')
  lines = convert.import_weights('siglip', str(published), imported)
  assert 'tensors (float32)' in lines[0] and 'parameters' in lines[0]
  params, metadata = weights.load(imported)
  assert json.loads(metadata['config'])['family'] == 'siglip'
  expected = leaves_by_path(weights.load('assets:siglip')[0])
  for path, leaf in leaves_by_path(params).items():
    np.testing.assert_array_equal(leaf, expected[path])
  convert.export_weights('siglip', imported, exported)
  original, copy = (sources.open_source(str(folder)) for folder in (published, exported))
  assert original.config == copy.config
  for key, tensor in original.tensors.items():
    np.testing.assert_array_equal(tensor.read(), copy.tensors[key].read())


def test_check_compares_with_the_reference_before_writing(published, tmp_path, monkeypatch):
  lines = convert.import_weights('siglip', str(published), str(tmp_path / 'out'), check=True)
  assert 'parity with the reference passes' in lines[-2]
  monkeypatch.setattr(parity, 'TOLERANCE', 0.0)
  with pytest.raises(UserError, match='FAILS'):
    convert.import_weights('siglip', str(published), str(tmp_path / 'failed'), check=True)
  assert not (tmp_path / 'failed').exists()
  golden = pathlib.Path(__file__).parent / 'golden' / 'showo2'
  with pytest.raises(UserError, match='no reference library'):
    alone = convert.Companions(wanted=False)
    convert.import_weights('showo2', str(golden), str(tmp_path / 'failed'), True, companions=alone)


def test_export_in_bfloat16(tmp_path):
  convert.export_weights('siglip', 'assets:siglip', str(tmp_path / 'out'), 'bfloat16')
  dtypes = {str(t.dtype) for t in sources.open_source(str(tmp_path / 'out')).tensors.values()}
  assert dtypes == {'bfloat16'}


@pytest.mark.parametrize('platform, unit', [('linux', 2**10), ('darwin', 1)])
def test_peak_memory_has_the_unit_of_the_platform(monkeypatch, platform, unit):
  usage = types.SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
  monkeypatch.setattr('sys.platform', platform)
  monkeypatch.setattr(conversion.resource, 'getrusage', lambda who: usage)
  assert 'peak memory 3.00 GiB' in conversion._summary({}, 0.0)


def test_what_can_not_be_written_is_refused_before_weights_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(conversion.sources, 'open_source', lambda *_: pytest.fail('opened'))
  monkeypatch.setattr(conversion.imports, 'read', lambda *_: pytest.fail('read'))
  to = str(tmp_path / 'out')
  for call, message in (
    (lambda: convert.import_weights('llamagen', 'folder', 'gs://b/x'), 'to a local folder'),
    (lambda: convert.import_weights('siglip', 'folder', to, dtype='int4'), 'int4'),
    (lambda: convert.export_weights('siglip', 'folder', to, 'int4'), 'int4'),
  ):
    with pytest.raises(UserError, match=message):
      call()


def test_existing_folder_is_not_overwritten(published, tmp_path):
  for call in (
    lambda: convert.export_weights('siglip', 'assets:siglip', str(tmp_path)),
    lambda: convert.import_weights('siglip', str(published), str(tmp_path)),
  ):
    with pytest.raises(UserError, match='exists'):
      call()


def test_export_of_a_network_without_family_is_refused(tmp_path):
  with pytest.raises(UserError, match='trains no network of a published family'):
    convert.export_weights('siglip', 'assets:image', str(tmp_path / 'out'))
  assert not list(tmp_path.iterdir())


def test_missing_or_wrong_config_json_is_refused(published, tmp_path):
  folder = tmp_path / 'copy'
  folder.mkdir()
  (folder / 'model.safetensors').write_bytes((published / 'model.safetensors').read_bytes())
  with pytest.raises(UserError, match=r'no config\.json'):
    convert.import_weights('siglip', str(folder), str(tmp_path / 'out'))
  (folder / 'config.json').write_text('{"model_type": "qwen2"}')
  with pytest.raises(UserError, match='another family'):
    convert.import_weights('siglip', str(folder), str(tmp_path / 'out'))
  config = json.loads((published / 'config.json').read_text())
  config['vision_config']['num_hidden_layers'] += 1
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='encoder.layers.4.*is missing'):
    convert.import_weights('siglip', str(folder), str(tmp_path / 'out'))
  assert [path.name for path in tmp_path.iterdir()] == ['copy']


@pytest.mark.parametrize(
  'field, value',
  [('num_hidden_layers', value) for value in ('abc', None, 1.5, 0, -1, [1], 10**9, 10**4, True)]
  + [('num_attention_heads', 0), ('num_attention_heads', 7), ('patch_size', 0)]
  + [('patch_size', 10**9), ('hidden_size', 'x'), ('hidden_act', 3), ('layer_norm_eps', None)],
)
def test_invalid_config_field_is_a_quick_one_line_error(published, tmp_path, field, value):
  folder = tmp_path / 'copy'
  folder.mkdir()
  (folder / 'model.safetensors').symlink_to(published / 'model.safetensors')
  config = json.loads((published / 'config.json').read_text())
  config['vision_config'][field] = value
  (folder / 'config.json').write_text(json.dumps(config))
  started = time.monotonic()
  with pytest.raises(UserError) as error:
    convert.import_weights('siglip', str(folder), str(tmp_path / 'out'))
  assert '\n' not in str(error.value) and len(str(error.value)) < 1000
  assert time.monotonic() - started < 60
  assert [path.name for path in tmp_path.iterdir()] == ['copy']


def test_unsupported_sizes_are_named_with_their_file(published, tmp_path):
  shutil.copytree(published, tmp_path / 'copy')
  config = json.loads((published / 'config.json').read_text())
  config['vision_config']['hidden_act'] = 'mish'
  (tmp_path / 'copy' / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match="copy': .*'mish'") as error:
    convert.import_weights('siglip', str(tmp_path / 'copy'), str(tmp_path / 'out'))
  assert 'get it again' not in str(error.value)


def test_an_export_to_a_bucket_is_refused(published):
  with pytest.raises(UserError, match='to a local folder, not to gs://b/x'):
    convert.export_weights('siglip', str(published), 'gs://b/x')


def test_output_inside_the_source_is_refused(published):
  with pytest.raises(UserError, match='inside the source'):
    convert.import_weights('siglip', str(published), str(published / 'out'))


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], '--family is missing'),
    (['--family=sigli'], 'siglip'),
    (['--family=siglip', '--source=nowhere', '--to=out'], 'not a hub id'),
    (['--family=siglip', '--source=', '--to=out'], '--source is missing'),
    (['--family=siglip', '--source=nowhere', '--to=s3://b/x'], 's3://b/x is out of reach'),
  ],
)
def test_command_line_errors_are_one_line(tmp_path, flags, message):
  process = commands.run('vpe_jax.convert', *flags, cwd=tmp_path)
  assert process.returncode == 2 and message in process.stderr
  assert 'Traceback' not in process.stderr and not list(tmp_path.iterdir())
