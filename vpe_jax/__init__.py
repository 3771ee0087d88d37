"""vpe_jax: image generation by vision-language models, in JAX, for TPU pods."""

__version__ = '0.1.0'
