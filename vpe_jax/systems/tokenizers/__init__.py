"""Training of tokenizers: SigLIP, a codebook of image features, autoencoder, image codes."""

from vpe_jax.systems.package import Package

PACKAGE = Package(
  systems={
    'siglip': 'vpe_jax.systems.tokenizers.siglip',
    'codec': 'vpe_jax.systems.tokenizers.codec',
  }
)
