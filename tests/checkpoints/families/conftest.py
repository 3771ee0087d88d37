"""Shared code of the parity tests: randomized reference models and comparisons."""

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
from vpe_jax.sharding import leaves_by_path

OUTPUT_TOLERANCE = 2e-5  # relative to the largest absolute reference value
GRADIENT_TOLERANCE = 1e-4
GOLDEN = Path(__file__).parents[2] / 'golden'
KEYS = GOLDEN / 'keys'


@dataclasses.dataclass(frozen=True)
class Abstract:
  """A published tensor with known shape and dtype but no values."""

  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(np.float32)

  def read(self) -> np.ndarray:
    raise AssertionError('matching must not read tensors')


def _randomize(model, seed: int = 0):
  """Randomizes every parameter of a torch module in place, so that each affects the output.

  With a library's initialization (norms 1, biases 0, nearly uniform attention) many errors go
  undetected. Here norms are 1 +- 0.3, biases and tables N(0, 0.3); queries and keys give logits of
  standard deviation at least 1; other matrices have unit gain.
  """
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, leaf in model.named_parameters():
      noise = torch.randn(leaf.shape, generator=generator)
      lower = name.lower()
      norm = leaf.ndim <= 1 or lower.endswith('gamma')
      if norm and 'bias' not in lower and 'logit' not in lower:
        leaf.copy_(1 + 0.3 * noise)
      elif leaf.ndim <= 1 or 'position' in lower or 'embed' in lower.split('.')[-2:][0]:
        leaf.copy_(0.3 * noise)
      else:
        fan_in = max(1, leaf[0].numel())
        is_query_or_key = any(
          part in lower
          for part in ('q_proj', 'k_proj', 'query', 'key', 'qkv', 'in_proj', 'to_q', 'to_k')
        )
        leaf.copy_(noise * (2.0 if is_query_or_key else 1.0) / fan_in**0.5)
  return model.eval()


def _assert_close(ours, theirs, tolerance: float = OUTPUT_TOLERANCE) -> None:
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
  assert error < tolerance, f'relative error {error:.2e}'


def _check_round_trip(name: str, folder: Path, imported: families.Imported, to: Path) -> None:
  """Exports an imported network and compares every tensor exactly with the source."""
  families.save(name, imported.sizes, imported.params, to)
  imported_tensors = sources.open_source(str(folder)).tensors
  exported = sources.open_source(str(to)).tensors
  assert set(exported) == set(imported.tensor_map.destinations)
  for key, tensor in exported.items():
    assert tensor.shape == imported_tensors[key].shape, key
    np.testing.assert_array_equal(tensor.read(), imported_tensors[key].read(), err_msg=key)


def _check_gradients(name: str, sizes, ours, theirs, to: Path) -> None:
  """Compares gradients of our parameters with those of a torch module.

  Both are compared in the published layout: `ours`, a tree like the parameters, is exported with
  the family's table; `theirs` is saved from a copy of the module whose parameters are gradients.
  """
  import torch

  families.save(name, sizes, ours, to)
  actual = sources.open_source(str(to)).tensors
  copy = deepcopy(theirs)
  with torch.no_grad():
    for leaf, original in zip(copy.parameters(), theirs.parameters(), strict=True):
      gradient = original.grad
      leaf.copy_(torch.zeros_like(leaf) if gradient is None else gradient)
  copy.save_pretrained(to.with_name(f'{to.name}-reference'))
  expected = sources.open_source(str(to.with_name(f'{to.name}-reference'))).tensors
  # Unused networks, such as the language model around a tokenizer, have no gradient.
  expected = {key: leaf for key, leaf in expected.items() if np.any(leaf.read())}
  shared = expected.keys() & actual.keys()
  assert len(shared) >= 0.9 * len(expected), sorted(expected.keys() - actual.keys())
  largest = max(np.max(np.abs(leaf.read())) for leaf in expected.values())
  for key in sorted(shared):
    gradient = expected[key].read()
    error = np.max(np.abs(actual[key].read() - gradient)) / max(np.max(np.abs(gradient)), 1e-6)
    # Softmax ignores the bias of k: its gradient is only rounding error.
    rounding = np.max(np.abs(gradient)) < max(1e-5, 1e-6 * largest)
    assert error < GRADIENT_TOLERANCE or rounding, f'{key}: {error:.2e}'


