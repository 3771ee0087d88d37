"""Records golden numbers: python -m tests.golden.record [case ...]

Writes CASE.npz of each case, batches.npz with the arrays of all batches (each once, whatever cases
share it), and commit.json. Run it on the commit whose numbers are to be kept; check.py compares
others with them.
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
from tests.golden.adapter import Arrays, Made
from tests.golden.cases import PROMPTS, Case, chosen

FOLDER = Path(__file__).parent
BATCHES = FOLDER / 'batches.npz'
COMMIT = FOLDER / 'commit.json'
STEPS = 10
_TRAINING, _SEEN = 2, 3  # batches that steps run over, and that are read


def batches_of(made: Made) -> tuple[Arrays, Arrays]:
  """Batches from the pipeline: those that are kept, and check sums of all that are read.

  Returns:
    `train/0/NAME`, `train/1/NAME` and `heldout/NAME` as they are computed on; and of each array
    that was read [crc32, float64 sum], with `train/2/NAME`, and `raw/NAME`, the held-out batch
    before encoders have seen it.
  """
  if len(set(made.config.batch_size)) != 1:
    raise ValueError(f'batch_size {made.config.batch_size}: stages must share their batches')
  training, raw, encoded = adapter.read_batches(made, 0, _SEEN)
  every = {f'train/{number}': batch for number, batch in enumerate(training)}
  every |= {'raw': raw, 'heldout': encoded}
  flat = {f'{key}/{name}': array for key, batch in every.items() for name, array in batch.items()}
  sums = {
    key: np.array([crc(array), array.astype(np.float64).sum()]) for key, array in flat.items()
  }
  left_out = (f'train/{_TRAINING}/', 'raw/')
  return {key: array for key, array in flat.items() if not key.startswith(left_out)}, sums


def named(batches: Arrays, beginning: str) -> Arrays:
  """One batch of several: what follows `beginning` -> array."""
  return {
    key.removeprefix(beginning): array
    for key, array in batches.items()
    if key.startswith(beginning)
  }


def measure(case: Case, made: Made, batches: Arrays, shapes: Mapping[str, tuple]) -> Arrays:
  """Every number of a case but those of its batches.

  Args:
    case: what is measured.
    made: its system.
    batches: `train/0/`, `train/1/` and `heldout/`.
    shapes: of the parameters, by their old paths; their order is that of every list of leaves.
  """
  paths = sorted(shapes)
  found = {'paths': np.array(paths), 'shapes': np.array([json.dumps(shapes[p]) for p in paths])}
  found |= _initial(made, paths)
  leaves = adapter.shipped() if case.shipped else parameters.redrawn(shapes)
  params = adapter.parameters(made, leaves)
  for index, stage in enumerate(adapter.stages(made)):
    numbers = _stage(case, made, index, params, leaves, batches, paths)
    found |= {f'stage/{stage}/{name}': value for name, value in numbers.items()}
  if case.draws:
    found |= _drawings(case, made, params, named(batches, 'heldout/'))
  if case.shipped:
    pictures = adapter.shipped_pictures(PROMPTS)
    found |= {f'draw/shipped/{name}': array for name, array in pictures.items()}
  return found


def crc(array: np.ndarray) -> int:
  """A checksum of dtype, shape and every bit of an array."""
  head = f'{array.dtype} {array.shape}'.encode()
  return zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(head))


def write(case: Case) -> Arrays:
  """Records one case; batches are added to those of other cases."""
  made = adapter.make(case)
  batches, sums = batches_of(made)
  found = measure(case, made, batches, adapter.shapes(made))
  found |= {f'read/{key}': value for key, value in sums.items()}
  kept = {key: f'{key.split("/")[-1]}-{crc(array):08x}' for key, array in batches.items()}
  found |= {f'batch/{key}': np.array(name) for key, name in kept.items()}
  stored = dict(np.load(BATCHES)) if BATCHES.exists() else {}
  stored |= {kept[key]: array for key, array in batches.items()}
  np.savez_compressed(BATCHES, **stored)
  np.savez_compressed(FOLDER / f'{case.name}.npz', **found)
  return found


def read(case: Case) -> tuple[Arrays, Arrays]:
  """The recorded numbers of a case, and its batches."""
  found = dict(np.load(FOLDER / f'{case.name}.npz'))
  keys = {key.removeprefix('batch/'): str(name) for key, name in found.items()
          if key.startswith('batch/')}  # fmt: skip
  with np.load(BATCHES) as stored:
    return found, {key: stored[name] for key, name in keys.items()}


def _initial(made: Made, paths: list[str]) -> Arrays:
  """Mean, standard deviation and sum of each fresh leaf, and sums of those that inherit."""
  fresh, inherited = adapter.initial(made)
  over = lambda leaves, of: np.array([of(leaves[path].astype(np.float64)) for path in paths])
  found = {f'init/{of.__name__}': over(fresh, of) for of in (np.mean, np.std, np.sum)}
  if inherited is not None:
    found |= {f'inherit/{of.__name__}': over(inherited, of) for of in (np.std, np.sum)}
  return found


def _stage(
  case: Case,
  made: Made,
  index: int,
  params: object,
  leaves: Arrays,
  batches: Arrays,
  paths: list[str],
) -> Arrays:
  """Figures, losses and gradient of the first step, ten steps, and held-out losses."""
  training = [named(batches, f'train/{number}/') for number in range(_TRAINING)]
  terms, gradient = adapter.first_losses(made, index, params, training[0])
  sizes = adapter.figures(made.system, index)
  found = {
    'figures/names': np.array(sorted(sizes)),
    'figures': np.array([sizes[name] for name in sorted(sizes)]),
    'terms/names': np.array(sorted(terms)),
    'terms': np.array([terms[name] for name in sorted(terms)]),
    **{f'gradient/{name}': value for name, value in _against_probes(gradient, paths).items()},
  }
  if case.shipped:
    return found
  held_out = adapter.HeldOut(made, named(batches, 'heldout/'))
  before = held_out(adapter.fresh_state(made, index, params))
  logged, state = adapter.train(made, index, params, training, STEPS)
  names, after = sorted(logged[0]), held_out(state)
  found |= {
    'steps/names': np.array(names),
    'steps': np.array([[step[name] for name in names] for step in logged]),
    'heldout/names': np.array(sorted(after)),
    'heldout': np.array([[losses[name] for name in sorted(after)] for losses in (before, after)]),
  }
  for name, ends in zip(('params', 'ema'), adapter.trained(state), strict=True):
    moved = {path: ends[path].astype(np.float64) - leaves[path] for path in ends}
    norms = [np.linalg.norm(ends[p]) if p in ends else np.nan for p in paths]
    found[f'{name}/norm'] = np.array(norms)
    found |= {f'{name}/moved/{key}': value for key, value in _against_probes(moved, paths).items()}
  return found


def _against_probes(leaves: Arrays, paths: list[str]) -> Arrays:
  """The norm of each leaf, and its product with a probe; NaN where there is none."""
  norms, products = np.full(len(paths), np.nan), np.full(len(paths), np.nan)
  for number, path in enumerate(paths):
    if path in leaves:
      leaf = leaves[path].astype(np.float64)
      norms[number] = np.linalg.norm(leaf)
      products[number] = np.sum(leaf * parameters.probe(path, leaf.shape))
  return {'norm': norms, 'product': products}


def _drawings(case: Case, made: Made, params: object, batch: Arrays) -> Arrays:
  """Each drawing of a case; few of the pictures are kept, as they follow from the latents."""
  drawer, found = adapter.Drawer(made, params, batch), {}
  for number, (name, settings) in enumerate(case.draws.items()):
    drawn = drawer(name, settings)
    drawn['image'] = drawn['image'][: 1 if number else 2]
    found |= {f'draw/{name}/{key}': array for key, array in drawn.items()}
  return found | {f'score/{name}': array for name, array in drawer.scores().items()}


def _commit() -> str:
  said = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], cwd=FOLDER, capture_output=True, text=True, check=True
  )
  return said.stdout.strip()


def main(names: list[str]) -> None:
  """Records the cases with these names, or all."""
  cases = chosen(names)
  if not names:
    BATCHES.unlink(missing_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    adapter.begin(folder)
    for case in cases:
      start = time.monotonic()
      found = write(case)
      size = (FOLDER / f'{case.name}.npz').stat().st_size
      bad = [key for key, value in found.items() if _is_broken(key, value)]
      seconds = time.monotonic() - start
      print(f'{case.name}: {size / 1000:.0f} kB, {seconds:.0f} s', *bad, flush=True)
  if not names:
    versions = {'commit': _commit(), 'jax': jax.__version__}
    COMMIT.write_text(json.dumps(versions, indent=1, sort_keys=True) + '\n', encoding='utf-8')


def _is_broken(key: str, value: np.ndarray) -> bool:
  """Whether numbers that must be finite aren't; leaves that don't train have none."""
  if value.dtype.kind != 'f':
    return False
  return bool(np.isinf(value).any() or ('/norm' not in key and '/product' not in key
                                        and np.isnan(value).any()))  # fmt: skip


if __name__ == '__main__':
  main(sys.argv[1:])
