"""The codecs that a config section can name by its `kind`.

A codec is a line here, its network and config section in a file of this folder, and, where it is
published, a family and a table in checkpoints/. Sections follow vpe_jax.codecs.protocol.
"""

from __future__ import annotations

from vpe_jax.codecs import image_codes, kl, kl_vae, siglip_vq, visual_prompt, vqgan
from vpe_jax.config import Tagged


class VisualPromptSection(Tagged):
  """A codec of visual prompts; its section is a protocol.VisualPromptSection."""

  KINDS = {
    'tower_vq': visual_prompt.TowerVqSection,
    'siglip_vq': siglip_vq.SiglipVqSection,
  }


class LatentSection(Tagged):
  """A codec of latents; its section is a protocol.LatentSection."""

  KINDS = {
    'kl': kl.KlSection,
    'kl_vae': kl_vae.KlVaeSection,
    'wan_vae': kl_vae.KlVaeSection,
  }


class ImageCodeSection(Tagged):
  """A codec of discrete images; its section is a protocol.ImageCodeSection."""

  KINDS = {
    'image_codes': image_codes.ImageCodesSection,
    'ibq': vqgan.VqGanSection,
    'llamagen_vq': vqgan.VqGanSection,
  }
