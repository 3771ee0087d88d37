"""Attention, forward and backward, at rows of 1k to 8k tokens: time and peak memory.

  python -m tests.benchmarks.attention --json=attention.json

Runs every implementation that this machine has, on a causal mask and on that of a Mixture of
Transformers (829 tokens of text and visual prompt to 1,027 of picture, as the paper has them).
Outputs and gradients must agree to 1e-4 first. Runs alternate between the implementations, and a
ratio is the median over the rounds: `time/...` is that of `reference` over the other's (above 1:
faster), `memory/...` that of the temporary bytes that the compiler assigns. Other processes
disturb timings: with more than half a core busy it refuses, unless --force is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax.config import ATTENTIONS
from vpe_jax.contracts import UserError, Visibility
from vpe_jax.data.sequence import NEVER
from vpe_jax.ops.attention import chooser

HEADS, KV_HEADS, WIDTH = 4, 2, 64
BUSY = 0.5  # load average above which timings mean little
AGREE = 1e-4


def _row(reach: jax.Array) -> Visibility:
  order = jnp.arange(reach.shape[0], dtype=jnp.int32)
  fields = (order, jnp.zeros_like(order), reach, jnp.full_like(order, NEVER))
  return Visibility(*(x[None] for x in fields))


def causal(length: int) -> Visibility:
  """Text alone."""
  return _row(jnp.arange(1, length + 1, dtype=jnp.int32))


def mixture(length: int) -> Visibility:
  """Causal tokens, then a bidirectional picture."""
  order, text = jnp.arange(length, dtype=jnp.int32), length * 829 // 1856
  return _row(jnp.where(order < text, order + 1, length))


def _step(name: str) -> Callable[..., Any]:
  def loss(q: jax.Array, k: jax.Array, v: jax.Array, row: Visibility) -> tuple[Any, jax.Array]:
    mixed = chooser.attention(q, k, v, row, row, name)
    return jnp.sum(jnp.sin(mixed)), mixed

  return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def _check(results: dict[str, Any]) -> None:
  """Outputs and gradients agree, relative to the largest of each."""
  wanted = results['reference']
  for name, given in results.items():
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
      apart = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
      if apart > AGREE:
        raise UserError(f'{name} differs from reference by {apart:.1e}')


def measure(length: int, mask: Callable[[int], Visibility], rounds: int) -> list[dict[str, Any]]:
  """Seconds of each round and temporary bytes of each implementation that runs here."""
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
    jax.random.normal(key, (1, length, heads, WIDTH))
    for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS))
  )
  inputs = (q, k, v, mask(length))
  steps = {}
  for name in ATTENTIONS:
    try:
      steps[name] = jax.jit(_step(name)).lower(*inputs).compile()
    except UserError as error:
      print(f'{length:6} {mask.__name__:8} {name:10} not here: {error}')
  _check({name: step(*inputs) for name, step in steps.items()})
  seconds: dict[str, list[float]] = {name: [] for name in steps}
  for _ in range(rounds):
    for name, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(*inputs))
      seconds[name].append(time.perf_counter() - start)
  return [
    {
      'length': length,
      'mask': mask.__name__,
      'implementation': name,
      'seconds': seconds[name],
      'temporary_bytes': step.memory_analysis().temp_size_in_bytes,
    }
    for name, step in steps.items()
  ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
  """`reference` over each other implementation, per mask and length."""
  found = {}
  for dense in (row for row in rows if row['implementation'] == 'reference'):
    for row in rows:
      same = row['length'] == dense['length'] and row['mask'] == dense['mask']
      if not same or row is dense:
        continue
      where = f'{row["implementation"]}/{row["mask"]}/{row["length"]}'
      paired = [a / b for a, b in zip(dense['seconds'], row['seconds'], strict=True)]
      found[f'time/{where}'] = statistics.median(paired)
      found[f'memory/{where}'] = dense['temporary_bytes'] / row['temporary_bytes']
  return found


def main() -> None:
  """Measures, prints a table, and writes it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--json', default='', help='file to write')
  parser.add_argument('--lengths', default='1024,2048,4096,8192', help='tokens of a row')
  parser.add_argument('--rounds', type=int, default=5, help='runs of each implementation')
  parser.add_argument('--force', action='store_true', help='measure on a busy machine too')
  given = parser.parse_args()
  load = os.getloadavg()[0]
  print(f'load average {load:.2f}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}')
  if load > BUSY and not given.force:
    parser.error(f'the machine is busy (load above {BUSY}): wait, or measure with --force')
  rows: list[dict[str, Any]] = []
  for length in map(int, given.lengths.split(',')):
    for mask in (causal, mixture):
      found = measure(length, mask, given.rounds)
      for row in found:
        middle = statistics.median(row['seconds'])
        size = row['temporary_bytes'] / 2**20
        print(f'{length:6} {mask.__name__:8} {row["implementation"]:10} ', end='')
        print(f'{middle:9.4f} s {size:9.1f} MiB', flush=True)
      rows += found
  report = {
    'load_average': [load, os.getloadavg()[0]],
    'device': jax.devices()[0].device_kind,
    'shape': {'heads': HEADS, 'kv_heads': KV_HEADS, 'width': WIDTH, 'dtype': 'float32'},
    'rows': rows,
    'ratios': ratios(rows),
  }
  for name, ratio in report['ratios'].items():
    print(f'{name:40} {ratio:7.2f}')
  if given.json:
    with open(given.json, 'w', encoding='utf-8') as file:
      json.dump(report, file, indent=2)


if __name__ == '__main__':
  main()
