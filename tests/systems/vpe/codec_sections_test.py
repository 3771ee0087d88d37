"""Config sections of codecs: their kinds and frozen networks."""

import dataclasses

import jax.numpy as jnp
import pytest

from vpe_jax.checkpoints.families import ibq, wan_vae
from vpe_jax.codecs import registry
from vpe_jax.config import build_section, to_dict
from vpe_jax.systems.vpe.codec_sections import ImageCodeCodecs, LatentCodecs, NoVisualPrompt

SIGLIP_VQ = {'kind': 'siglip_vq', 'image_size': 160, 'weights': 'OWNER/NAME'}


def _latents(**values):
  return build_section(LatentCodecs, values)


def test_the_default_codecs_are_the_shipped_ones():
  sources = {name: network.source for name, network in _latents().frozen.items()}
  shipped = {name: f'assets:{name}' for name in ('siglip', 'feature_vq', 'image')}
  assert sources == shipped
  codes = build_section(ImageCodeCodecs, {}).frozen
  assert {name: network.source for name, network in codes.items()} == shipped | {
    'image_codes': 'assets:image_codes'
  }


def test_a_published_visual_prompt():
  sections = _latents(visual_prompt=SIGLIP_VQ)
  assert (sections.visual_prompt_tokens, sections.visual_prompt_codes) == (100, 16_384)
  network = sections.frozen['siglip_vq']
  assert network.source == network.published.source == 'OWNER/NAME'
  codec = sections.prompt_codec(jnp.bfloat16)
  assert (codec.grid, codec.codes, codec.network.dtype) == (10, 16_384, jnp.bfloat16)


def test_a_published_tower_comes_from_its_release_by_default():
  for weights, source in (('', 'facebook/dinov2-base'), ('FOLDER', 'FOLDER')):
    prompt = {'encoder': 'dinov2', 'tower_weights': weights}
    network = _latents(visual_prompt=prompt).frozen['dinov2']
    assert (network.source, network.published.family) == (source, 'dinov2')


def test_published_autoencoders_and_tokenizers_keep_the_sizes_of_their_family():
  image = to_dict(wan_vae.RELEASED_SIZES) | {'kind': 'wan_vae', 'weights': 'WAN'}
  network = _latents(image=image).frozen['image']
  assert (network.published.family, network.published.sizes) == ('wan_vae', wan_vae.RELEASED_SIZES)
  image = to_dict(ibq.RELEASED_SIZES) | {'kind': 'ibq', 'weights': 'IBQ'}
  section = build_section(ImageCodeCodecs, {'image': image})
  assert section.frozen['vqgan'].published.sizes == ibq.RELEASED_SIZES
  assert section.image.codec(512).codes == ibq.RELEASED_SIZES.codes


def test_without_a_visual_prompt_there_are_no_codes_and_no_networks():
  sections = _latents(vpe=False)
  assert (sections.visual_prompt_codes, sections.visual_prompt_tokens) == (0, 0)
  assert set(sections.frozen) == {'image'}
  assert isinstance(sections.prompt_codec(jnp.float32), NoVisualPrompt)


@pytest.mark.parametrize(
  'role', [registry.FeatureCodeKinds, registry.LatentKinds, registry.ImageCodeKinds]
)
def test_every_kind_is_a_dataclass_that_names_itself(role):
  for kind, section in role.KINDS.items():
    fields = {field.name: field for field in dataclasses.fields(section)}
    assert 'kind' in fields
    assert fields['kind'].default in role.KINDS, kind
