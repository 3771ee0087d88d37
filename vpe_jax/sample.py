r"""Draws pictures from prompts with a trained model.

  python -m vpe_jax.sample --workdir=assets:tiny --prompt="a red fox" --out=fox.png
  python -m vpe_jax.sample --workdir=runs/t2i-tiny --prompt="two green pears" --n=4 --seed=1
  python -m vpe_jax.sample --workdir=RUN --prompts=prompts.txt --n=2 --out=pictures/
  python -m vpe_jax.sample --workdir=RUN --prompt="a red fox" --plans=16 --render=4 \
      --save_visual_prompt=foxes.json
  python -m vpe_jax.sample --workdir=RUN --visual_prompt=foxes.json --out=again.png
  python -m vpe_jax.sample --workdir=runs/edit-tiny --image=before.png --prompt="remove the fox"

A file gets a grid, a folder (it ends in /) a file a picture; text chunks say how it was made.
"""

import os

from absl import flags

from vpe_jax import devices, front_door, plan_flags
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.transforms import read_image
from vpe_jax.generator import Generator
from vpe_jax.sampling import pictures

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'a run, local or gs://, or assets:tiny')
  flags.DEFINE_string('prompt', None, 'what to draw')
  flags.DEFINE_string('prompts', None, 'a text file with a prompt a line')
  flags.DEFINE_string('image', None, 'a picture to edit: the prompt says what to do with it')
  flags.DEFINE_integer('n', 1, 'pictures per prompt')
  flags.DEFINE_integer('seed', 0, 'another seed draws other pictures')
  flags.DEFINE_string('out', 'sample.png', 'a PNG file for a grid, or a folder ending in /')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged, or of the last step')
  flags.DEFINE_bool('overwrite', False, 'replace files that exist')
  flags.DEFINE_bool('no_metadata', False, 'leave the text chunks out')
  front_door.define_settings()
  plan_flags.define()
  for module in (front_door, plan_flags):
    flags.adopt_module_key_flags(module)  # So that --help lists them.


def _prompts(optional: bool) -> list[str]:
  if optional and FLAGS.prompt is None and FLAGS.prompts is None:
    return []
  if (FLAGS.prompt is None) == (FLAGS.prompts is None):
    raise UserError('what to draw is missing: give one of --prompt="..." and --prompts=FILE')
  if FLAGS.prompts is None:
    return bpe.tidied([FLAGS.prompt])
  return bpe.read_prompts(os.path.expanduser(FLAGS.prompts), f'--prompts={FLAGS.prompts}')


def main() -> None:
  """Runs the command."""
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: name a run, or assets:tiny for the shipped weights')
  wish = plan_flags.wish()
  prompts, out = _prompts(wish.given is not None), front_door.target('out', FLAGS.out)
  wish = wish.told(prompts)
  front_door.check_folder(os.path.dirname(out))
  pictures.plan_files(out, wish.count(len(prompts), FLAGS.n), FLAGS.overwrite)
  devices.use_compilation_cache()
  image = None if FLAGS.image is None else read_image(os.path.expanduser(FLAGS.image))
  generator = Generator.load(FLAGS.workdir, FLAGS.weights)
  if image is not None:
    generator = generator.editing(image)
  settings = generator.settings(**front_door.settings())
  drawn = wish.draw(generator, prompts, FLAGS.n, FLAGS.seed, settings)
  pictures.save_all(drawn, out, not FLAGS.no_metadata, FLAGS.overwrite)
  wish.save(generator, drawn, FLAGS.overwrite)
  print(f'wrote {len(drawn)} pictures to {out}')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
