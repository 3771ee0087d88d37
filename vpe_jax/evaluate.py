r"""Evaluates trained models, and prints a table.

  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=retrieval
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --captions=1024 --guidance=2
  python -m vpe_jax.evaluate --workdir=assets:tiny,runs/t2i-tiny       (a table for each)
  python -m vpe_jax.evaluate --workdir=assets:tiny --benchmarks=best_of,mixes --captions=256 \
      --set=best_of.plans=16 --set=mixes.count=64
  python -m vpe_jax.evaluate --workdir=runs/t2i-tiny --benchmarks=heldout,sample_grid
  python -m vpe_jax.evaluate --workdir=runs/edit-tiny                  (edits)
  python -m vpe_jax.evaluate --workdir=runs/c2i_discrete-tiny          (class accuracy, Frechet)
  python -m vpe_jax.evaluate --workdir=runs/text_rendering-tiny        (ocr: pip install -e .[eval])
  python -m vpe_jax.evaluate --workdir=runs/edit-tiny --temperature=0.5 --plan_guidance=2 --steps=50
  python -m vpe_jax.evaluate --workdir=runs/a,runs/b --step=all        (convergence curves)

`config.evals` names the evaluators that also run in training. Each evaluator prints a table.
Benchmarks write their protocol as JSON and, like sample_grid, sheets of images to RUN/evaluation
(for shipped weights and weight files: to evaluation/ in the current folder). For several runs,
sheets that compare them (named -compared-) go to the folder of the first run, and paired
differences of their figures are printed.

Several steps (`--step=500,1000` or `--step=all`) give convergence curves: all numbers with their
intervals at each checkpoint, as convergence-*.json and .png in the folder of the first run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from vpe_jax import front_door
from vpe_jax.contracts import DTYPES
from vpe_jax.evaluation import convergence, runner
from vpe_jax.evaluation import evaluator as evaluators
from vpe_jax.evaluation.evaluator import Evaluator, Subject

FLAGS = flags.FLAGS
_SHARED = ('captions', 'splits', 'seed', 'evaluator_network')  # options of several evaluators


def _define_flags() -> None:
  flags.DEFINE_list(
    'workdir', [], 'a run (local or gs://), assets:tiny or a weight file; several: a,b'
  )
  names = ', '.join(evaluators.names())
  flags.DEFINE_list('benchmarks', [], f'{names} (default: the first that fits the prompts)')
  flags.DEFINE_multi_string('set', [], 'option of an evaluator: NAME.OPTION=VALUE')
  flags.DEFINE_integer('captions', 512, 'number of captions of each split')
  flags.DEFINE_list('splits', ['combination', 'concept'], 'held-out splits')
  flags.DEFINE_integer('seed', 0, 'seed of the captions and of sampling')
  flags.DEFINE_enum('weights', 'ema', ['ema', 'raw'], 'EMA weights or raw weights')
  steps = 'step of the checkpoint (default: the newest); several (500,1000), or all: curves'
  flags.DEFINE_string('step', None, steps)
  dtypes = 'of weights and computation (default: float32 on a CPU, else bfloat16)'
  flags.DEFINE_enum('dtype', None, DTYPES, dtypes)
  flags.DEFINE_string('evaluator_network', 'assets:evaluator_network', 'weights of a SigLIP')
  flags.DEFINE_string('out', None, 'folder for the reports (default: RUN/evaluation)')
  flags.DEFINE_integer('batch_size', 32, 'images per batch of sampling, at least 4')
  front_door.define_settings()
  flags.adopt_module_key_flags(front_door)  # --help lists only flags of the main module.


def _build() -> dict[str, Evaluator]:
  """Builds the evaluators that the flags name."""
  options, built = evaluators.parse_options(FLAGS.set, FLAGS.benchmarks), {}
  for name in FLAGS.benchmarks:
    known = {field.name for field in dataclasses.fields(evaluators.class_of(name))}
    shared = {option: value for option, value in _shared().items() if option in known}
    built[name] = evaluators.build(name, shared | options.get(name, {}))
  return built


def _shared() -> dict[str, Any]:
  """The shared options that flags set; evaluators have defaults of their own."""
  return {option: FLAGS[option].value for option in _SHARED if FLAGS[option].present}


def _load(workdir: str, step: int | None) -> Subject:
  overrides = front_door.settings()
  sampling = FLAGS.batch_size, FLAGS.seed, overrides
  return Subject.load(workdir, FLAGS.weights, *sampling, step, FLAGS.dtype)


def _folder(workdir: str) -> str:
  """The output folder for the reports of a run."""
  if FLAGS.out is not None:
    return front_door.output_path('out', FLAGS.out)
  return runner.report_folder(workdir)


def _converge(built: dict[str, Evaluator], requested: Sequence[int] | str) -> None:
  """Evaluates several checkpoints of each run."""
  steps = {workdir: convergence.choose_steps(workdir, requested) for workdir in FLAGS.workdir}
  # The last checkpoint of each run is loaded first, so that mistakes are reported early.
  subjects = {workdir: _load(workdir, own[-1]) for workdir, own in steps.items()}
  selected = {workdir: runner.select(built, subjects[workdir], _shared()) for workdir in subjects}
  folder = _folder(FLAGS.workdir[0])
  front_door.check_folder(folder)
  runs = {
    workdir: convergence.checkpoints(subjects[workdir], workdir, FLAGS.weights, own)
    for workdir, own in steps.items()
  }
  convergence.evaluate(selected, runs, folder)


def main() -> None:
  """Runs the command."""
  front_door.require_flags('workdir', cure='name a run, or assets:tiny for the shipped weights')
  built, steps = _build(), convergence.parse_steps(FLAGS.step)
  if steps == convergence.ALL or (steps and len(steps) > 1):
    _converge(built, steps)
    return
  # All runs are loaded before the first one samples, so that mistakes are reported early.
  step = steps[0] if steps else None
  subjects = {workdir: _load(workdir, step) for workdir in FLAGS.workdir}
  folders = {workdir: _folder(workdir) for workdir in subjects}
  selected = {workdir: runner.select(built, subjects[workdir], _shared()) for workdir in subjects}
  for folder in folders.values():
    front_door.check_folder(folder)
  runner.evaluate(selected, subjects, folders)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main, cache_programs=True)
