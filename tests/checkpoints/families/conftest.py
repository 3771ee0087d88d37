"""What the parity tests of all families share: redrawn reference models, and what to compare."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import re
import types
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.golden import pictures
from vpe_jax.checkpoints import convert, families, sources
from vpe_jax.sharding import by_path

OUTPUTS = 2e-5  # of the largest absolute reference value
GRADIENTS = 1e-4
GOLDEN = Path(__file__).parents[2] / 'golden'
KEYS = GOLDEN / 'keys'


@dataclasses.dataclass(frozen=True)
class Abstract:
  """A published tensor of which only shape and dtype are known."""

  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(np.float32)

  def read(self) -> np.ndarray:
    raise AssertionError('a plan reads no numbers')


def _redraw(model, seed: int = 0):
  """Redraws every parameter of a torch module, in place, so that each of them matters.

  As a library initialises them (norms 1, biases 0, attention nearly uniform), many mistakes pass:
  norms are 1 +- 0.3, biases and tables N(0, 0.3), queries and keys large enough for logits of
  standard deviation 1 and more, other matrices of unit gain.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, leaf in model.named_parameters():
      draw = torch.randn(leaf.shape, generator=generator)
      words = name.lower()
      norm = leaf.ndim <= 1 or words.endswith('gamma')
      if norm and 'bias' not in words and 'logit' not in words:
        leaf.copy_(1 + 0.3 * draw)
      elif leaf.ndim <= 1 or 'position' in words or 'embed' in words.split('.')[-2:][0]:
        leaf.copy_(0.3 * draw)
      else:
        fan_in = max(1, leaf[0].numel())
        sharp = any(
          part in words
          for part in ('q_proj', 'k_proj', 'query', 'key', 'qkv', 'in_proj', 'to_q', 'to_k')
        )
        leaf.copy_(draw * (2.0 if sharp else 1.0) / fan_in**0.5)
  return model.eval()


def _close(ours, theirs, tolerance: float = OUTPUTS) -> None:
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
  assert error < tolerance, f'relative error {error:.2e}'


def _trip(name: str, folder: Path, imported: families.Imported, to: Path) -> None:
  """Exports what was imported and compares every tensor bit by bit with the source."""
  families.save(name, imported.sizes, imported.params, to)
  before = sources.open_source(str(folder)).tensors
  after = sources.open_source(str(to)).tensors
  assert set(after) == set(imported.plan.places)
  for key, tensor in after.items():
    assert tensor.shape == before[key].shape, key
    np.testing.assert_array_equal(tensor.read(), before[key].read(), err_msg=key)


def _gradients(name: str, sizes, ours, theirs, to: Path) -> None:
  """Compares gradients of our parameters with those of a torch module.

  Both are laid out as published: `ours`, a tree like the parameters, by the family's own table;
  `theirs` by the module, with each gradient in its parameter's place.
  """
  import torch

  families.save(name, sizes, ours, to)
  found = sources.open_source(str(to)).tensors
  copy = deepcopy(theirs)
  with torch.no_grad():
    for leaf, original in zip(copy.parameters(), theirs.parameters(), strict=True):
      gradient = original.grad
      leaf.copy_(torch.zeros_like(leaf) if gradient is None else gradient)
  copy.save_pretrained(to.with_name(f'{to.name}-reference'))
  wanted = sources.open_source(str(to.with_name(f'{to.name}-reference'))).tensors
  # What took no part has no gradient: the language model around a tokenizer.
  wanted = {key: leaf for key, leaf in wanted.items() if np.any(leaf.read())}
  shared = wanted.keys() & found.keys()
  assert len(shared) >= 0.9 * len(wanted), sorted(wanted.keys() - found.keys())
  largest = max(np.max(np.abs(leaf.read())) for leaf in wanted.values())
  for key in sorted(shared):
    gradient = wanted[key].read()
    error = np.max(np.abs(found[key].read() - gradient)) / max(np.max(np.abs(gradient)), 1e-6)
    # Softmax takes no notice of a shift by the key's bias: its gradient is rounding alone.
    rounding = np.max(np.abs(gradient)) < max(1e-5, 1e-6 * largest)
    assert error < GRADIENTS or rounding, f'{key}: {error:.2e}'


