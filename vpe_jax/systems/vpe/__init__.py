"""Imagine Before You Draw (arXiv 2606.04457): visual prompts in text, class and edit models."""

from vpe_jax.systems.package import Package

PACKAGE = Package(
  systems={
    't2i': 'vpe_jax.systems.t2i',
    'edit': 'vpe_jax.systems.editing',
    'c2i_discrete': 'vpe_jax.systems.c2i_discrete',
    'c2i_continuous': 'vpe_jax.systems.c2i_continuous',
    'siglip': 'vpe_jax.systems.siglip',
    'codec': 'vpe_jax.systems.codec',
  },
  sample_options=('vpe_jax.systems.vpe.visual_prompts.flags',),
  evaluators={
    'best_of': 'vpe_jax.systems.vpe.visual_prompts.benchmark:BestOf',
    'mixes': 'vpe_jax.systems.vpe.visual_prompts.benchmark:Mixes',
  },
)
