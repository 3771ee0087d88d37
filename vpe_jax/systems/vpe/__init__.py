"""Imagine Before You Draw (arXiv 2606.04457): visual prompts in text, class and edit models."""

from vpe_jax.systems.package import Package

PACKAGE = Package(
  systems={
    't2i': 'vpe_jax.systems.vpe.text_to_image',
    'edit': 'vpe_jax.systems.vpe.editing',
    'c2i_discrete': 'vpe_jax.systems.vpe.class_discrete',
    'c2i_continuous': 'vpe_jax.systems.vpe.class_continuous',
  },
  sample_options=('vpe_jax.systems.vpe.visual_prompts.flags',),
  evaluators={
    'best_of': 'vpe_jax.systems.vpe.visual_prompts.benchmark:BestOf',
    'mixes': 'vpe_jax.systems.vpe.visual_prompts.benchmark:Mixes',
  },
  releases={
    'showo2': 'vpe_jax.systems.vpe.releases:SHOW_O2',
    'llamagen': 'vpe_jax.systems.vpe.releases:LLAMAGEN',
  },
)
