"""The builder of token sequences: ids, rotary positions, visibility, targets and loss weights.

Absent tokens (padding of a short caption, spans of a dropped condition) occupy slots, but no token
sees them and they have no position: order and rotary positions count present tokens only. All
tokens of a span with `shared_position` count as one position.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, Region, Visibility, concatenate
from vpe_jax.sequence.spans import Layout, Span

NEVER = np.iinfo(np.int32).max  # an `until` that no order reaches


def build(
  layout: Layout,
  contents: Mapping[str, Array] | None = None,
  lengths: Mapping[str, Array] | None = None,
  keep: Array | Mapping[str, Array] | None = None,
  multiple: int = 1,
) -> dict[str, Region]:
  """The token sequences of a batch.

  Args:
    layout: the spans.
    contents: joint-vocabulary ids [B, length] of the spans whose ids are in the batch, by name.
    lengths: number of present tokens [B] of padded spans, by name; all tokens of other spans are
      present. Padding is stored last.
    keep: bool [B] by condition; False removes the spans of the condition. Conditions that no span
      has are ignored. A single array applies to all conditions.
    multiple: regions are padded with absent tokens to a multiple of this length.

  Returns:
    The region of each expert, in the order of `layout.experts`. Targets are 0 where nothing is
    predicted. The last present token of a sequence predicts nothing.

  Raises:
    ValueError: a span of `contents` or `lengths` is not in the layout, a condition is missing in
      `keep`, an array has the wrong shape, or there is no array from which to read the batch size.
  """
  contents = {name: jnp.asarray(x, jnp.int32) for name, x in (contents or {}).items()}
  lengths = lengths or {}
  B = _batch_size(layout, contents, lengths, keep)
  spans = layout.spans
  fixed = lambda span: jnp.full((B, span.length), span.id, jnp.int32)
  ids = [contents.get(span.name, fixed(span)) for span in spans]
  counts = [_present(span, lengths, keep, B) for span in spans]
  positions = _first_positions(spans, counts)
  following = _following(ids, counts)
  orders = _Orders(spans, counts)
  regions: dict[str, list[Region]] = {}
  for i, span in enumerate(spans):
    index = jnp.arange(span.length, dtype=jnp.int32)[None]
    present = index < counts[i]
    only_present = lambda x, present=present: jnp.where(present, x, 0).astype(jnp.int32)
    place = positions[i] if span.shared_position else positions[i] + index
    targets, weights = _prediction(span, ids[i], counts[i], following[i])
    visibility = Visibility(*map(only_present, orders.fields(i)))
    region = Region(ids[i], only_present(place), visibility, targets, weights)
    regions.setdefault(span.expert, []).append(region)
  return {
    expert: _padded(concatenate(parts), layout.region_length(expert, multiple))
    for expert, parts in regions.items()
  }


class _Orders:
  """Visibility of spans, from their numbers of present tokens.

  Attributes:
    starts: per span, order of its first present token [B, 1].
    ends: per span, order after its last present token [B, 1].
  """

  def __init__(self, spans: Sequence[Span], counts: Sequence[Array]) -> None:
    self.spans = spans
    self.ends = list(itertools.accumulate(counts))
    self.starts = [jnp.zeros_like(counts[0]), *self.ends[:-1]]
    self.blocks = _runs(spans, lambda a, b: a.full and b.full and a.frame == b.frame)
    self.frames = _runs(spans, lambda a, b: a.frame is not None and a.frame == b.frame)

  def fields(self, i: int) -> tuple[Array | int, Array | int, Array | int, Array | int]:
    """Order, since, reach and until of span i, as if all its tokens were present."""
    span = self.spans[i]
    order = self.starts[i] + jnp.arange(span.length, dtype=jnp.int32)[None]
    (block, block_last), (frame, frame_last) = self.blocks[i], self.frames[i]
    since = self.starts[frame] if span.sees == 'frame' else 0
    if span.window:
      back = order + 1 - span.window
      back = jnp.minimum(back, self.starts[block]) if span.full else back
      since = jnp.maximum(since, back)
    until = {
      'all': NEVER,
      'frame': self.ends[frame_last],
      'block': self.ends[block_last],
      'token': order + 1,
    }
    return order, since, self.ends[block_last] if span.full else order + 1, until[span.seen_by]


def _present(
  span: Span,
  lengths: Mapping[str, Array],
  keep: Array | Mapping[str, Array] | None,
  B: int,
) -> Array:
  """Number of present tokens of a span: [B, 1] int32."""
  count = jnp.full((B,), span.length, jnp.int32)
  if span.name in lengths:
    count = jnp.minimum(jnp.asarray(lengths[span.name], jnp.int32), count)
  if span.condition:
    present = keep[span.condition] if isinstance(keep, Mapping) else keep
    count = jnp.where(present, count, 0)
  return count[:, None]


def _runs(spans: Sequence[Span], joined: Callable[[Span, Span], bool]) -> list[tuple[int, int]]:
  """For each span, the first and last index of the run of neighbours that it belongs to."""
  runs: list[tuple[int, int]] = []
  first = 0
  for i, span in enumerate(spans):
    if i + 1 == len(spans) or not joined(span, spans[i + 1]):
      runs += [(first, i)] * (i + 1 - first)
      first = i + 1
  return runs


def _first_positions(spans: Sequence[Span], counts: Sequence[Array]) -> list[Array]:
  """Rotary position [B, 1] of each span's first token."""
  shares_position = lambda a, b: (
    a.shared_position
    and b.shared_position
    and a.frame == b.frame
    and (a.seen_by == 'token') == (b.seen_by == 'token')
  )
  position, positions = jnp.zeros_like(counts[0]), []
  for i, (first, last) in enumerate(_runs(spans, shares_position)):
    positions.append(position)
    if not spans[i].shared_position:
      position = position + counts[i]
    elif i == last and spans[i].seen_by != 'token':
      used = sum(counts[first : last + 1]) > 0
      position = position + used.astype(jnp.int32)
  return positions


