"""Text to image with visual prompts: Internal+VPE and External+VPE (arXiv 2606.04457).

The model writes a visual prompt in discrete SigLIP tokens by next-token prediction, then renders
the image by flow matching. Stage `plan` trains the AR expert on cross-entropy alone; the diffusion
expert is frozen and not run. Then `joint` (`model.arch=internal` or `single`) trains both experts,
flow matching at weight 1 and cross-entropy at the progressive weight of Eq. 3; text and visual
prompt are dropped together for guidance. Or `render` (`model.arch=external`) trains the diffusion
expert alone, on flow matching; it sees only the visual prompt, which is dropped for guidance.

Without visual prompt (`model.vpe=False`) the image is rendered from the text alone, in stage
`joint`, on flow matching. layouts.py defines the sequences; internal.py and external.py join the
experts in two ways; unified_system.py has losses and sampling.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from vpe_jax.codecs.feature_vq import FeatureVqSection
from vpe_jax.config import Config, check, check_nonnegative, did_you_mean
from vpe_jax.contracts import (
  Initialization,
  PlansVisually,
  PretrainedWeights,
  Samples,
  ScoresImages,
  Stage,
  UserError,
)
from vpe_jax.models import unified
from vpe_jax.objectives import schedules
from vpe_jax.objectives.flow_matching import FlowConfig
from vpe_jax.sampling.guidance import Guidance
from vpe_jax.sampling.settings import FlowSampling, TokenSampling, check_scales
from vpe_jax.systems.vpe import layouts
from vpe_jax.systems.vpe.ar_expert import ArExpert
from vpe_jax.systems.vpe.codec_sections import LatentCodecs
from vpe_jax.systems.vpe.dropping import OneCondition
from vpe_jax.systems.vpe.external import RENDER, External
from vpe_jax.systems.vpe.flow_renderer import FlowRenderer
from vpe_jax.systems.vpe.internal import JOINT, PLAN, UNPLANNED, Internal
from vpe_jax.systems.vpe.unified_system import Parts, UnifiedSystem


@dataclasses.dataclass(frozen=True)
class ModelConfig(unified.UnifiedConfig, LatentCodecs):
  """The network's sizes, the frozen codecs, and the weights of the two losses.

  Attributes:
    drop: share of examples without their conditions: in stage `joint` text and visual prompt are
      dropped together, in `render` the visual prompt (the diffusion expert never sees the text).
    drop_text: share of examples whose text alone is dropped, in all stages: the null branch of
      `sample.plan_guidance` (0 in the paper).
    inherit: standard deviation of the initial embeddings, if text takes SigLIP's text table and
      codes take the codebook, each randomly rotated (and projected, if the model is narrower). 0,
      as in the paper: random, or text from `init_from`. Ignored with `data.source=synthetic`, which
      has no codebook.
    init_from: a Show-o2 to start from: both experts take its language model, and the diffusion
      expert also its latent embedding and its head. A folder in the released layout, an import, or
      a hub id (empty: random initialization). Show-o2 has no codes: their embeddings follow
      `inherit`.
    vp_schedule: growth of the cross-entropy's weight in stage `joint` (Eq. 3): `sigmoid` (the
      paper's), `linear`, `constant` (`ce_start` at every step) or `off` (1 at every step).
    ce_start: weight at the start of the stage (lambda_0).
    ce_end: weight at the end of the stage (lambda_1).
    flow: training times and target of the flow; by default, times are shifted as in Show-o2.
    logits_chunk: predicted tokens whose logits exist at a time (0: all).
  """

  drop: float = 0.1
  drop_text: float = 0.0
  inherit: float = 0.0
  init_from: str = ''
  vp_schedule: str = 'sigmoid'
  ce_start: float = 0.03
  ce_end: float = 0.1
  flow: FlowConfig = FlowConfig(shift_by='resolution')
  logits_chunk: int = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    known = self.vp_schedule in schedules.KINDS
    check(self, 'model.', 'vp_schedule', known, f'one of {", ".join(schedules.KINDS)}')
    for name in ('drop', 'drop_text'):
      check(self, 'model.', name, 0 <= getattr(self, name) <= 1, 'between 0 and 1')
    check_nonnegative(self, 'model.', 'inherit', 'ce_start', 'ce_end')
    for name in ('bos', 'boi'):
      known = getattr(self, name) < self.text_vocab
      check(self, 'model.', name, known, f'below text_vocab={self.text_vocab}')
    pairs = {
      'codes': (self.codes, self.visual_prompt_codes),
      'latent_channels': (self.latent_channels, self.image_channels),
    }
    for name, (ours, codec) in pairs.items():
      if ours != codec and (name != 'codes' or self.vpe):
        raise UserError(f'model.{name} is {ours}, but the frozen codec has {codec}: set them equal')
    if not self.vpe and self.arch == 'external':
      raise UserError(
        'model.arch=external renders from the visual prompt alone, but model.vpe=False leaves it '
        'out: set model.vpe=True, or another model.arch'
      )
    if self.inherit and not self.vpe:
      raise UserError(
        'model.inherit takes embeddings from the codec of the visual prompt, but model.vpe=False '
        'leaves it out: set model.inherit=0'
      )
    if self.inherit and not isinstance(self.visual_prompt, FeatureVqSection):
      raise UserError(
        'model.inherit needs model.visual_prompt.kind=feature_vq, but it is '
        f'{self.visual_prompt.kind}: set model.inherit=0'
      )
    if self.inherit and self.visual_prompt.encoder != 'siglip':
      raise UserError(
        'model.inherit takes text embeddings from the embedded SigLIP, but '
        f'model.visual_prompt.encoder={self.visual_prompt.encoder} replaces it: set model.inherit=0'
      )
    if self.inherit and self.text_vocab != self.visual_prompt.siglip.vocabulary:
      raise UserError(
        'model.inherit takes text embeddings from a SigLIP of '
        f'{self.visual_prompt.siglip.vocabulary} tokens, but model.text_vocab is '
        f'{self.text_vocab}: set them equal, or model.inherit=0'
      )


@dataclasses.dataclass(frozen=True)
class Sampling(FlowSampling, TokenSampling):
  """Settings of the visual prompt's tokens and of the image's flow.

  Attributes:
    plan_guidance: classifier-free guidance scale of the visual prompt's logits; 1 is off. It needs
      a model that was trained with `model.drop_text`.
  """

  plan_guidance: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check_scales(self, 'plan_guidance')


def build(config: Config) -> UnifiedSystem:
  """The system of a config.

  Raises:
    UserError: the config asks for source images, or for stages that the architecture lacks.
  """
  c: ModelConfig = config.model
  if c.references:
    raise UserError('model.references is for configs/edit.py: this system has no source images')
  stages = {'internal': (PLAN, JOINT), 'single': (PLAN, JOINT), 'external': (PLAN, RENDER)}[c.arch]
  known = {stage.name: stage for stage in (stages if c.vpe else (UNPLANNED,))}
  _check_stages(config, tuple(known))
  external = c.arch == 'external'
  condition = layouts.VISUAL_PROMPT if external else layouts.PROMPT
  # Only the embedded SigLIP has a text tower for our token ids, and only for ids of its vocabulary.
  # To compare captions with codes, its pooling head must also read features that codes decode to:
  # those of the last layer.
  tower = c.visual_prompt
  embedded = c.vpe and isinstance(tower, FeatureVqSection) and tower.encoder == 'siglip'
  reads_captions = embedded and c.text_vocab <= tower.siglip.vocabulary
  compares = reads_captions and tower.has_text_tower
  return UnifiedSystem(
    config,
    Parts(
      stages=tuple(
        with_weight(known[name], c, steps) for name, steps in zip(config.stages, config.steps)
      ),
      experts=experts(config),
      dropping=OneCondition(condition, c.drop, c.drop_text),
      guidance=lambda settings: Guidance.classifier_free(settings.guidance, frozenset({condition})),
      capabilities=(
        Samples,
        *((PlansVisually,) if c.vpe else ()),
        *((ScoresImages,) if reads_captions else ()),
      ),
      plan_rankers=('likelihood', 'similarity') if compares else ('likelihood',),
      initialization=_initialization(config),
    ),
  )


def experts(config: Config) -> Internal | External:
  """The two experts of a config and their sequences, which have a source image in edits."""
  c: ModelConfig = config.model
  sizes = c if c.vpe else dataclasses.replace(c, codes=0)
  model = unified.Unified(sizes, jnp.dtype(config.dtype), config.remat, config.attention)
  eoi = c.eoi if c.references else 0
  vocabulary = layouts.Vocabulary(c.text_vocab, sizes.codes, c.bos, c.boi, eoi)
  lengths = config.data.text_length, c.visual_prompt_tokens, c.image_tokens
  renderer = FlowRenderer(model, c.flow)
  if c.arch != 'external':
    layout = (layouts.edit if c.references else layouts.text_to_image)(vocabulary, *lengths)
    return Internal(ArExpert(model, vocabulary, layout), renderer)
  if c.references:
    layout = layouts.edit_ar_sequence(vocabulary, *lengths)
  else:
    layout = layouts.ar_sequence(vocabulary, *lengths[:2])
  ar = ArExpert(model, vocabulary, layout)
  return External(ar, renderer, layouts.diffusion_sequence(vocabulary, *lengths[1:]))


def with_weight(stage: Stage, c: ModelConfig, steps: int) -> Stage:
  """The stage; if it has a flow loss, its cross-entropy gets the weight of Eq. 3."""
  if not {'next_token', 'flow'} <= stage.losses.keys():
    return stage
  weight = schedules.Schedule(c.vp_schedule, steps, c.ce_start, c.ce_end, off=1.0)
  return dataclasses.replace(stage, losses={**stage.losses, 'next_token': weight})


def published(c: ModelConfig) -> tuple[PretrainedWeights, ...]:
  """Show-o2, where `model.init_from` names one: its language model goes to both experts."""
  if not c.init_from:
    return ()
  fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(unified.UnifiedConfig)}
  fields |= {'arch': 'single', 'dit': c.ar, 'codes': 0, 'references': False}
  copies = () if c.arch == 'single' else (('ar/', 'dit/'),)
  paths = (('embed/text', 'embed/text'), ('ar/', 'ar/'), *copies, ('dit/', 'dit/'))
  return (PretrainedWeights('showo2', c.init_from, unified.UnifiedConfig(**fields), paths),)


def _initialization(config: Config) -> Initialization:
  """Show-o2, where `model.init_from` names one; embeddings from the codecs (`model.inherit`).

  The parent run may have another `model.condition`, and then lacks the cross-attention.
  """
  c: ModelConfig = config.model
  inherits = c.inherit and config.data.source != 'synthetic'
  return Initialization(
    published(c),
    optional=('dit/layers/cross/',),
    from_frozen=(('embed/', 'the codecs'),) if inherits else (),
  )


def _check_stages(config: Config, known: tuple[str, ...]) -> None:
  """Raises UserError for stages that the architecture lacks, or that can't follow one another."""
  arch = config.model.arch
  for name in config.stages:
    if name == 'plan' and not config.model.vpe:
      raise UserError(
        "stage 'plan' learns to write visual prompts, but model.vpe=False leaves them out: set "
        'config.stages=joint (the config option vpe=false does it)'
      )
    if name in (PLAN.name, JOINT.name, RENDER.name) and name not in known:
      raise UserError(
        f"model.arch={arch} with model.vpe={config.model.vpe} has no stage '{name}', but "
        f"{', '.join(known)} "
        f'(configs/t2i.py:{config.preset},arch={arch} sets them)'
      )
    if name not in known:
      raise UserError(f"no stage '{name}' in this system{did_you_mean(name, known)}")
  order = [known.index(name) for name in config.stages]
  if order != sorted(set(order)):
    raise UserError(
      f'config.stages is {config.stages}: each stage continues the previous one, in the order '
      f'{", ".join(known)}'
    )
  if config.stages[0] == 'render' and not config.has_parent('ar/', 'embed/'):
    raise UserError(
      "stage 'render' freezes the AR expert (ar, embed), and nothing has trained it: name a run "
      'that has, with --config.start=RUN, or run stage plan first'
    )
