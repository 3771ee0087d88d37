"""Scores a trained model on held-out captions, and prints a table.

  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=retrieval
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --captions=1024 --guidance=2

Beside the table it writes a JSON with the whole protocol, and a sheet of pictures, to
RUN/evaluation (evaluation/ in the current folder for shipped weights).
"""

import sys

import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from vpe_jax.contracts import UserError
from vpe_jax.evaluation import runner
from vpe_jax.generator import Generator
from vpe_jax.training import machine

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string('workdir', None, 'a run, local or gs://, or assets:tiny')
  flags.DEFINE_list('benchmarks', ['retrieval'], 'what to run')
  flags.DEFINE_integer('captions', 512, 'captions of each split')
  flags.DEFINE_list('splits', ['combination', 'concept'], 'held-out splits')
  flags.DEFINE_integer('seed', 0, 'of the captions and of the drawing')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged, or of the last step')
  flags.DEFINE_string('judge', 'assets:judge', 'the SigLIP that judges')
  flags.DEFINE_string('out', None, 'folder for the reports (default: RUN/evaluation)')
  flags.DEFINE_integer('rows', 32, 'pictures that are drawn at a time')
  flags.DEFINE_float('guidance', None, 'classifier-free scale; 1 is off')
  flags.DEFINE_integer('steps', None, 'steps of the flow')
  flags.DEFINE_float('temperature', None, 'of the visual prompt; 0 is greedy')


def _subject() -> runner.Subject:
  generator = Generator.load(FLAGS.workdir, FLAGS.weights, FLAGS.rows)
  settings = generator.settings(
    guidance=FLAGS.guidance, steps=FLAGS.steps, temperature=FLAGS.temperature
  )

  def draw(captions: list[str]) -> np.ndarray:
    with tqdm(total=len(captions), desc='drawing', unit='picture') as bar:
      update = lambda done, total: bar.update(done - bar.n)
      drawn = generator(captions, 1, FLAGS.seed, settings, progress=update)
    return np.stack([picture.image for picture in drawn])

  size = generator.system.config.data.image_size
  return runner.Subject(draw, size, generator.describe(settings))


def main(argv: list[str]) -> None:
  """Runs the command; a user's mistake ends it with one line and status 2."""
  try:
    if len(argv) > 1:
      raise UserError(f"unexpected argument '{argv[1]}': every option is a --flag=value")
    if FLAGS.workdir is None:
      raise UserError('--workdir is missing: name a run, or assets:tiny for the shipped weights')
    options = runner.Options(FLAGS.captions, tuple(FLAGS.splits), FLAGS.seed, FLAGS.judge)
    runner.check(FLAGS.benchmarks, options)
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file that it reads.
    machine.use_compilation_cache()
    subject = _subject()
    reports = runner.run(FLAGS.benchmarks, subject, options)
    own = 'evaluation' if FLAGS.workdir.startswith('assets:') else f'{FLAGS.workdir}/evaluation'
    written = runner.save(reports, FLAGS.out or own, subject.description['checkpoint'])
    print('\n'.join(line for report in reports.values() for line in report.lines))
    print(f'wrote {" ".join(written)}')
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  _define_flags()
  app.run(main)
