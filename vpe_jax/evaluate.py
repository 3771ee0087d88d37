r"""Evaluates trained models, and prints a table.

  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=retrieval
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --captions=1024 --guidance=2
  python -m vpe_jax.evaluate --workdir=assets:tiny,runs/t2i-tiny       (a table for each)
  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=best_of,mixes --captions=256 \
      --set=best_of.plans=16 --set=mixes.count=64
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --benchmarks=heldout,sample_grid
  python -m vpe_jax.evaluate --workdir=runs/edit-tiny                  (edits: are they done?)
  python -m vpe_jax.evaluate --workdir=runs/c2i_discrete-tiny          (classes, Frechet distance)
  python -m vpe_jax.evaluate --workdir=runs/text_rendering-tiny        (ocr: pip install -e .[eval])

The same evaluators run in training, as `config.evals` names them. Beside the table, a JSON with the
whole protocol and a sheet of images go to RUN/evaluation (evaluation/ in the current folder for
shipped weights and files of weights). Of several runs, the first one's folder also gets sheets with
the rows of all, named -compared-.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from absl import flags

from vpe_jax import devices, front_door
from vpe_jax.checkpoints import weights
from vpe_jax.contracts import UserError
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation import runner
from vpe_jax.evaluation.evaluator import Evaluator, Subject

FLAGS = flags.FLAGS
_SHARED = ('captions', 'splits', 'seed', 'judge')  # options of several evaluators


def _define_flags() -> None:
  flags.DEFINE_list('workdir', [], 'a run, local or gs://, assets:tiny, a file; or several, a,b')
  names = ', '.join(evaluators.names())
  flags.DEFINE_list('benchmarks', [], f'of {names} (default: the one for the kind of prompt)')
  flags.DEFINE_multi_string('set', [], 'an option of an evaluator: NAME.OPTION=VALUE')
  flags.DEFINE_integer('captions', 512, 'captions of each split')
  flags.DEFINE_list('splits', ['combination', 'concept'], 'held-out splits')
  flags.DEFINE_integer('seed', 0, 'of the captions and of sampling')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'averaged weights, or those of the last step')
  flags.DEFINE_string('judge', 'assets:judge', 'the SigLIP that evaluates')
  flags.DEFINE_string('out', None, 'folder for the reports (default: RUN/evaluation)')
  flags.DEFINE_integer('rows', 32, 'images that are sampled at a time')
  front_door.define_settings()
  flags.adopt_module_key_flags(front_door)  # So that --help lists them.


def _options() -> dict[str, dict[str, Any]]:
  """The options of --set, by evaluator."""
  options: dict[str, dict[str, Any]] = {}
  for setting in FLAGS.set:
    key, equals, text = setting.partition('=')
    name, dot, option = key.partition('.')
    if not (equals and dot):
      raise UserError(f'--set={setting}: write NAME.OPTION=VALUE, such as best_of.plans=16')
    if name not in FLAGS.benchmarks:
      raise UserError(f'--set={setting}: --benchmarks does not name {name}')
    options.setdefault(name, {})[option] = yaml.safe_load(text)
  return options


def _build() -> dict[str, Evaluator]:
  """The evaluators that the flags name, with their options."""
  options, built = _options(), {}
  for name in FLAGS.benchmarks:
    known = {field.name for field in dataclasses.fields(evaluators.class_of(name))}
    shared = {option: FLAGS[option].value for option in _SHARED if option in known}
    built[name] = evaluators.build(name, shared | options.get(name, {}))
  return built


def _load(workdir: str) -> Subject:
  overrides = front_door.settings()
  return Subject.load(workdir, FLAGS.weights, FLAGS.rows, FLAGS.seed, overrides)


def _folder(workdir: str) -> str:
  """The folder for the reports of a run."""
  if FLAGS.out is not None:
    return front_door.target('out', FLAGS.out)
  return 'evaluation' if weights.is_file(workdir) else f'{workdir}/evaluation'


def main() -> None:
  """Runs the command."""
  if not FLAGS.workdir:
    raise UserError('--workdir is missing: name a run, or assets:tiny for the shipped weights')
  built = _build()
  devices.use_compilation_cache()
  # Sampling takes minutes: mistakes in the last run are found before the first one samples.
  subjects = {workdir: _load(workdir) for workdir in FLAGS.workdir}
  folders = {workdir: _folder(workdir) for workdir in subjects}
  shared = {option: FLAGS[option].value for option in _SHARED}
  chosen = {workdir: runner.chosen(built, one, shared) for workdir, one in subjects.items()}
  for folder in folders.values():
    front_door.check_folder(folder)
  runner.evaluate(chosen, subjects, folders)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
