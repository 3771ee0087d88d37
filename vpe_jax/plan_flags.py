"""What vpe_jax.sample is asked about visual prompts: the flags, and the drawing they ask for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from absl import flags

from vpe_jax import front_door
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.transforms import read_image
from vpe_jax.generator import Generator
from vpe_jax.sampling import plans as plans_io
from vpe_jax.sampling.pictures import Picture

FLAGS = flags.FLAGS
_SOURCES = ('visual_prompt', 'visual_prompt_from', 'plans')  # at most one of them is given


def define() -> None:
  """Defines the flags."""
  flags.DEFINE_string('save_visual_prompt', None, 'a .json or .npz that the plans are kept in')
  flags.DEFINE_string('visual_prompt', None, 'a file of plans to render: a picture each')
  flags.DEFINE_string('visual_prompt_from', None, 'a picture whose plan is rendered')
  flags.DEFINE_integer('plans', None, 'write so many plans for each prompt, and draw the best')
  flags.DEFINE_integer('render', 1, 'how many of them')
  flags.DEFINE_enum('rank', 'likelihood', plans_io.RANKERS, 'what the best of them are best by')


@dataclasses.dataclass(frozen=True)
class Wish:
  """Where the visual prompts come from, and where they are kept.

  Attributes:
    given: plans that are rendered; None where no file has them.
    picture: a file of one whose plan is rendered; empty: none.
    plans: visual prompts that are written for each prompt; 0: one for each picture.
    render: how many of these are drawn, the best by `rank`.
    rank: see vpe_jax.generator.Generator.score.
    keep: the file that the plans of the pictures go to; empty: none.
  """

  given: plans_io.Plans | None
  picture: str
  plans: int
  render: int
  rank: str
  keep: str

  def told(self, prompts: Sequence[str]) -> Wish:
    """The wish with prompts, which take the place of those in the file; none keep them.

    Raises:
      UserError: a plan has no prompt, or they are neither one for all nor one for each.
    """
    if self.given is None:
      return self
    given = self.given.told(prompts) if prompts else self.given
    if blank := [i for i, prompt in enumerate(given.prompts) if not prompt.strip()]:
      raise UserError(f'plan {blank[0]} has no prompt: write one to the file, or give --prompt')
    return dataclasses.replace(self, given=given)

  def count(self, prompts: int, n: int) -> int:
    """How many pictures are drawn."""
    if self.given is not None:
      return len(self.given)
    return prompts * (self.render if self.plans else n)

  def draw(
    self, generator: Generator, prompts: Sequence[str], n: int, seed: int, settings: SampleConfig
  ) -> list[Picture]:
    """Draws the pictures.

    Raises:
      UserError: the model has no visual prompts or those of another codebook, or can't rank them.
    """
    if self.keep:
      generator.check_plans()
    if self.given is not None:
      return generator.render(self.given, seed, settings)
    if self.plans:
      chosen = (self.plans, self.render, self.rank)
      return generator.best_of(prompts, *chosen, seed=seed, settings=settings)
    if not self.picture:
      return generator(prompts, n, seed, settings)
    read = generator.read([read_image(self.picture)])
    drawn = generator(prompts, n, seed, settings, codes=read.codes[0])
    return [picture.saying(visual_prompt=f'read from {self.picture}') for picture in drawn]

  def save(self, generator: Generator, drawn: Sequence[Picture], overwrite: bool) -> None:
    """Keeps the plans of what was drawn, where that was asked for."""
    if self.keep:
      generator.plans_of(drawn).save(self.keep, overwrite)


def wish() -> Wish:
  """What the flags ask for, before any work.

  Raises:
    UserError: flags that make no sense together, a value out of range, or a file that can't be read
      or written.
  """
  _check_together()
  given, picture = None, ''
  if FLAGS.visual_prompt is not None:
    path = front_door.target('visual_prompt', FLAGS.visual_prompt)
    given = plans_io.load(path)
    given = dataclasses.replace(given, made={**given.made, 'by': f'given in {path}'})
  if FLAGS.visual_prompt_from is not None:
    picture = front_door.target('visual_prompt_from', FLAGS.visual_prompt_from)
    read_image(picture)
  keep = ''
  if FLAGS.save_visual_prompt is not None:
    keep = front_door.target('save_visual_prompt', FLAGS.save_visual_prompt)
    plans_io.check_target(keep, FLAGS.overwrite)
    front_door.check_folder(os.path.dirname(keep))
  return Wish(given, picture, FLAGS.plans or 0, FLAGS.render, FLAGS.rank, keep)


def _check_together() -> None:
  """Refuses combinations of flags that make no sense."""
  sources = [name for name in _SOURCES if FLAGS[name].value is not None]
  if len(sources) > 1:
    listed = ' and '.join(f'--{name}' for name in sources)
    raise UserError(f'{listed} each say where the visual prompts come from: give one of them')
  if FLAGS.plans is None:
    for name in ('render', 'rank'):
      if FLAGS[name].present:
        raise UserError(f'--{name} chooses among plans: say how many are written, with --plans=N')
  elif not 1 <= FLAGS.render <= FLAGS.plans:
    raise UserError(
      f'--render={FLAGS.render} of --plans={FLAGS.plans}: render at least 1, and no more than these'
    )
  if FLAGS['n'].present and sources in (['visual_prompt'], ['plans']):
    told = 'a picture of each plan in it' if sources == ['visual_prompt'] else '--render pictures'
    raise UserError(f'--{sources[0]} draws {told}: leave --n out')
  if FLAGS.plan_guidance is not None and sources and sources != ['plans']:
    raise UserError(
      f'--plan_guidance leads plans that are written, and --{sources[0]} gives one: leave it out'
    )