def _following(ids: Sequence[Array], counts: Sequence[Array]) -> list[tuple[Array, Array]]:
  """For each span, the id [B, 1] of the first present token after it, and whether there is one."""
  token, exists = jnp.zeros_like(counts[0]), jnp.zeros(counts[0].shape, bool)
  following = []
  for own, count in zip(reversed(ids), reversed(counts), strict=True):
    following.append((token, exists))
    token, exists = jnp.where(count > 0, own[:, :1], token), exists | (count > 0)
  return following[::-1]


def _prediction(
  span: Span, ids: Array, count: Array, following: tuple[Array, Array]
) -> tuple[Array, Array]:
  """Targets [B, length] int32 and their weights [B, length] float32."""
  if not span.predicts:
    return jnp.zeros_like(ids), jnp.zeros(ids.shape, jnp.float32)
  token, exists = following
  index = jnp.arange(span.length, dtype=jnp.int32)[None]
  last = index == count - 1
  predicts = (index < count) & (~last | exists)
  targets = jnp.where(last, token, jnp.roll(ids, -1, 1))
  return jnp.where(predicts, targets, 0), predicts.astype(jnp.float32)


def _padded(region: Region, length: int) -> Region:
  """Pads a region with absent tokens, whose fields are all 0."""
  extra = length - region.ids.shape[1]
  if not extra:
    return region
  return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, extra))), region)


def _batch_size(
  layout: Layout,
  contents: Mapping[str, Array],
  lengths: Mapping[str, Array],
  keep: Array | Mapping[str, Array] | None,
) -> int:
  """Checks names and shapes of all arrays; returns their batch size B."""
  names = [span.name for span in layout.spans]
  for name in (*contents, *lengths):
    if name not in names:
      raise ValueError(f"no span '{name}' in {names}")
  by_condition = keep if isinstance(keep, Mapping) else {} if keep is None else {'all': keep}
  if keep is None or isinstance(keep, Mapping):
    for span in layout.spans:
      if span.condition and span.condition not in by_condition:
        raise ValueError(f"span '{span.name}': keep has no condition '{span.condition}'")
  sizes = {span.name: span.length for span in layout.spans}
  shapes = [(f'ids of {name}', x.shape, (sizes[name],)) for name, x in contents.items()]
  shapes += [(f'length of {name}', jnp.shape(x), ()) for name, x in lengths.items()]
  shapes += [(f'keep of {name}', jnp.shape(x), ()) for name, x in by_condition.items()]
  if not shapes:
    raise ValueError('no contents, lengths or keep: the batch size is unknown')
  B = shapes[0][1][0] if shapes[0][1] else 1
  for name, shape, rest in shapes:
    if shape != (B, *rest):
      raise ValueError(f'{name}: the shape is {shape}, but must be {(B, *rest)}')
  return B
