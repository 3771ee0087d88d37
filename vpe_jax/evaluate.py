"""Scores a trained model on held-out captions, and prints a table.

  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=retrieval
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --captions=1024 --guidance=2
  python -m vpe_jax.evaluate --workdir=assets:tiny,runs/t2i-tiny       (a table for each)
  python -m vpe_jax.evaluate --workdir=assets:tiny --best_of=16 --mixes=64 --captions=256
  python -m vpe_jax.evaluate --workdir=runs/edit-tiny                  (edits: are they done?)
  python -m vpe_jax.evaluate --workdir=runs/c2i_discrete-tiny          (classes, Frechet distance)
  python -m vpe_jax.evaluate --workdir=runs/text_rendering-tiny        (ocr: pip install -e .[eval])

Beside the table it writes a JSON with the whole protocol, and a sheet of pictures, to
RUN/evaluation (evaluation/ in the current folder for shipped weights and files of weights). Of
several runs, the first one's folder also gets sheets with the rows of all, named -compared-.
"""

from absl import flags

from vpe_jax import devices, front_door
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import runner
from vpe_jax.evaluation.report import Options, Subject
from vpe_jax.evaluation.subject import subject
from vpe_jax.generator import Generator

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_list('workdir', [], 'a run, local or gs://, assets:tiny, a file; or several, a,b')
  names = ', '.join(runner.BENCHMARKS)
  flags.DEFINE_list('benchmarks', [], f'of {names} (default: what fits, or what flags ask for)')
  flags.DEFINE_integer('best_of', 0, 'also: the best of so many plans, by each ranker')
  flags.DEFINE_integer('mixes', 0, 'also: so many pairs of plans of each split, mixed')
  flags.DEFINE_integer('captions', 512, 'captions of each split')
  flags.DEFINE_list('splits', ['combination', 'concept'], 'held-out splits')
  flags.DEFINE_integer('seed', 0, 'of the captions and of the drawing')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged, or of the last step')
  flags.DEFINE_string('judge', 'assets:judge', 'the SigLIP that judges')
  flags.DEFINE_string('out', None, 'folder for the reports (default: RUN/evaluation)')
  flags.DEFINE_integer('rows', 32, 'pictures that are drawn at a time')
  front_door.define_settings()
  flags.adopt_module_key_flags(front_door)  # So that --help lists them.


def _load(workdir: str) -> Subject:
  generator = Generator.load(workdir, FLAGS.weights, FLAGS.rows)
  return subject(generator, generator.settings(**front_door.settings()), FLAGS.seed)


def _folder(workdir: str) -> str:
  """Where the reports of a run go."""
  if FLAGS.out is not None:
    return front_door.target('out', FLAGS.out)
  return 'evaluation' if weights.is_file(workdir) else f'{workdir}/evaluation'


def main() -> None:
  """Runs the command."""
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: name a run, or assets:tiny for the shipped weights')
  scale = (FLAGS.captions, tuple(FLAGS.splits), FLAGS.seed, FLAGS.judge)
  options = Options(*scale, FLAGS.best_of, FLAGS.mixes)
  names = runner.asked(FLAGS.benchmarks, options)
  devices.use_compilation_cache()
  # Drawing takes minutes: mistakes in the last run are found before the first one draws.
  subjects = {workdir: _load(workdir) for workdir in FLAGS.workdir}
  folders = {workdir: _folder(workdir) for workdir in subjects}
  for workdir, one in subjects.items():
    runner.chosen(names, one)
    front_door.check_folder(folders[workdir])
  runner.evaluate(names, subjects, options, folders)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
