"""Tests of parsing the compiler's memory reports and errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.training import memory

REPORT = """Memory Space: default (color=0)
Total bytes: 67203363488 (62.59GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   13.00GiB( 18%);   13.00GiB;    147161088;                5; 5×f32[26,1,8,16,1024,1024]
   13.50GiB( 26%);  512.00MiB;  14105804800;                5; 5×bf16[26,1,8,16,1024,1024]

  cumulative_size;       size;       offset; used_by_n_values; shapes_list
Memory Space: vmem (color=1)
Total bytes: 50266112 (47.94MiB)
   99.00GiB( 18%);   99.00GiB;    147161088;                5; f32[8]
"""
OVERFLOW = (
  'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory '
  'required for HLO temporaries (456.00G) exceeds available HBM (15.75G). HLO module: jit_step.'
)


def test_largest_hbm_buffers_are_parsed():
  first, second = memory.buffers_of(REPORT)
  assert first == memory.Buffer(13 * 2**30, '5×f32[26,1,8,16,1024,1024]')
  assert second.bytes == 512 * 2**20
  assert memory.buffers_of('') == ()


PROGRAM = """HloModule jit_step

%fused_computation (param_0.1: f32[512,1024]) -> f32[512,1024] {
  %sub.11 = f32[512,4096]{1,0} broadcast(%param_2.1), dimensions={}
}

ENTRY %main (x: f32[512,1024]) -> f32[] {
  %x = f32[512,1024]{1,0} parameter(0)
  %dot.1 = bf16[512,512]{1,0} dot(%x, %x), metadata={op_name="jit(step)/dot_general"}
  ROOT %sum.2 = f32[] reduce(%dot.1, %c), dimensions={0,1}, metadata={op_name="jit(step)/sum"}
}
"""


def test_without_a_report_arrays_of_the_program_are_listed(tmp_path):
  """Neither arguments nor arrays inside of fusions are."""
  (tmp_path / 'module_1.jit_step.after_optimizations.txt').write_text(PROGRAM)
  first, second = memory.buffers_in(tmp_path)
  assert first == memory.Buffer(2**19, 'bf16[512,512] of jit(step)/dot_general')
  assert second.bytes == 4


def test_out_of_memory_error_is_parsed(tmp_path):
  (tmp_path / 'm.after_optimizations-memory-usage-report.txt').write_text(REPORT)
  usage = memory.overflow(OVERFLOW, 2**30, tmp_path)
  assert not usage.fits and usage.limit == 15.75 * 2**30
  assert (usage.temporary, usage.peak) == (456 * 2**30, 457 * 2**30)
  assert len(usage.buffers) == 2
  assert memory.overflow('INTERNAL: something else', 0, tmp_path) is None


def test_totals_equal_xlas_memory_analysis(tmp_path):
  leaf = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  compiled = jax.jit(lambda x: (x @ x) @ x, donate_argnums=0).lower(leaf).compile()
  usage, stats = memory.usage(compiled, tmp_path), compiled.memory_analysis()
  assert usage.arguments == stats.argument_size_in_bytes == 64 * 64 * 4
  assert usage.temporary == stats.temp_size_in_bytes
  assert usage.planned >= usage.arguments + usage.temporary
  # XLA:CPU's peak omits the two temporaries.
  assert stats.peak_memory_in_bytes < usage.temporary and usage.peak == usage.planned


def test_running_out_of_memory_names_the_largest_buffers_and_the_settings(line_config):
  """Tebibytes, which no machine has, so that the allocation fails."""
  config = line_config(optim={'ema': 0.5, 'accumulate': 2}, batch_size=(16,))
  large = jax.jit(lambda x: jnp.sort(jnp.arange(2.0**43) * x)[:3])
  lowered = large.lower(1.0)
  with pytest.raises(UserError) as error, memory.explained('the step', config, 0, lowered):
    jax.block_until_ready(large(1.0))
  text = str(error.value)
  assert '\n' not in text and text.startswith('out of device memory in the step: no room for 32')
  for part in (
    'largest buffers: 32,768.0 GiB', 'f32[8796093022208]', 'batch_size (now 16)', 'fsdp',
    'accumulate (now 2)',
    'remat=full (now none)', 'dtype=bfloat16 (now float32)', 'optim.ema=0 (now 0.5',
  ):  # fmt: skip
    assert part in text, part


def test_errors_of_other_kinds_stay_as_they_are(line_config):
  with pytest.raises(ZeroDivisionError), memory.explained('the step', line_config(), 0):
    raise ZeroDivisionError
  other = jax.errors.JaxRuntimeError('INTERNAL: a failed check')
  with pytest.raises(jax.errors.JaxRuntimeError), memory.explained('it', line_config(), 0):
    raise other


@pytest.mark.parametrize(
  'message, amount',
  [
    (OVERFLOW, 'temporaries need 456.0 GiB and a device has 15.8 GiB'),
    ('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.', 'for 2.0 GiB'),
    ('RESOURCE_EXHAUSTED: Attempting to allocate 3.00GiB. That was not possible.', 'for 3.00GiB'),
    ('RESOURCE_EXHAUSTED: in a new wording\nsecond line', 'in a new wording'),
  ],
)
def test_amounts_are_read_from_the_errors_of_all_platforms(message, amount):
  assert memory.amounts(message).removesuffix(' more').endswith(amount)
