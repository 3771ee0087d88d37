"""Compares this code with golden numbers: python -m tests.golden.check [case ...]

Prints a line for each case with the largest error of each kind and the duration, and a line for
each violation; the exit status is 1 if there is any. Batches, parameters and requests are the
recorded ones, so that the pipeline affects `data` alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from tests.golden import adapter, parameters, record
from tests.golden.adapter import Arrays, Setup
from tests.golden.cases import Case, select

TOLERANCES = {
  'data': 1e-5,  # arrays of batches: integers must be equal
  'init': 1e-6,  # sums of fresh leaves whose names are unchanged
  'moments': 6.0,  # mean and deviation of renamed fresh leaves, in standard errors
  'figures': 0.0,  # tokens
  'loss': 1e-6,  # before the first step: loss terms, counts, weights, held-out losses
  'gradient': 1e-5,  # of the first step: total norm, norm of each leaf, products with probes
  'steps': 1e-4,  # logged metrics of ten steps, and held-out losses after them
  'moved': 1e-3,  # changes of parameters and averages in ten steps
  'codes': 0.0,  # sequences of codes that differ
  'latents': 1e-4,  # in deviations of the latents
  'image': 2.0,  # in levels of 255
  'score': 1e-5,  # likelihood and similarity of visual prompts
}
# Discontinuous metrics, which change by whole counts where two numbers tie.
_DISCONTINUOUS = ('accuracy', 'retrieval', 'perplexity')
_JUMP = 0.02  # allowed change of a discontinuous metric
# Norms of leaves are at least this share of the whole gradient in relative errors. Leaves below
# `_SILENT` have a gradient of rounding errors alone, such as the biases of keys without rotation,
# which differ between processors: they must stay below it. Adam moves them in random directions,
# so their changes aren't compared.
_FLOOR, _SILENT = 1e-4, 1e-6
# Slowly rotated entries of key biases have almost no gradient, so Adam amplifies its rounding:
# their changes may differ ten times as much.
_KEY_BIAS, _AMPLIFIED = '/k/bias', 10
# Changes on purpose since the record: case -> kinds of errors that aren't compared.
_CHANGED = {
  # The renderer of External reads [boi], so its embedding no longer trains in stage `edit`.
  'edit_external': ('gradient', 'steps', 'moved'),
}
_TIES = 2  # sets of samples in which one sequence may differ by a tie, if all else is equal

Error = tuple[str, float, str]  # kind, error, and the name of the compared number


def errors(case: Case) -> Iterator[Error]:
  """Compares a case with its record, number by number."""
  stored, batches = record.read(case)
  setup = adapter.make(case)
  yield from _data(setup, stored, batches)
  shapes = dict(zip(stored['paths'].tolist(), map(tuple, map(json.loads, stored['shapes']))))
  if (ours := adapter.shapes(setup)) != shapes:
    differing = [path for path in ours.keys() | shapes if ours.get(path) != shapes.get(path)]
    yield 'init', np.inf, f'paths and shapes of {sorted(differing)}'
    return
  measured = record.measure(case, setup, batches, shapes)
  expected = {key for key in stored if not key.startswith(('read/', 'batch/'))}
  for key in sorted(expected ^ measured.keys()):
    yield 'figures', np.inf, f'{key}, which only one of them has'
  yield from _initial(measured, stored, shapes, adapter.same_name(setup))
  for stage in adapter.stages(setup):
    ours, theirs = (record.named(each, f'stage/{stage}/') for each in (measured, stored))
    for kind, error, name in _stage(ours, theirs, shapes):
      if kind not in _CHANGED.get(case.name, ()):
        yield kind, error, f'{stage}: {name}'
  yield from _samples(measured, stored)


def _data(setup: Setup, stored: Arrays, batches: Arrays) -> Iterator[Error]:
  """Batches of the pipeline: checksums, and values of float arrays whose checksums differ."""
  ours, sums = record.batches_of(setup)
  for key, theirs in record.named(stored, 'read/').items():
    if key not in sums:
      yield 'data', np.inf, f'{key}, which is missing'
      continue
    crc, total = sums[key]
    if crc == theirs[0]:
      yield 'data', 0.0, key
    elif key not in batches:
      yield 'data', abs(total - theirs[1]) / max(abs(theirs[1]), 1.0), f'sum of {key}'
    elif batches[key].dtype.kind != 'f' or ours[key].shape != batches[key].shape:
      yield 'data', np.inf, key
    else:
      yield 'data', float(np.abs(ours[key] - batches[key]).max()), key


def _initial(
  measured: Arrays, stored: Arrays, shapes: dict, same_names: set[str]
) -> Iterator[Error]:
  """Fresh leaves: equal values where names are unchanged, else equal mean and deviation."""
  for number, (path, shape) in enumerate(shapes.items()):
    ours, theirs = (
      {key: each[key][number] for key in each if key.startswith(('init/', 'inherit/'))}
      for each in (measured, stored)
    )
    size, deviation = max(int(np.prod(shape)), 1), theirs['init/std']
    if path not in same_names:
      error = deviation / np.sqrt(size) + 1e-6
      for name in ('mean', 'std'):
        key = f'init/{name}'
        yield 'moments', abs(ours[key] - theirs[key]) / error, f'{key} of {path}'
      continue
    scale = size * (abs(theirs['init/mean']) + deviation) + 1e-9
    yield 'init', abs(ours['init/sum'] - theirs['init/sum']) / scale, path
    if 'inherit/std' in theirs:
      scale = size * (theirs['inherit/std'] + abs(theirs['inherit/sum']) / size) + 1e-9
      yield 'init', abs(ours['inherit/sum'] - theirs['inherit/sum']) / scale, f'inherited {path}'


def _stage(measured: Arrays, stored: Arrays, shapes: dict) -> Iterator[Error]:
  """Compares the numbers of one stage."""
  for kind in ('terms', 'steps', 'heldout'):
    ours, theirs = measured.get(f'{kind}/names'), stored.get(f'{kind}/names')
    if theirs is not None and (ours is None or ours.tolist() != theirs.tolist()):
      yield 'figures', np.inf, f'names of {kind}: {ours}, not {theirs}'
      return
  theirs = dict(zip(stored['figures/names'], stored['figures'], strict=True))
  for name, ours in zip(measured['figures/names'], measured['figures'], strict=True):
    yield 'figures', _relative(ours, theirs[name]), str(name)
  for name, ours, theirs in zip(stored['terms/names'], measured['terms'], stored['terms']):
    for part, a, b in zip(('sum', 'count', 'weight'), ours, theirs):
      yield 'loss', _relative(a, b), f'{part} of {name} at step 1'
  silent = _silent(stored)
  yield from _leaves('gradient', 'gradient', measured, stored, shapes, silent)
  yield 'gradient', float(np.sum(silent & ~_silent(measured))), 'leaves that were silent'
  if 'steps' not in stored:
    return
  for number, name in enumerate(stored['steps/names'].tolist()):
    for step, (a, b) in enumerate(zip(measured['steps'][:, number], stored['steps'][:, number])):
      kind = 'steps' if step else 'gradient' if name == 'grad_norm' else 'loss'
      yield kind, _logged(name, a, b, step), f'{name} at step {step + 1}'
  for number, name in enumerate(stored['heldout/names'].tolist()):
    for kind, a, b in zip(
      ('loss', 'steps'), measured['heldout'][:, number], stored['heldout'][:, number]
    ):
      yield kind, _logged(name, a, b, kind == 'steps'), f'{name}, {kind}'
  for tree in ('params', 'ema'):
    yield from _leaves('moved', f'{tree}/moved', measured, stored, shapes, silent)


def _leaves(
  kind: str,
  key: str,
  measured: Arrays,
  stored: Arrays,
  shapes: dict,
  silent: np.ndarray,
) -> Iterator[Error]:
  """Norms of leaves that aren't silent, and their products with probes, relative to the norms."""
  norms = stored[f'{key}/norm']
  whole = np.sqrt(np.nansum(norms**2))
  for number, (path, shape) in enumerate(shapes.items()):
    ours, theirs = (
      [each[f'{key}/{name}'][number] for name in ('norm', 'product')] for each in (measured, stored)
    )
    if np.isnan(theirs[0]) != np.isnan(ours[0]):
      yield kind, np.inf, f'{key} of {path}, which only one of them has'
    elif not np.isnan(theirs[0]) and not silent[number]:
      scale = max(norms[number], _FLOOR * whole, 1e-12)
      if kind == 'moved' and path.endswith(_KEY_BIAS):
        scale *= _AMPLIFIED
      rms = np.sqrt(np.mean(parameters.probe(path, shape) ** 2))
      yield kind, abs(ours[0] - theirs[0]) / scale, f'{key} of {path}'
      yield kind, abs(ours[1] - theirs[1]) / (scale * rms), f'{key} of {path} against its probe'


