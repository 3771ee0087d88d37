"""The kernels lower for NVIDIA GPUs without one; their outputs are tested in suite_test.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.ops.attention import chooser, pallas_gpu, reference


@pytest.mark.parametrize(
  'width, dtype', [(64, jnp.bfloat16), (72, jnp.bfloat16), (128, jnp.float32), (256, jnp.bfloat16)]
)
def test_lowers_for_cuda_without_a_gpu(masks, width, dtype):
  case = jax.eval_shape(
    lambda: masks.case(masks.transfusion(100, 91, 7), dtype, heads=(4, 2, width))
  )
  # Newer versions of Pallas read the kind of the device, so the mesh has an abstract one.
  card = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
  explicit = (jax.sharding.AxisType.Explicit,)
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ('card',), explicit, abstract_device=card)
  ):
    lowered = masks.differentiated(pallas_gpu.attention).trace(case)
    text = lowered.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('__gpu$xla.gpu.triton') == 3  # forward, dq, and dk with dv
  for name in ('attention_forward', 'attention_dq', 'attention_dkv'):
    assert name in text
  assert '198x198x' not in text, 'no buffer is L x L'


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('mask', ['transfusion', 'packed_two', 'scattered', 'cached'])
def test_on_a_gpu(masks, mask, dtype):
  masks.near_reference(pallas_gpu.attention, masks.sized[mask], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize('mask, hint', [('causal', 'causal'), ('windows', 'padding')])
def test_cudnn_equals_the_definition_for_known_masks(masks, mask, hint):
  query, key = masks.sized['causal'] if mask == 'causal' else masks.windows(1, 128)
  case = masks.case((query, key), jnp.bfloat16, heads=(4, 2, 64))
  ours = chooser.attention(*case.inputs, query, key, 'cudnn', hint=hint)
  theirs, _ = reference.attention(*case.inputs, query, key)
  np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=3e-2)
