"""Scores a trained model on held-out captions, and prints a table.

  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=retrieval
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --captions=1024 --guidance=2
  python -m vpe_jax.evaluate --workdir=assets:tiny,runs/t2i-tiny       (a table for each)
  python -m vpe_jax.evaluate --workdir=assets:tiny --best_of=16 --mixes=64 --captions=256

Beside the table it writes a JSON with the whole protocol, and a sheet of pictures, to
RUN/evaluation (evaluation/ in the current folder for shipped weights and files of weights).
"""

import functools
from collections.abc import Callable

import numpy as np
from absl import flags
from tqdm import tqdm

from vpe_jax import front_door
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import runner
from vpe_jax.evaluation.report import Options, Planner, Subject
from vpe_jax.generator import Generator
from vpe_jax.sampling.pictures import Picture
from vpe_jax.training import machine

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_list('workdir', [], 'a run, local or gs://, assets:tiny, a file; or several, a,b')
  flags.DEFINE_list('benchmarks', [], 'what to run (default: retrieval, or what flags ask for)')
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


def _subject(workdir: str) -> Subject:
  generator = Generator.load(workdir, FLAGS.weights, FLAGS.rows)
  settings = generator.settings(**front_door.settings())

  def drawn(pictures: Callable[..., list[Picture]], count: int) -> np.ndarray:
    with tqdm(total=count, desc='drawing', unit='picture') as bar:
      found = pictures(FLAGS.seed, settings, progress=lambda done, _: bar.update(done - bar.n))
    return np.stack([picture.image for picture in found])

  def draw(captions: list[str]) -> np.ndarray:
    return drawn(functools.partial(generator, captions, 1), len(captions))

  planner = None
  if generator.has_plans:
    planner = Planner(
      plan=lambda captions, n: generator.plan(captions, n, FLAGS.seed, settings),
      score=generator.score,
      render=lambda plans: drawn(functools.partial(generator.render, plans), len(plans)),
      read=lambda pictures: generator.read(list(pictures)).codes,
      rankers=generator.rankers,
    )
  size = generator.system.config.data.image_size
  return Subject(draw, size, generator.describe(settings), planner)


def _benchmarks() -> list[str]:
  """Those that are named, and those that flags of their own ask for."""
  asked = [name for name in ('best_of', 'mixes') if getattr(FLAGS, name)]
  return list(dict.fromkeys([*FLAGS.benchmarks, *asked])) or ['retrieval']


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
  scale = (FLAGS.captions, tuple(FLAGS.splits), FLAGS.seed, FLAGS.judge)
  options, names = Options(*scale, FLAGS.best_of, FLAGS.mixes), _benchmarks()
  runner.check(names, options)
  machine.use_compilation_cache()
  # Drawing takes minutes: mistakes in the last run are found before the first one draws.
  subjects = {workdir: _subject(workdir) for workdir in FLAGS.workdir}
  for workdir in subjects:
    front_door.check_folder(_folder(workdir))
  for workdir, subject in subjects.items():
    reports = runner.run(names, subject, options)
    lines = [line for report in reports.values() for line in report.lines]
    # Before anything is written, so that nothing is lost if that fails.
    print('\n'.join([f'== {workdir}', *lines]), flush=True)
    written = runner.save(reports, _folder(workdir), runner.stem(subject, options))
    print('\n'.join(f'wrote {path}' for path in written), flush=True)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