def _mutants(params, apply: Callable, tolerance: float = 10 * OUTPUTS) -> list[str]:
  """Paths of biases and norm scales that can be dropped without the output changing."""
  wanted = np.asarray(apply(params))
  unnoticed = []
  leaves, tree = jax.tree.flatten(params)
  for index, path in enumerate(by_path(params)):
    kind = path.split('/')[-1]
    if kind not in ('bias', 'scale'):
      continue
    changed = [*leaves]
    changed[index] = np.zeros_like(leaves[index]) if kind == 'bias' else np.ones_like(leaves[index])
    found = np.asarray(apply(jax.tree.unflatten(tree, changed)))
    if np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)) < tolerance:
      unnoticed.append(path)
  return unnoticed


def _published(name: str) -> tuple[dict, dict[str, Abstract]]:
  """config.json and all tensors of a published model, without numbers (tests/golden/keys)."""
  said = json.loads((KEYS / f'{name}.config.json').read_text())
  shapes = json.loads(gzip.decompress((KEYS / f'{name}.json.gz').read_bytes()))
  return said, {key: Abstract(tuple(shape)) for key, shape in shapes.items()}


def _count(params, pattern: str = '') -> int:
  """Numbers in the leaves whose path begins as the regular expression says."""
  return sum(leaf.size for path, leaf in by_path(params).items() if re.match(pattern, path))


def _codes(ours, theirs, features, codebook, error: float) -> None:
  """Compares codes of tokens with those of a reference.

  A mismatch counts as a tie if both rows' cosines with the reference's features [..., D] differ,
  in float64, by less than 4 times the relative error of our features; at most 0.1 % of tokens.
  """
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  features = unit(np.asarray(features, np.float64).reshape(np.size(ours), -1))
  rows = unit(np.asarray(codebook, np.float64))
  ours, theirs = np.ravel(ours), np.ravel(theirs)
  wrong = np.flatnonzero(ours != theirs)
  gaps = np.einsum('ND,ND->N', features[wrong], rows[theirs[wrong]] - rows[ours[wrong]])
  assert len(wrong) <= 1e-3 * len(ours) and np.all(np.abs(gaps) < 4 * error), gaps


@functools.cache
def _abstract(name: str, sizes):
  """The shapes of our parameters."""
  return jax.eval_shape(lambda key: families.get(name).init(sizes, key), jax.random.key(0))


def _real(name: str, keys: str, sizes) -> tuple[convert.Plan, int, int]:
  """Plans the import of a real published network from its keys and shapes alone.

  Returns:
    The plan, the number of source parameters, and that of ours.
  """
  with gzip.open(KEYS / f'{keys}.json.gz', 'rt') as file:
    tensors = {key: Abstract(tuple(shape)) for key, shape in json.load(file).items()}
  family = families.get(name)
  abstract = _abstract(name, sizes)
  count = lambda leaves: sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves)
  plan = convert.plan(tensors, family.LAYOUTS, abstract)
  return plan, count(tensors.values()), count(jax.tree.leaves(abstract))


@pytest.fixture(scope='session')
def parity() -> types.SimpleNamespace:
  """The functions above, for tests of families."""
  return types.SimpleNamespace(
    redraw=_redraw,
    close=_close,
    trip=_trip,
    gradients=_gradients,
    mutants=_mutants,
    published=_published,
    count=_count,
    codes=_codes,
    renders=pictures.renders,
    real=_real,
    golden=GOLDEN,
    load=lambda name, folder, **given: families.load(
      name, sources.open_source(str(folder)), **given
    ),
  )
