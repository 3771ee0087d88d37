"""Image editing with visual prompts: stage 3 of Internal+VPE and External+VPE (arXiv 2606.04457).

Continues a run of `t2i` (`config.start`) with a source image, which a second dual path embeds for
the AR expert. `model.arch=internal` trains everything, on flow matching and on cross-entropy at a
constant weight; the image sees source image, instruction and visual prompt. `model.arch=external`
trains the AR expert on cross-entropy alone: the frozen diffusion expert sees only [boi], whose
embedding is frozen with it, and the visual prompt, so everything that an edit should preserve has
to go through it. Its flow loss is evaluated, but never trained on.

Conditions are dropped as in App. D, by one random draw per example: the instruction (with internal
also the visual prompt, which depends on it), the source image, or, with internal only, both.
"""

from __future__ import annotations

import dataclasses

from vpe_jax.config import Config, check
from vpe_jax.contracts import (
  PARENT,
  Edits,
  Initialization,
  PlansVisually,
  PretrainedWeights,
  Samples,
  Stage,
  UserError,
)
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.settings import check_scales
from vpe_jax.systems.vpe import layouts, text_to_image
from vpe_jax.systems.vpe.dropping import PromptOrSource
from vpe_jax.systems.vpe.unified_system import Parts, UnifiedSystem

INTERNAL = Stage('edit', ('.*',), {'next_token': 1.0, 'flow': 1.0}, ema=True)
EXTERNAL = dataclasses.replace(
  INTERNAL, trainable=('ar/', 'embed/'), losses={'next_token': 1.0}, monitored=('flow',)
)


@dataclasses.dataclass(frozen=True)
class ModelConfig(text_to_image.ModelConfig):
  """The section of `t2i` with a source image; one random draw per example drops conditions.

  Attributes:
    drop: share of examples without any condition; 0 with `arch=external`, whose AR sequences always
      keep one.
    drop_text: share of examples that lack only the instruction; with `arch=internal`, also the
      visual prompt.
    drop_reference: share of examples that lack only the source image.
    eoi: id of the text token that ends the source image.
  """

  references: bool = True
  drop: float = 0.05
  drop_text: float = 0.05
  drop_reference: float = 0.05
  eoi: int = 0
  vp_schedule: str = 'constant'
  ce_start: float = 0.1

  def __post_init__(self) -> None:
    super().__post_init__()
    check(self, 'model.', 'references', self.references, 'true in this system')
    check(self, 'model.', 'vpe', self.vpe, 'true in this system')
    known = ('internal', 'external')
    check(self, 'model.', 'arch', self.arch in known, f'one of {", ".join(known)} in this system')
    known = 0 <= self.eoi < self.text_vocab
    check(self, 'model.', 'eoi', known, f'below text_vocab={self.text_vocab}')
    share = 0 <= self.drop_reference <= 1
    check(self, 'model.', 'drop_reference', share, 'between 0 and 1')
    together = self.drop + self.drop_text + self.drop_reference
    limit = 'at most 1 together with drop_text and drop_reference'
    check(self, 'model.', 'drop', together <= 1, limit)
    none = self.arch == 'internal' or not self.drop
    check(self, 'model.', 'drop', none, '0 with arch=external, whose sequences keep a condition')


@dataclasses.dataclass(frozen=True)
class Sampling(text_to_image.Sampling):
  """Settings of `t2i`, with a second guidance scale.

  Attributes:
    guidance: guidance scale of the instruction (`arch=external`: of the visual prompt); 1 is off.
    image_guidance: guidance scale of the source image (`arch=internal` only); 1 is off.
  """

  image_guidance: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_scales(self, 'image_guidance')


def build(config: Config) -> UnifiedSystem:
  """The system of a config.

  Raises:
    UserError: the config has other stages, data without source images, or no parent run.
  """
  c: ModelConfig = config.model
  if config.stages != (INTERNAL.name,):
    raise UserError(f"config.stages is {config.stages}: this system has one stage, 'edit'")
  if not config.data.source_images:
    raise UserError(
      'this system trains on images before and after an edit: set data.source_images=True, and '
      'data.source to edits or to a folder'
    )
  if not config.has_parent('ar/', 'dit/', 'embed/'):
    raise UserError(
      "stage 'edit' continues a run that generates images: name one of configs/t2i.py of the same "
      'sizes, with --config.start=RUN'
    )
  external = c.arch == 'external'
  stage = text_to_image.with_weight(EXTERNAL if external else INTERNAL, c, config.steps[0])
  return UnifiedSystem(
    config,
    Parts(
      stages=(stage,),
      experts=text_to_image.experts(config),
      dropping=PromptOrSource(c.drop_text, c.drop_reference, c.drop),
      guidance=_visual_prompt_guidance if external else _two_scales,
      # A text tower scores captions, not instructions: no ScoresImages, no `similarity`.
      capabilities=(Samples, PlansVisually, Edits),
      plan_rankers=('likelihood',),
      initialization=_initialization(config),
      # The frozen diffusion expert reads this embedding too.
      frozen_ids=(c.boi,) if external else (),
    ),
  )


def _two_scales(settings: Sampling) -> Guidance:
  """Guidance with one scale for the instruction and one for the source image."""
  scales = settings.guidance, settings.image_guidance
  return Guidance.edit(*scales, layouts.PROMPT, layouts.SOURCE)


def _visual_prompt_guidance(settings: Sampling) -> Guidance:
  """Guidance by the visual prompt, the only condition of the diffusion expert.

  Raises:
    UserError: the settings ask for guidance by the source image.
  """
  if settings.image_guidance != 1.0:
    raise UserError(
      f'sample.image_guidance is {settings.image_guidance:g}, but with model.arch=external the '
      'diffusion expert sees no source image: set it to 1'
    )
  return Guidance.classifier_free(settings.guidance, frozenset({layouts.VISUAL_PROMPT}))


def _initialization(config: Config) -> Initialization:
  """The second dual path: Show-o2's where `model.init_from` names one, else the parent run's.

  All other parameters come from the parent run, and none may be missing there: external's
  diffusion expert is frozen here, so random parameters in it would never train.
  """
  paths = (('dit/dual_path/', 'ar/dual_path/'),)
  grown = (PretrainedWeights(PARENT, config.start, None, paths),)
  if config.model.init_from:
    (weights,) = text_to_image.published(config.model)
    grown = (dataclasses.replace(weights, paths=paths),)
  return Initialization(grown=grown)
