"""Tests of the bound on a step's time and of the report."""

from __future__ import annotations

import dataclasses

import pytest

from vpe_jax.compilation import report, roofline, topology, traffic
from vpe_jax.devices import CHIPS
from vpe_jax.training import memory

CHIP = CHIPS['v5e']


def _collective(received: float, slices: int = 1) -> traffic.Collective:
  return traffic.Collective('all-gather', 'x', '', (), 1.0, 8, slices, received)


def _work(flops: float = 0.0, hbm: float = 0.0, *collectives) -> traffic.Work:
  return traffic.Work(flops, hbm, collectives, 1.0, ())


@pytest.mark.parametrize(
  'resource, work',
  [
    ('compute', _work(CHIP.peak_flops, 0.5 * CHIP.hbm_bandwidth)),
    ('hbm', _work(0.1 * CHIP.peak_flops, CHIP.hbm_bandwidth)),
    ('ici', _work(0.1 * CHIP.peak_flops, 0.0, _collective(CHIP.ici_bandwidth))),
    ('dcn', _work(0.1 * CHIP.peak_flops, 0.0, _collective(7 * CHIP.dcn_bandwidth, 2))),
  ],
)
def test_slowest_resource_limits_the_step(resource, work):
  bound = roofline.bound(work, 0.0, 0.5 * CHIP.peak_flops, CHIP)
  assert bound.resource == resource
  assert bound.step_time == pytest.approx(1.0)
  assert bound.mfu == pytest.approx(0.5)


def test_flops_of_kernels_are_added():
  bound = roofline.bound(_work(CHIP.peak_flops), CHIP.peak_flops, CHIP.peak_flops, CHIP)
  assert (bound.step_time, bound.mfu) == (pytest.approx(2.0), pytest.approx(0.5))


@pytest.fixture
def fitting_report() -> report.Report:
  """A report of a step that uses half of the memory of 16 chips."""
  usage = memory.Usage(4e9, 3e9, 3e9, 4e9, 1e6, 7.5e9)
  work = _work(CHIP.peak_flops, CHIP.hbm_bandwidth, _collective(2e9))
  return report.Report(
    config='t2i:pod', stage='joint', program='train', topology=topology.parse('v5e:4x4'),
    mesh={'data': 4, 'fsdp': 4, 'tensor': 1},
    settings={'strategy': 'fsdp', 'remat': 'full', 'accumulate': 1, 'logits_chunk': 193},
    images=128, parameters=(4_166_286_560, 4_166_286_560), frozen_bytes=0.0, usage=usage,
    model_flops=8 * CHIP.peak_flops, kernel_flops=0.0, work=work,
    bound=roofline.bound(work, 0.0, CHIP.peak_flops / 2, CHIP), warnings=('a leaf is whole',),
    compile_seconds=1.0, versions={},
  )  # fmt: skip


def test_report_text_has_all_figures(fitting_report):
  text = fitting_report.text()
  assert fitting_report.fits and 'DOES NOT FIT' not in text
  for part in (
    't2i:pod', 'stage joint', 'v5e:4x4 (v5litepod-16): 16 chips', '128 images, 8 per chip',
    '4,166.3M', 'peak 7.50 GB, 44.3% of 16.91 GB HBM', 'arguments 4.00 GB', 'temporaries 4.00 GB',
    'all-gather 2.00 GB', 'at least 1.000 s (limited by compute)', 'MFU at most 50.0%',
    '128 images/s', 'warning: a leaf is whole',
  ):  # fmt: skip
    assert part in text, part


def test_report_of_a_program_that_does_not_fit_suggests_settings(fitting_report):
  buffers = (memory.Buffer(3e9, 'f32[8,577,168055]'),)
  usage = memory.Usage(4e9, 0, 0, 20e9, 0, 24e9, buffers, 15.75 * 2**30, fits=False)
  too_large = dataclasses.replace(fitting_report, usage=usage)
  assert not too_large.fits and too_large.as_dict()['hbm_fraction'] > 1
  text = too_large.text()
  for part in ('DOES NOT FIT', '3.00 GB  f32[8,577,168055]', 'accumulate=2', 'images_per_chip=4'):
    assert part in text, part
  assert 'remat=full' not in text.split('to reduce memory')[1]  # already set
  # Fits in HBM, but leaves too little for the runtime.
  tight = dataclasses.replace(
    fitting_report, usage=dataclasses.replace(usage, fits=True, peak=16e9)
  )
  assert not tight.fits


def test_suggested_settings_reduce_memory(fitting_report):
  settings = {'remat': 'none', 'accumulate': 2, 'strategy': 'fsdp', 'logits_chunk': 0}
  knobs = ' '.join(dataclasses.replace(fitting_report, settings=settings).knobs())
  for part in ('remat=full', 'accumulate=4', 'images_per_chip=4', 'logits_chunk', 'mesh'):
    assert part in knobs, part
  sampling = dataclasses.replace(fitting_report, program='sample', images=16).knobs()
  assert len(sampling) == 1 and 'mesh' in sampling[0]  # one image per chip, no backward pass
