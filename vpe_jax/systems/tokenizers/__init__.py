"""Training of tokenizers: SigLIP, the codebook of its features, the autoencoder and its codes."""

from vpe_jax.systems.package import Package

PACKAGE = Package(
  systems={
    'siglip': 'vpe_jax.systems.tokenizers.siglip',
    'codec': 'vpe_jax.systems.tokenizers.codec',
  }
)
