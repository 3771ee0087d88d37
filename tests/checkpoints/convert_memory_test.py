"""Test that importing 2 GB in two files takes little more memory than the model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

LAYERS, ROWS, COLUMNS = 16, 4096, 4096  # 64 MB per layer and matrix in float32
SHARD = LAYERS * ROWS * COLUMNS * 4  # bytes of one of the two files

# Runs in a separate process to exclude other memory. Measures anonymous memory, which excludes the
# memory-mapped pages of the files.
PROGRAM = """
import sys, threading, time
import jax, jax.numpy as jnp
from vpe_jax.checkpoints import convert, sources
from vpe_jax.checkpoints.table import Row, Table

def anonymous_memory():
  with open('/proc/self/status') as status:
    line = next(line for line in status if line.startswith('RssAnon'))
  return int(line.split()[1]) * 1024

table = Table('test', (
  Row('layers.{n}.up', 'up', 'O I -> I O'), Row('layers.{n}.down', 'down', 'O I -> I O')))
shape = tuple(int(n) for n in sys.argv[2:])
abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in ('up', 'down')}
jnp.zeros(8).block_until_ready()
baseline, peak, done = anonymous_memory(), [0], []

def watch():
  while not done:
    peak[0] = max(peak[0], anonymous_memory())
    time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
source = sources.open_source(sys.argv[1])
tensor_map = convert.match_tensors(source.tensors, (table,), abstract)
params = convert.load(source.tensors, tensor_map, abstract)
jax.block_until_ready(params)
done.append(True)
watcher.join()
model = sum(leaf.nbytes for leaf in params.values())
print(peak[0] - baseline - model, model, float(params['down'][-1, 2, 1]))
"""


@pytest.mark.slow
def test_additional_memory_is_a_layer_and_a_tensor(tmp_path):
  names, number = {}, np.float32(0)
  for file, kind in enumerate(('up', 'down')):
    tensors = {}
    for n in range(LAYERS):
      tensors[f'layers.{n}.{kind}'] = np.full((ROWS, COLUMNS), number, np.float32)
      tensors[f'layers.{n}.{kind}'][1, 2] = 100 + n
      number += 1
    name = f'model-0000{file + 1}-of-00002.safetensors'
    safetensors.numpy.save_file(tensors, tmp_path / name)
    names |= dict.fromkeys(tensors, name)
    del tensors
  index = {'metadata': {}, 'weight_map': names}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  shape = [str(n) for n in (LAYERS, COLUMNS, ROWS)]
  command = [sys.executable, '-c', PROGRAM, str(tmp_path), *shape]
  process = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
  extra, model, corner = (float(word) for word in process.stdout.split())
  for file in tmp_path.glob('*.safetensors'):
    file.unlink()  # because pytest keeps the folders of its last runs
  assert model == 2 * SHARD and corner == 100 + LAYERS - 1
  tensor = ROWS * COLUMNS * 4
  assert extra <= 2 * tensor + 0.2 * SHARD, f'{extra / 2**20:.0f} MB'
