"""Sheets of evaluators are saved to the run's folder, and shown in TensorBoard."""

import types

import numpy as np

from vpe_jax.evaluation.report import Report, Row
from vpe_jax.training.evaluations import Evaluations


def test_each_sheet_is_saved_and_shown(line_system, tmp_path):
  system, shown = line_system(evals={}), []
  show = lambda name, image, step: shown.append((name, image.dtype, image.ndim, step))
  evaluations = Evaluations(system.config, system, None, None, tmp_path, show)
  rows = (Row('generated', np.zeros((2, 8, 8, 3), np.uint8)),)
  report = Report({}, sheets={'': rows, 'concept': rows})
  evaluations._write('edits', types.SimpleNamespace(folder='samples'), report, 3)
  assert {path.name for path in (tmp_path / 'samples').iterdir()} == {
    'step_0000003.png',
    'step_0000003-edits-concept.png',
  }
  assert shown == [('edits', np.uint8, 3, 3), ('edits/concept', np.uint8, 3, 3)]
