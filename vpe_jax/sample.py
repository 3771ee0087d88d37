r"""Generates images from prompts with a trained model.

  python -m vpe_jax.sample --workdir=assets:tiny --prompt="a red fox" --out=fox.png
  python -m vpe_jax.sample --workdir=runs/t2i-tiny --prompt="two green pears" --n=4 --seed=1
  python -m vpe_jax.sample --workdir=RUN --prompts=prompts.txt --n=2 --out=images/
  python -m vpe_jax.sample --workdir=RUN --prompt="a red fox" --plans=16 --render=4 \
      --save_visual_prompt=foxes.json
  python -m vpe_jax.sample --workdir=RUN --visual_prompt=foxes.json --out=again.png
  python -m vpe_jax.sample --workdir=runs/edit-tiny --image=before.png --prompt="remove the fox"

The output is one file (of several images: a captioned sheet), or a folder, ending in /, with a file
for each image. PNG text chunks record how each image was made.
"""

import os

from absl import flags

from vpe_jax import front_door, rng, storage, systems
from vpe_jax.contracts import DTYPES, UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.transforms import read_image
from vpe_jax.generator import Generator
from vpe_jax.sampling import batches, images

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'a run, local or gs://, or assets:tiny')
  flags.DEFINE_string('prompt', None, 'the prompt')
  flags.DEFINE_string('prompts', None, 'a text file with one prompt a line')
  flags.DEFINE_string('image', None, 'an image to edit: the prompt is the instruction')
  flags.DEFINE_integer('n', 1, 'images per prompt')
  flags.DEFINE_integer('seed', 0, 'seed of all images')
  flags.DEFINE_string('out', 'sample.png', 'a PNG file, or a folder ending in /')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'moving average, or weights of the last step')
  flags.DEFINE_integer('step', None, 'step of the checkpoint (default: the newest)')
  dtypes = 'of weights and computation (default: float32 on a CPU, else bfloat16)'
  flags.DEFINE_enum('dtype', None, DTYPES, dtypes)
  flags.DEFINE_bool('overwrite', False, 'replace existing files')
  flags.DEFINE_bool('sheet', False, 'write a captioned sheet also of a single image')
  flags.DEFINE_bool('no_metadata', False, 'write no text chunks')
  front_door.define_settings()
  options = systems.sample_options()
  for option in options:
    option.define()
  for module in (front_door, *options):
    flags.adopt_module_key_flags(module)  # so that --help lists their flags


def _prompts(optional: bool) -> list[str]:
  if optional and FLAGS.prompt is None and FLAGS.prompts is None:
    return []
  cure = 'the prompt is missing: give one of --prompt="..." and --prompts=FILE'
  if front_door.require_one('prompt', 'prompts', cure=cure) == 'prompt':
    return bpe.tidied([FLAGS.prompt])
  return bpe.read_prompts(os.path.expanduser(FLAGS.prompts), f'--prompts={FLAGS.prompts}')


def main() -> None:
  """Runs the command."""
  front_door.require_flags('workdir', cure='name a run, or assets:tiny for the shipped weights')
  if FLAGS.n < 1:
    raise UserError(f'--n={FLAGS.n} images per prompt: give at least 1')
  rng.check_seed(FLAGS.seed)
  options = systems.sample_options()
  requests = [request for option in options if (request := option.requested())]
  request = requests[0] if requests else None
  prompts = _prompts(optional=request is not None and request.prompts_optional)
  out, count = front_door.output_path('out', FLAGS.out), len(prompts) * FLAGS.n
  if request is not None:
    request = request.with_prompts(prompts)
    count = request.count(len(prompts), FLAGS.n)
  if count > front_door.MAX_IMAGES:
    raise UserError(f'these are {count:,} images: at most {front_door.MAX_IMAGES:,} in a call')
  front_door.check_folder(os.path.dirname(out))
  images.output_files(out, count, FLAGS.overwrite)
  source = None if FLAGS.image is None else read_image(storage.local_path(FLAGS.image))
  generator = Generator.load(FLAGS.workdir, FLAGS.weights, step=FLAGS.step, dtype=FLAGS.dtype)
  if source is not None:
    generator = generator.editing(source)
  settings = generator.settings(**front_door.settings())
  arguments = (prompts, FLAGS.n, FLAGS.seed, settings)
  with batches.progress_bar() as progress:
    if request is None:
      generated = generator(*arguments, progress=progress)
    else:
      generated = request.generate(generator, *arguments, progress)
  images.save_all(generated, out, not FLAGS.no_metadata, FLAGS.overwrite, FLAGS.sheet)
  if request is not None:
    request.save(generator, generated, FLAGS.overwrite)
  noun = 'image' if len(generated) == 1 else 'images'
  print(f'wrote {len(generated)} {noun} to {out}')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main, cache_programs=True)
