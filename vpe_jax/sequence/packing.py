"""Packing of several samples into one sequence; runs on the host, on NumPy arrays.

Packed samples don't see each other, and rotary positions restart with each sample. Absent tokens
are dropped. Each expert has a budget of slots in a packed sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, Region, UserError, Visibility
from vpe_jax.sequence.builder import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenOrigin:
  """Where the tokens of one expert in R packed sequences come from; -1 if absent.

  Attributes:
    sample: int32 [R, budget], index of the sample.
    slot: int32 [R, budget], slot of the token in the expert's region of that sample.
  """

  sample: np.ndarray
  slot: np.ndarray


def token_counts(regions: Mapping[str, Region]) -> dict[str, np.ndarray]:
  """Present tokens of each sample, by expert: int [n]."""
  return {name: np.sum(_present(region), axis=1) for name, region in regions.items()}


def assign(lengths: Mapping[str, np.ndarray], budgets: Mapping[str, int]) -> list[list[int]]:
  """Samples of each packed sequence: first fit, in the order of the samples.

  Args:
    lengths: tokens of each of the n samples, by expert: int [n].
    budgets: slots of a packed sequence, by expert.

  Returns:
    The indices of the samples in each packed sequence; every sample is in exactly one.

  Raises:
    UserError: a sample has more tokens of an expert than its budget.
    ValueError: lengths and budgets are not of the same experts.
  """
  _check_experts(lengths, budgets)
  needs = np.stack([np.asarray(lengths[expert]) for expert in budgets], axis=1)  # [n, experts]
  limits = np.array(list(budgets.values()))
  bins: list[list[int]] = []
  free: list[np.ndarray] = []
  for sample, need in enumerate(needs):
    for expert, length, budget in zip(budgets, need, limits, strict=True):
      if length > budget:
        raise UserError(
          f'sample {sample} has {length} {expert} tokens, but a packed sequence has a budget of '
          f'{budget}: raise the budget, or shorten the sample'
        )
    fitting = (i for i, left in enumerate(free) if np.all(need <= left))
    index = next(fitting, len(bins))
    if index == len(bins):
      bins.append([])
      free.append(limits)
    bins[index].append(sample)
    free[index] = free[index] - need
  return bins


def pack(
  regions: Mapping[str, Region], bins: Sequence[Sequence[int]], budgets: Mapping[str, int]
) -> tuple[dict[str, Region], dict[str, TokenOrigin]]:
  """Packs samples [n, L] into R = len(bins) sequences.

  Two samples, one of text a and image x y, one of text b c and image z, in regions of 4 slots each:

          a b c . x y z .
      a   1 0 0 0 0 0 0 0
      b   0 1 0 0 0 0 0 0
      c   0 1 1 0 0 0 0 0
      .   0 0 0 0 0 0 0 0
      x   1 0 0 0 1 1 0 0
      y   1 0 0 0 1 1 0 0
      z   0 1 1 0 0 0 1 0
      .   0 0 0 0 0 0 0 0

  Args:
    regions: region [n, L] of each expert, as the builder makes them.
    bins: samples of each packed sequence, see `assign`; an empty one gives a sequence of absent
      tokens.
    budgets: slots of a packed sequence, by expert.

  Returns:
    The packed region [R, budget] of each expert, and where its tokens come from.

  Raises:
    ValueError: regions and budgets are not of the same experts, or samples exceed a budget.
  """
  _check_experts(regions, budgets)
  totals = sum(token_counts(regions).values())
  # Order runs on over the samples of a sequence: each starts after all tokens of those before it.
  offsets = [np.cumsum([0, *totals[list(samples)]]) for samples in bins]
  packed, sources = {}, {}
  for expert, region in regions.items():
    source, shift = _sources(_present(region), bins, offsets, budgets[expert])
    sources[expert] = source
    gathered = jax.tree.map(lambda leaf, source=source: gather(np.asarray(leaf), source), region)
    present = source.sample >= 0
    packed[expert] = dataclasses.replace(
      gathered, visibility=_shifted(gathered.visibility, np.where(present, shift, 0))
    )
  return packed, sources


def gather(values: Array | np.ndarray, source: TokenOrigin) -> Array | np.ndarray:
  """Values [R, budget, ...] of packed tokens from those of the samples [n, L, ...]; 0 if absent.

  NumPy arrays give NumPy arrays; others may be traced.
  """
  where = np.where if isinstance(values, np.ndarray) else jnp.where
  gathered = values[source.sample, source.slot]
  present = (source.sample >= 0).reshape(source.sample.shape + (1,) * (gathered.ndim - 2))
  return where(present, gathered, np.zeros((), gathered.dtype))


def _present(region: Region) -> np.ndarray:
  return np.asarray(region.visibility.until) > 0


def _sources(
  present: np.ndarray,
  bins: Sequence[Sequence[int]],
  offsets: Sequence[np.ndarray],
  budget: int,
) -> tuple[TokenOrigin, np.ndarray]:
  """The source of each packed slot, and the order [R, budget] at which its sample starts."""
  sample, slot = (np.full((len(bins), budget), -1, np.int32) for _ in range(2))
  shift = np.zeros((len(bins), budget), np.int32)
  for sequence, (samples, starts) in enumerate(zip(bins, offsets, strict=True)):
    used = 0
    for index, start in zip(samples, starts):
      slots = np.flatnonzero(present[index])
      target = sequence, slice(used, used + len(slots))
      used += len(slots)
      if used > budget:
        raise ValueError(f'samples {list(samples)} exceed the budget of {budget} tokens')
      sample[target], slot[target], shift[target] = index, slots, start
  return TokenOrigin(sample, slot), shift


def _shifted(visibility: Visibility, shift: np.ndarray) -> Visibility:
  """Visibility whose sequence starts at order `shift`."""
  until = visibility.until
  return Visibility(
    order=visibility.order + shift,
    since=visibility.since + shift,
    reach=visibility.reach + shift,
    until=np.where(until == NEVER, until, until + np.where(until == NEVER, 0, shift)),
  )


def _check_experts(one: Mapping[str, object], budgets: Mapping[str, int]) -> None:
  if set(one) != set(budgets):
    raise ValueError(f'samples have tokens of {sorted(one)}, but budgets are of {sorted(budgets)}')
