"""Flags of vpe_jax.sample that save, read, choose and render visual prompts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from absl import flags

from vpe_jax import front_door, storage
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.transforms import read_image
from vpe_jax.generator import Generator
from vpe_jax.sampling.batches import Progress
from vpe_jax.sampling.images import GeneratedImage
from vpe_jax.systems.vpe.visual_prompts import files
from vpe_jax.systems.vpe.visual_prompts.prompter import ENTRY, RANKERS, VisualPrompter

FLAGS = flags.FLAGS
_SOURCES = ('visual_prompt', 'visual_prompt_from', 'plans')  # mutually exclusive


def define() -> None:
  """Defines the flags."""
  flags.DEFINE_string('save_visual_prompt', None, 'save the visual prompts to this .json or .npz')
  flags.DEFINE_string('visual_prompt', None, 'render the visual prompts of this file')
  flags.DEFINE_string('visual_prompt_from', None, 'render the visual prompt of this image')
  flags.DEFINE_integer('plans', None, 'visual prompts to write for each prompt; the best are used')
  flags.DEFINE_integer('render', 1, 'images to render from the best of --plans')
  flags.DEFINE_enum('rank', 'likelihood', RANKERS, 'ranking criterion of --plans')


@dataclasses.dataclass(frozen=True)
class VisualPromptRequest:
  """Where visual prompts come from, and where they are saved.

  Attributes:
    loaded: visual prompts to render, from a file; None without one.
    image: path of an image whose visual prompt is rendered; '' for none.
    plans: visual prompts to write for each prompt; 0: one for each image.
    render: number of images to render, from the best of `plans`.
    rank: ranking criterion, see VisualPrompter.score.
    save_to: file to save the visual prompts to; '' for none.
  """

  loaded: files.VisualPrompts | None
  image: str
  plans: int
  render: int
  rank: str
  save_to: str

  @property
  def prompts_optional(self) -> bool:
    """Whether a call needs no prompts of its own: a file has them."""
    return self.loaded is not None

  def with_prompts(self, prompts: Sequence[str]) -> VisualPromptRequest:
    """The request with prompts, which replace those of the file; without any the file's are kept.

    Raises:
      UserError: a visual prompt has no prompt, or their numbers don't match.
    """
    if self.loaded is None:
      return self
    loaded = self.loaded.with_prompts(prompts) if prompts else self.loaded
    if blank := [i for i, prompt in enumerate(loaded.prompts) if not prompt.strip()]:
      raise UserError(
        f'visual prompt {blank[0]} has no prompt: write one to the file, or give --prompt'
      )
    return dataclasses.replace(self, loaded=loaded)

  def count(self, prompts: int, n: int) -> int:
    """Number of images.

    Raises:
      UserError: there are more visual prompts to write than one call may generate images.
    """
    if self.loaded is not None:
      return len(self.loaded)
    if prompts * self.plans > front_door.MAX_IMAGES:
      raise UserError(
        f'--plans={self.plans} writes {prompts * self.plans:,} visual prompts: at most '
        f'{front_door.MAX_IMAGES:,} in a call'
      )
    return prompts * (self.render if self.plans else n)

  def generate(
    self,
    generator: Generator,
    prompts: Sequence[str],
    n: int,
    seed: int,
    settings: SampleConfig,
    progress: Progress | None = None,
  ) -> list[GeneratedImage]:
    """Generates the images.

    Raises:
      UserError: the model writes no visual prompts, has another codebook, or can't rank them.
    """
    prompter = VisualPrompter(generator)
    if self.save_to:
      prompter.check_codebook()
    if self.loaded is not None:
      return prompter.render(self.loaded, seed, settings, progress=progress)
    if self.plans:
      selection = (self.plans, self.render, self.rank)
      options = {'seed': seed, 'settings': settings, 'progress': progress}
      return prompter.best_of(prompts, *selection, **options)
    if not self.image:
      return generator(prompts, n, seed, settings, progress=progress)
    codes = prompter.read([read_image(self.image)]).codes[0]
    images = generator(prompts, n, seed, settings, fixed={ENTRY: codes}, progress=progress)
    return [image.with_metadata(visual_prompt=f'read from {self.image}') for image in images]

  def save(self, generator: Generator, images: Sequence[GeneratedImage], overwrite: bool) -> None:
    """Saves the visual prompts of the images if --save_visual_prompt is given."""
    if self.save_to:
      VisualPrompter(generator).of(images).save(self.save_to, overwrite)


def requested() -> VisualPromptRequest | None:
  """The request that the flags make; None if no flag of this module is given.

  Raises:
    UserError: flags that exclude each other, a value out of range, or a file that can't be read or
      written.
  """
  _check_together()
  if not any(FLAGS[name].value is not None for name in (*_SOURCES, 'save_visual_prompt')):
    return None
  loaded, image = None, ''
  if FLAGS.visual_prompt is not None:
    path = front_door.input_path('visual_prompt', FLAGS.visual_prompt)
    loaded = files.load(path)
    provenance = {**loaded.provenance, 'by': f'file {path}'}
    loaded = dataclasses.replace(loaded, provenance=provenance)
  if FLAGS.visual_prompt_from is not None:
    path = front_door.input_path('visual_prompt_from', FLAGS.visual_prompt_from)
    image = str(storage.local_path(path))
    read_image(image)
  save_to = ''
  if FLAGS.save_visual_prompt is not None:
    save_to = front_door.output_path('save_visual_prompt', FLAGS.save_visual_prompt)
    files.check_target(save_to, FLAGS.overwrite)
    front_door.check_folder(os.path.dirname(save_to))
  return VisualPromptRequest(loaded, image, FLAGS.plans or 0, FLAGS.render, FLAGS.rank, save_to)


def _check_together() -> None:
  """Raises UserError for flags that contradict each other."""
  sources = [name for name in _SOURCES if FLAGS[name].value is not None]
  if len(sources) > 1:
    listed = ' and '.join(f'--{name}' for name in sources)
    raise UserError(f'{listed} each say where the visual prompts come from: give one of them')
  if FLAGS.plans is None:
    for name in ('render', 'rank'):
      if FLAGS[name].present:
        raise UserError(f'--{name} needs --plans=N, the number of visual prompts to choose among')
  elif not 1 <= FLAGS.render <= FLAGS.plans:
    raise UserError(
      f'--render={FLAGS.render} of --plans={FLAGS.plans}: render at least 1, and no more than '
      '--plans'
    )
  if FLAGS['n'].present and sources in (['visual_prompt'], ['plans']):
    count = 'one image for each entry' if sources == ['visual_prompt'] else '--render images'
    raise UserError(f'--{sources[0]} generates {count}: leave --n out')
  names = [name for name in ('plan_guidance', 'sample.plan_guidance') if name in FLAGS]
  guided = any(FLAGS[name].value is not None for name in names)
  if guided and sources and sources != ['plans']:
    raise UserError(
      f'--plan_guidance guides visual prompts that the model writes, but --{sources[0]} supplies '
      'one: leave --plan_guidance out'
    )
