"""Many elements in batches of one size."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.sampling import batches


@pytest.mark.parametrize('count', [1, 4, 6])
def test_each_element_has_its_result_and_batches_have_one_size(count):
  inputs = {'a': np.arange(count), 'b': np.arange(2 * count).reshape(count, 2)}
  sizes, progress = [], []

  def run(batch):
    sizes.append(batch['b'].shape)
    return batch['a'] * 10, batch['b'].sum(-1)

  tens, sums = batches.in_batches(run, inputs, 4, lambda *args: progress.append(args))
  np.testing.assert_array_equal(tens, 10 * np.arange(count))
  np.testing.assert_array_equal(sums, inputs['b'].sum(-1))
  starts = range(0, count, 4)
  assert sizes == [(4, 2)] * len(starts)
  assert progress == [(min(start + 4, count), count) for start in starts]


def test_a_long_call_shows_its_progress_and_a_short_one_nothing(monkeypatch, capsys):
  def run() -> str:
    with batches.progress_bar() as progress:
      for total in (4, 6):  # Two phases: the bar begins again.
        for finished in range(0, total + 1, 2):
          progress(finished, total)
    return capsys.readouterr().err

  assert run() == ''
  monkeypatch.setattr(batches, 'QUIET_SECONDS', 0.0)
  text = run()
  assert '4/4' in text and '6/6' in text