def _silent(numbers: Arrays) -> np.ndarray:
  """Leaves whose gradient consists of rounding errors alone."""
  norms = numbers['gradient/norm']
  return norms < _SILENT * np.sqrt(np.nansum(norms**2))


def _samples(measured: Arrays, stored: Arrays) -> Iterator[Error]:
  """Codes, latents and images; latents and images are compared where the codes are equal."""
  for key in [key for key in stored if key.startswith('draw/') and key.endswith('/codes')]:
    name = key.removesuffix('/codes')
    ours, theirs = (record.named(each, f'{name}/') for each in (measured, stored))
    same = np.all(ours['codes'] == theirs['codes'], axis=1)
    if 'latents' in theirs and theirs['latents'].dtype.kind == 'i':
      same &= np.all(ours['latents'] == theirs['latents'], axis=(1, 2))
    yield 'codes', float(np.sum(~same)), f'codes of {name}'
    if 'latents' in theirs and theirs['latents'].dtype.kind == 'f':
      error = np.abs(ours['latents'] - theirs['latents'])[same]
      yield 'latents', float(error.max(initial=0.0) / theirs['latents'].std()), name
    same = same[: len(theirs['image'])]
    error = np.abs(ours['image'].astype(int) - theirs['image'])[same]
    yield 'image', float(error.max(initial=0)), name
  for key in [key for key in stored if key.startswith('score/')]:
    if stored[key].dtype.kind == 'i':
      yield 'codes', float(np.sum(np.any(measured[key] != stored[key], axis=1))), key
    else:
      yield 'score', float(np.max(np.abs(measured[key] / stored[key] - 1))), key


