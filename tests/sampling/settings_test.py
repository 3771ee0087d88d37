"""Sampling settings: groups of fields compose, and a field out of range is named."""

import dataclasses

import pytest

from vpe_jax.contracts import UserError
from vpe_jax.sampling.settings import FlowSampling, TokenSampling


@dataclasses.dataclass(frozen=True)
class _Both(FlowSampling, TokenSampling):
  """A system's own settings."""


def test_groups_compose_and_check_all_their_fields():
  names = {field.name for field in dataclasses.fields(_Both)}
  groups = (FlowSampling, TokenSampling)
  assert names == {field.name for group in groups for field in dataclasses.fields(group)}
  for name, value in (('steps', 0), ('shift', 0.0), ('top_p', 0.0), ('top_k', -1), ('min_p', 2.0)):
    with pytest.raises(UserError, match=f"'sample.{name}'"):
      _Both(**{name: value})
