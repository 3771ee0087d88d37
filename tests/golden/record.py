"""Records golden numbers: python -m tests.golden.record [case ...]

Writes CASE.npz of each case, batches.npz with the arrays of all batches (arrays that cases share
are stored once), and commit.json. Run it on the commit whose numbers become the reference; check.py
compares other commits with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from tests.golden import adapter, parameters
from tests.golden.adapter import Arrays, Setup
from tests.golden.cases import PROMPTS, Case, select

FOLDER = Path(__file__).parent
BATCHES = FOLDER / 'batches.npz'
COMMIT = FOLDER / 'commit.json'
STEPS = 10
_TRAINING, _READ = 2, 3  # batches that steps train on, and batches that are read


def batches_of(setup: Setup) -> tuple[Arrays, Arrays]:
  """Batches from the pipeline: those that are stored, and checksums of all that are read.

  Returns:
    The inputs of the computations, `train/0/NAME`, `train/1/NAME` and `heldout/NAME`; and
    [crc32, float64 sum] of these arrays, of `train/2/NAME`, and of `raw/NAME` (the held-out batch
    before encoding).
  """
  if len(set(setup.config.batch_size)) != 1:
    raise ValueError(f'batch_size {setup.config.batch_size}: stages must share their batches')
  training, raw, encoded = adapter.read_batches(setup, 0, _READ)
  every = {f'train/{number}': batch for number, batch in enumerate(training)}
  every |= {'raw': raw, 'heldout': encoded}
  flat = {f'{key}/{name}': array for key, batch in every.items() for name, array in batch.items()}
  sums = {
    key: np.array([crc(array), array.astype(np.float64).sum()]) for key, array in flat.items()
  }
  left_out = (f'train/{_TRAINING}/', 'raw/')
  return {key: array for key, array in flat.items() if not key.startswith(left_out)}, sums


def named(arrays: Arrays, prefix: str) -> Arrays:
  """The arrays whose names start with `prefix`, by their names without it."""
  return {
    key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
  }


def measure(case: Case, setup: Setup, batches: Arrays, shapes: Mapping[str, tuple]) -> Arrays:
  """All numbers of a case except those of its batches.

  Args:
    case: the case.
    setup: its system.
    batches: `train/0/`, `train/1/` and `heldout/`.
    shapes: shapes of the parameters by their recorded paths; all lists of leaves have this order.
  """
  paths = sorted(shapes)
  numbers = {'paths': np.array(paths), 'shapes': np.array([json.dumps(shapes[p]) for p in paths])}
  numbers |= _initial(setup, paths)
  leaves = adapter.shipped() if case.shipped else parameters.redrawn(shapes)
  params = adapter.parameters(setup, leaves)
  for index, stage in enumerate(adapter.stages(setup)):
    stage_numbers = _stage(case, setup, index, params, leaves, batches, paths)
    numbers |= {f'stage/{stage}/{name}': value for name, value in stage_numbers.items()}
  if case.samples:
    numbers |= _samples(case, setup, params, named(batches, 'heldout/'))
  if case.shipped:
    images = adapter.shipped_images(PROMPTS)
    numbers |= {f'draw/shipped/{name}': array for name, array in images.items()}
  return numbers


def crc(array: np.ndarray) -> int:
  """A checksum of dtype, shape and every bit of an array."""
  head = f'{array.dtype} {array.shape}'.encode()
  return zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(head))


def write(case: Case) -> Arrays:
  """Records one case; adds its batches to those of other cases."""
  setup = adapter.make(case)
  batches, sums = batches_of(setup)
  numbers = measure(case, setup, batches, adapter.shapes(setup))
  numbers |= {f'read/{key}': value for key, value in sums.items()}
  stored_names = {key: f'{key.split("/")[-1]}-{crc(array):08x}' for key, array in batches.items()}
  numbers |= {f'batch/{key}': np.array(name) for key, name in stored_names.items()}
  stored = dict(np.load(BATCHES)) if BATCHES.exists() else {}
  stored |= {stored_names[key]: array for key, array in batches.items()}
  np.savez_compressed(BATCHES, **stored)
  np.savez_compressed(FOLDER / f'{case.name}.npz', **numbers)
  return numbers


def read(case: Case) -> tuple[Arrays, Arrays]:
  """The recorded numbers of a case, and its batches."""
  numbers = dict(np.load(FOLDER / f'{case.name}.npz'))
  keys = {key.removeprefix('batch/'): str(name) for key, name in numbers.items()
          if key.startswith('batch/')}  # fmt: skip
  with np.load(BATCHES) as stored:
    return numbers, {key: stored[name] for key, name in keys.items()}


def _initial(setup: Setup, paths: list[str]) -> Arrays:
  """Mean, deviation and sum of each fresh leaf; deviation and sum of inherited leaves."""
  fresh, inherited = adapter.initial(setup)
  over = lambda leaves, of: np.array([of(leaves[path].astype(np.float64)) for path in paths])
  numbers = {f'init/{of.__name__}': over(fresh, of) for of in (np.mean, np.std, np.sum)}
  if inherited is not None:
    numbers |= {f'inherit/{of.__name__}': over(inherited, of) for of in (np.std, np.sum)}
  return numbers


def _stage(
  case: Case,
  setup: Setup,
  index: int,
  params: object,
  leaves: Arrays,
  batches: Arrays,
  paths: list[str],
) -> Arrays:
  """Token counts, losses and gradient of the first step, ten steps, and held-out losses."""
  training = [named(batches, f'train/{number}/') for number in range(_TRAINING)]
  terms, gradient = adapter.first_losses(setup, index, params, training[0])
  sizes = adapter.figures(setup.system, index)
  numbers = {
    'figures/names': np.array(sorted(sizes)),
    'figures': np.array([sizes[name] for name in sorted(sizes)]),
    'terms/names': np.array(sorted(terms)),
    'terms': np.array([terms[name] for name in sorted(terms)]),
    **{f'gradient/{name}': value for name, value in _against_probes(gradient, paths).items()},
  }
  if case.shipped:
    return numbers
  held_out = adapter.HeldOut(setup, named(batches, 'heldout/'))
  before = held_out(adapter.fresh_state(setup, index, params))
  logged, state = adapter.train(setup, index, params, training, STEPS)
  names, after = sorted(logged[0]), held_out(state)
  numbers |= {
    'steps/names': np.array(names),
    'steps': np.array([[step[name] for name in names] for step in logged]),
    'heldout/names': np.array(sorted(after)),
    'heldout': np.array([[losses[name] for name in sorted(after)] for losses in (before, after)]),
  }
  for name, final in zip(('params', 'ema'), adapter.trained(state), strict=True):
    moved = {path: final[path].astype(np.float64) - leaves[path] for path in final}
    norms = [np.linalg.norm(final[p]) if p in final else np.nan for p in paths]
    numbers[f'{name}/norm'] = np.array(norms)
    numbers |= {
      f'{name}/moved/{key}': value for key, value in _against_probes(moved, paths).items()
    }
  return numbers


def _against_probes(leaves: Arrays, paths: list[str]) -> Arrays:
  """The norm of each leaf, and its product with a probe; NaN where there is none."""
  norms, products = np.full(len(paths), np.nan), np.full(len(paths), np.nan)
  for number, path in enumerate(paths):
    if path in leaves:
      leaf = leaves[path].astype(np.float64)
      norms[number] = np.linalg.norm(leaf)
      products[number] = np.sum(leaf * parameters.probe(path, leaf.shape))
  return {'norm': norms, 'product': products}


def _samples(case: Case, setup: Setup, params: object, batch: Arrays) -> Arrays:
  """The sets of samples of a case; with few images, as these follow from the latents."""
  sampler, numbers = adapter.Sampler(setup, params, batch), {}
  for number, (name, settings) in enumerate(case.samples.items()):
    samples = sampler(name, settings)
    samples['image'] = samples['image'][: 1 if number else 2]
    numbers |= {f'draw/{name}/{key}': array for key, array in samples.items()}
  return numbers | {f'score/{name}': array for name, array in sampler.scores().items()}


def _commit() -> str:
  process = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], cwd=FOLDER, capture_output=True, text=True, check=True
  )
  return process.stdout.strip()


def main(names: list[str]) -> None:
  """Records the cases with these names, or all."""
  cases = select(names)
  if not names:
    BATCHES.unlink(missing_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    adapter.begin(folder)
    for case in cases:
      start = time.monotonic()
      numbers = write(case)
      size = (FOLDER / f'{case.name}.npz').stat().st_size
      bad = [key for key, value in numbers.items() if _is_broken(key, value)]
      seconds = time.monotonic() - start
      print(f'{case.name}: {size / 1000:.0f} kB, {seconds:.0f} s', *bad, flush=True)
  if not names:
    versions = {'commit': _commit(), 'jax': jax.__version__}
    COMMIT.write_text(json.dumps(versions, indent=1, sort_keys=True) + '\n', encoding='utf-8')


def _is_broken(key: str, value: np.ndarray) -> bool:
  """Whether numbers are infinite or NaN; norms and products of frozen leaves may be NaN."""
  if value.dtype.kind != 'f':
    return False
  return bool(np.isinf(value).any() or ('/norm' not in key and '/product' not in key
                                        and np.isnan(value).any()))  # fmt: skip


if __name__ == '__main__':
  main(sys.argv[1:])
