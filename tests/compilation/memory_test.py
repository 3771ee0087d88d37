"""Tests of parsing the compiler's memory reports and errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vpe_jax.compilation import memory

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
