"""Scores a trained model on held-out captions, and prints a table.

  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=retrieval
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --captions=1024 --guidance=2
  python -m vpe_jax.evaluate --workdir=assets:tiny,runs/t2i-tiny       (a table for each)

Beside the table it writes a JSON with the whole protocol, and a sheet of pictures, to
RUN/evaluation (evaluation/ in the current folder for shipped weights and files of weights).
"""

import numpy as np
from absl import flags
from tqdm import tqdm

from vpe_jax import front_door
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import runner
from vpe_jax.generator import Generator
from vpe_jax.training import machine

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_list('workdir', [], 'a run, local or gs://, assets:tiny, a file; or several, a,b')
  flags.DEFINE_list('benchmarks', ['retrieval'], 'what to run')
  flags.DEFINE_integer('captions', 512, 'captions of each split')
  flags.DEFINE_list('splits', ['combination', 'concept'], 'held-out splits')
  flags.DEFINE_integer('seed', 0, 'of the captions and of the drawing')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged, or of the last step')
  flags.DEFINE_string('judge', 'assets:judge', 'the SigLIP that judges')
  flags.DEFINE_string('out', None, 'folder for the reports (default: RUN/evaluation)')
  flags.DEFINE_integer('rows', 32, 'pictures that are drawn at a time')
  front_door.define_settings()
  flags.adopt_module_key_flags(front_door)  # So that --help lists them.


def _subject(workdir: str) -> runner.Subject:
  generator = Generator.load(workdir, FLAGS.weights, FLAGS.rows)
  settings = generator.settings(**front_door.settings())

  def draw(captions: list[str]) -> np.ndarray:
    with tqdm(total=len(captions), desc='drawing', unit='picture') as bar:
      update = lambda done, total: bar.update(done - bar.n)
      drawn = generator(captions, 1, FLAGS.seed, settings, progress=update)
    return np.stack([picture.image for picture in drawn])

  size = generator.system.config.data.image_size
  return runner.Subject(draw, size, generator.describe(settings))


def _folder(workdir: str) -> str:
  """Where the reports of a run go."""
  shipped = workdir.startswith('assets:') or workdir.endswith('.safetensors')
  if FLAGS.out is not None:
    return front_door.target('out', FLAGS.out)
  return 'evaluation' if shipped else f'{workdir}/evaluation'


def main() -> None:
  """Runs the command."""
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: name a run, or assets:tiny for the shipped weights')
  options = runner.Options(FLAGS.captions, tuple(FLAGS.splits), FLAGS.seed, FLAGS.judge)
  runner.check(FLAGS.benchmarks, options)
  machine.use_compilation_cache()
  # Drawing takes minutes: mistakes in the last run are found before the first one draws.
  subjects = {workdir: _subject(workdir) for workdir in FLAGS.workdir}
  for workdir in subjects:
    front_door.check_folder(_folder(workdir))
  for workdir, subject in subjects.items():
    reports = runner.run(FLAGS.benchmarks, subject, options)
    lines = [line for report in reports.values() for line in report.lines]
    # Before anything is written, so that nothing is lost if that fails.
    print('\n'.join([f'== {workdir}', *lines]), flush=True)
    written = runner.save(reports, _folder(workdir), runner.stem(subject, options))
    print('\n'.join(f'wrote {path}' for path in written), flush=True)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
