"""Tests of the start-up report."""

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax import sharding
from vpe_jax.config import MeshConfig, OptimConfig
from vpe_jax.training import report


def test_parameter_table_has_a_row_for_each_group(line_system):
  system = line_system()
  mesh = sharding.make_mesh(MeshConfig())
  abstract = jax.eval_shape(system.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    abstract,
    sharding.param_shardings(abstract, system.logical_axes, mesh, 'fsdp'),
  )
  text = report.parameters_text(
    params, system.frozen(), {'encoder': 'assets:x'}, system.stages[0], OptimConfig(lr=0.25)
  )
  header, backbone, head, encoder = [line.split() for line in text.splitlines()]
  assert header[:3] == ['group', 'parameters', 'state']
  assert backbone[:5] == ['backbone', '384', 'frozen', '-', 'float32'] and 'fsdp' in text
  assert head[:5] == ['head', '800', 'trains', '0.25', 'float32']
  assert encoder[:3] == ['encoder', '3,072', 'frozen'] and encoder[-1] == 'assets:x'


def test_memory_is_what_the_compiler_planned():
  compiled = jax.jit(lambda x: (x @ x).sum()).lower(jnp.ones((256, 256))).compile()
  memory = report.memory_of(compiled)
  assert memory.arguments == 256 * 256 * 4
  assert memory.total >= memory.arguments + memory.outputs
  assert '0.2' in report.memory_text(memory) and 'does not report' in report.memory_text(None)


def test_sample_line_has_shapes_and_caption(line_system):
  batch = line_system().batch(4)
  text = report.sample_text(batch, 'a red fox')
  assert 'image [4, 8, 8, 3] uint8' in text and "'a red fox'" in text and 'codes' not in text
  assert np.shape(batch.text) == (4, 32)