def _insensitive(params, apply: Callable, tolerance: float = 10 * OUTPUT_TOLERANCE) -> list[str]:
  """Paths of biases and norm scales whose removal doesn't change the output."""
  expected = np.asarray(apply(params))
  insensitive = []
  leaves, tree = jax.tree.flatten(params)
  for index, path in enumerate(leaves_by_path(params)):
    kind = path.split('/')[-1]
    if kind not in ('bias', 'scale'):
      continue
    changed = [*leaves]
    changed[index] = np.zeros_like(leaves[index]) if kind == 'bias' else np.ones_like(leaves[index])
    output = np.asarray(apply(jax.tree.unflatten(tree, changed)))
    if np.max(np.abs(output - expected)) / np.max(np.abs(expected)) < tolerance:
      insensitive.append(path)
  return insensitive


def _load_published(name: str) -> tuple[dict, dict[str, Abstract]]:
  """config.json and abstract tensors of a published model (tests/golden/keys)."""
  config = json.loads((KEYS / f'{name}.config.json').read_text())
  shapes = json.loads(gzip.decompress((KEYS / f'{name}.json.gz').read_bytes()))
  return config, {key: Abstract(tuple(shape)) for key, shape in shapes.items()}


def _count(params, pattern: str = '') -> int:
  """Number of parameters whose path starts with a match of the regular expression."""
  return sum(leaf.size for path, leaf in leaves_by_path(params).items() if re.match(pattern, path))


def _check_codes(ours, theirs, features, codebook, error: float) -> None:
  """Compares codes with those of a reference, up to ties in at most 0.1 % of tokens.

  A mismatch is a tie if the cosines of both codebook entries with the reference's features [..., D]
  differ, in float64, by less than 4 times the relative error of our features.
  """
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  features = unit(np.asarray(features, np.float64).reshape(np.size(ours), -1))
  entries = unit(np.asarray(codebook, np.float64))
  ours, theirs = np.ravel(ours), np.ravel(theirs)
  wrong = np.flatnonzero(ours != theirs)
  gaps = np.einsum('ND,ND->N', features[wrong], entries[theirs[wrong]] - entries[ours[wrong]])
  assert len(wrong) <= 1e-3 * len(ours) and np.all(np.abs(gaps) < 4 * error), gaps


@functools.cache
def _abstract(name: str, sizes):
  """Abstract parameters of a network of these sizes."""
  return jax.eval_shape(lambda key: families.get(name).init(sizes, key), jax.random.key(0))


def _match_published(name: str, keys: str, sizes) -> tuple[convert.TensorMap, int, int]:
  """Plans the import of a published network from its keys and shapes.

  Returns:
    The map, the number of source parameters, and the number of our parameters.
  """
  with gzip.open(KEYS / f'{keys}.json.gz', 'rt') as file:
    tensors = {key: Abstract(tuple(shape)) for key, shape in json.load(file).items()}
  family = families.get(name)
  abstract = _abstract(name, sizes)
  count = lambda leaves: sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves)
  tensor_map = convert.match_tensors(tensors, family.LAYOUTS, abstract)
  return tensor_map, count(tensors.values()), count(jax.tree.leaves(abstract))


@pytest.fixture(scope='session')
def parity() -> types.SimpleNamespace:
  """The functions above as a fixture."""
  return types.SimpleNamespace(
    randomize=_randomize,
    assert_close=_assert_close,
    check_round_trip=_check_round_trip,
    check_gradients=_check_gradients,
    insensitive=_insensitive,
    load_published=_load_published,
    count=_count,
    check_codes=_check_codes,
    renders=pictures.renders,
    match_published=_match_published,
    golden=GOLDEN,
    load=lambda name, folder, **options: families.load(
      name, sources.open_source(str(folder)), **options
    ),
  )
