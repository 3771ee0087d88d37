"""Sizes of networks that no network can have: the error names the field with its path."""

from __future__ import annotations

import dataclasses

import pytest

from vpe_jax.config import build_section, to_dict
from vpe_jax.contracts import UserError
from vpe_jax.models.diffusion_head import HeadConfig
from vpe_jax.models.dual_path import DualPathConfig
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.models.transfusion import TransfusionConfig
from vpe_jax.models.vit import EncoderConfig

BODY = TransformerConfig(width=16, mlp=24, layers=2, heads=4, kv_heads=2, head_width=8)
HEAD = HeadConfig(width=16, mlp=24, layers=2, heads=4, kv_heads=2, head_width=8)


@dataclasses.dataclass(frozen=True)
class _Model:
  head: HeadConfig = HEAD
  body: TransformerConfig = BODY
  dual_path: DualPathConfig = DualPathConfig(EncoderConfig(32, 2, 2, 48), 4)


@pytest.mark.parametrize(
  'change, field',
  [
    ({'head': {'kv_heads': 3}}, 'head.kv_heads'),
    ({'head': {'rope_theta': 0.0}}, 'head.rope_theta'),
    ({'head': {'layers': 0}}, 'head.layers'),
    ({'body': {'head_width': 7}}, 'body.head_width'),
    ({'dual_path': {'encoder': {'activation': 'gelux'}}}, 'dual_path.encoder.activation'),
  ],
)
def test_an_error_names_the_field_with_its_path(change, field):
  assert build_section(_Model, to_dict(_Model())) == _Model()
  with pytest.raises(UserError, match=f"'{field}' is"):
    build_section(_Model, change)


@pytest.mark.parametrize(
  'change, field',
  [
    ({'patch': 3}, 'model.patch'),
    ({'body': dataclasses.replace(BODY, width=18)}, 'model.body.width'),
  ],
)
def test_an_error_of_transfusion_names_the_field_of_the_config(change, field):
  sizes = {'classes': 3, 'prefix_codes': 0, 'prefix_tokens': 0, 'latent_size': 8}
  sizes |= {'latent_channels': 4, 'patch': 2, 'body': BODY}
  with pytest.raises(UserError, match=f"'{field}' is"):
    TransfusionConfig(**sizes | change)
