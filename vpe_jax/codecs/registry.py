"""The codecs that a config section can select by its `kind`.

To add a codec, write its network and config section in a file of this folder and add a line here; a
published codec also needs a family and a table in checkpoints/. Sections implement the protocols of
vpe_jax.codecs.protocol.
"""

from __future__ import annotations

from vpe_jax.codecs import feature_vq, image_codes, kl, kl_vae, siglip_vq, vqgan
from vpe_jax.config import Tagged


class FeatureCodeKinds(Tagged):
  """The section of a FeatureCodec (protocol.FeatureCodeSection)."""

  KINDS = {
    'feature_vq': feature_vq.FeatureVqSection,
    'siglip_vq': siglip_vq.SiglipVqSection,
  }


class LatentKinds(Tagged):
  """The section of a LatentCodec (protocol.LatentSection)."""

  KINDS = {
    'kl': kl.KlSection,
    'kl_vae': kl_vae.KlVaeSection,
    'wan_vae': kl_vae.KlVaeSection,
  }


class ImageCodeKinds(Tagged):
  """The section of an ImageCodec (protocol.ImageCodeSection)."""

  KINDS = {
    'image_codes': image_codes.ImageCodesSection,
    'ibq': vqgan.VqGanSection,
    'llamagen_vq': vqgan.VqGanSection,
  }