def _relative(ours: float, theirs: float, floor: float = 1e-6) -> float:
  """The relative error; `floor` is the least denominator."""
  if ours == theirs:
    return 0.0
  return abs(ours - theirs) / max(abs(theirs), floor)


def _logged(name: str, ours: float, theirs: float, later: bool | int) -> float:
  """The error of a logged metric; for discontinuous ones 0 or infinity."""
  if later and name.endswith(_DISCONTINUOUS):
    return 0.0 if abs(ours - theirs) <= _JUMP * max(1.0, abs(theirs)) else np.inf
  # A loss may be close to zero as the sum of larger parts.
  return _relative(ours, theirs, 0.1 if name.startswith(('loss', 'eval/')) else 1e-6)


def check(case: Case) -> bool:
  """Compares one case and prints its lines; returns whether there is no violation."""
  start, worst, violations = time.monotonic(), {}, []
  for kind, error, name in errors(case):
    worst[kind] = max(worst.get(kind, 0.0), error)
    if not error <= TOLERANCES[kind]:  # NaN is a violation as well.
      violations.append((kind, error, name))
  ties = [name for kind, error, name in violations if kind == 'codes' and error == 1]
  tied = 0 < len(ties) == len(violations) <= _TIES
  verdict = 'ok' if not violations else 'ok but for a tie' if tied else 'FAILS'
  summary = ' '.join(f'{kind} {error:.2g}' for kind, error in worst.items())
  print(f'{case.name}: {verdict} | {summary} | {time.monotonic() - start:.0f} s', flush=True)
  for kind, error, name in violations[:10]:
    print(f'  {kind}: {name}: {error:.2g} is above {TOLERANCES[kind]:g}', flush=True)
  if len(violations) > 10:
    print(f'  and {len(violations) - 10} more', flush=True)
  return tied or not violations


def main(names: list[str]) -> bool:
  """Checks the cases with these names, or all; returns whether there is no violation."""
  cases = select(names)
  with tempfile.TemporaryDirectory() as folder:
    adapter.begin(folder)
    passed = [check(case) for case in cases]
  print(f'{sum(passed)} of {len(passed)} cases are unchanged')
  return all(passed)


if __name__ == '__main__':
  sys.exit(0 if main(sys.argv[1:]) else 1)
