"""Sampling settings of each system."""

from __future__ import annotations

import dataclasses

from vpe_jax import systems


def test_every_system_has_the_settings_that_its_sampler_reads():
  fields = {
    name: {field.name for field in dataclasses.fields(section)}
    for name, section in systems.sampling_sections().items()
  }
  assert fields['edit'] - fields['t2i'] == {'image_guidance'}
  assert fields['t2i'] - fields['c2i_continuous'] == {'plan_guidance'}
  assert 'steps' not in fields['c2i_discrete'] and 'plan_guidance' in fields['c2i_discrete']
  assert fields['siglip'] == fields['codec'] == set()
