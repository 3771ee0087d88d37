"""Spans and a batch's captions and codes, turned into rows of tokens.

A system states its sequence as a static tuple of spans in logical order. Tokens are stored expert
by expert, so each expert's region has a fixed place for each span; what is absent (padding of a
short caption, or a condition that was dropped) keeps its place, is seen by nobody, and takes no
position: `order` and rotary positions count present tokens without gaps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Array, Region, Visibility, concatenate

NEVER = np.iinfo(np.int32).max  # an `until` that no order reaches
CONDITIONS = TOLD, REFERENCE = 'told', 'reference'  # which may be dropped


@dataclasses.dataclass(frozen=True)
class Span:
  """A run of tokens of one kind.

  Attributes:
    kind: `bos`, `text`, `bot`, `codes`, `eot`, `boi`, `time` or `latents`; of the picture before an
      edit `ref_boi`, `ref_time`, `ref_latents` and `eoi`.
    length: tokens, present or not.
    expert: region that stores them.
    full: whether the span belongs to a bidirectional block; neighbouring full spans form one.
    predicts: whether each token's output predicts the id of the token stored after it.
    condition: that takes the span away where it is dropped (empty: none does).
  """

  kind: str
  length: int
  expert: str
  full: bool = False
  predicts: bool = False
  condition: str = ''


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The joint vocabulary: text rows, then `codes` visual prompt rows, then [bot] and [eot].

  With `codes` of 0 there is no visual prompt, and no row for [bot] and [eot].

  `bos`, `boi` and `eoi` (read by rows with a picture before) are ids of text rows (reference/vpe.md
  1.4 for Show-o2's).
  """

  text: int
  codes: int
  bos: int
  boi: int
  eoi: int = 0

  @property
  def bot(self) -> int:
    """Row of the token that begins a visual prompt."""
    return self.text + self.codes

  @property
  def eot(self) -> int:
    """Row of the token that ends one."""
    return self.text + self.codes + 1


_EMBEDDED = ('time', 'latents', 'ref_time', 'ref_latents')  # from elsewhere than the vocabulary


def token_row(text: int, codes: int) -> tuple[Span, ...]:
  """`[bos] text [bot] s [eot]`: all that the next-token loss needs; without codes `[bos] text`."""
  told = (Span('bos', 1, 'ar'), Span('text', text, 'ar', condition=TOLD))
  plan = (
    Span('bot', 1, 'ar', predicts=True, condition=TOLD),
    Span('codes', codes, 'ar', predicts=True, condition=TOLD),
    Span('eot', 1, 'ar', condition=TOLD),
  )
  return (*told, *plan) if codes else told


def text_to_image(text: int, codes: int, latents: int) -> tuple[Span, ...]:
  """`[bos] text [bot] s [eot] [boi] | time x`: Internal+VPE (arXiv 2606.04457, App. D).

  The tail `[eoi] [eos]` carries no loss and would be the only prefix that sees the picture, so it
  is left out: nothing before the picture depends on it. Without codes the row is Show-o2's,
  `[bos] text [boi] | time x`.
  """
  return (
    *token_row(text, codes),
    Span('boi', 1, 'ar'),
    Span('time', 1, 'dit', full=True),
    Span('latents', latents, 'dit', full=True),
  )


def picture_row(codes: int, latents: int) -> tuple[Span, ...]:
  """`s [boi] | time x`: the row of External+VPE's picture expert; its tokens have `token_row`.

  What stands at a code's place isn't its embedding but what the token expert made of it. Places
  count from 0, the plan is causal as it is everywhere else, and the picture sees all of it:

          s1 s2 boi  t  x  y
      s1   1  0  0   0  0  0
      s2   1  1  0   0  0  0
      boi  1  1  1   0  0  0
      t    1  1  1   1  1  1
      x    1  1  1   1  1  1
      y    1  1  1   1  1  1

  Dropped, the plan is absent: `[boi] | time x`, with places from 0.
  """
  return (
    Span('codes', codes, 'prefix', condition=TOLD),
    Span('boi', 1, 'prefix'),
    Span('time', 1, 'dit', full=True),
    Span('latents', latents, 'dit', full=True),
  )


def reference_row(latents: int) -> tuple[Span, ...]:
  """`[bos] [boi] time x [eoi]`: how a row with a picture before begins; x sees itself and time."""
  given = functools.partial(Span, expert='ar', condition=REFERENCE)
  return (
    Span('bos', 1, 'ar'),
    given('ref_boi', 1),
    given('ref_time', 1, full=True),
    given('ref_latents', latents, full=True),
    given('eoi', 1),
  )


def edit(text: int, codes: int, latents: int) -> tuple[Span, ...]:
  """`[bos] [boi] time x_ref [eoi] text [bot] s [eot] [boi] | time x`: Internal+VPE's edits, App. D.

  The picture before is stored with the tokens. Text and plan are one condition, the picture before
  another: without the first the row is `[bos] [boi] time x_ref [eoi] [boi] | time x`, without the
  second that of `text_to_image`, without both `[bos] [boi] | time x`. Places are counted anew, so
  what stands before the text is the same with and without it. With one text token, one code and two
  latents in each picture (r q, x y):

          bos boi  t  r  q eoi  a bot  s eot boi  t  x  y
      bos   1   0  0  0  0   0  0   0  0   0   0  0  0  0
      boi   1   1  0  0  0   0  0   0  0   0   0  0  0  0
      t     1   1  1  1  1   0  0   0  0   0   0  0  0  0
      r     1   1  1  1  1   0  0   0  0   0   0  0  0  0
      q     1   1  1  1  1   0  0   0  0   0   0  0  0  0
      eoi   1   1  1  1  1   1  0   0  0   0   0  0  0  0
      a     1   1  1  1  1   1  1   0  0   0   0  0  0  0
      bot   1   1  1  1  1   1  1   1  0   0   0  0  0  0
      s     1   1  1  1  1   1  1   1  1   0   0  0  0  0
      eot   1   1  1  1  1   1  1   1  1   1   0  0  0  0
      boi   1   1  1  1  1   1  1   1  1   1   1  0  0  0
      t     1   1  1  1  1   1  1   1  1   1   1  1  1  1
      x     1   1  1  1  1   1  1   1  1   1   1  1  1  1
      y     1   1  1  1  1   1  1   1  1   1   1  1  1  1
  """
  return (*reference_row(latents), *text_to_image(text, codes, latents)[1:])


def edit_tokens(text: int, codes: int, latents: int) -> tuple[Span, ...]:
  """`[bos] [boi] time x_ref [eoi] text [bot] s [eot]`: of External+VPE's token expert, App. D.

  Text and picture before are two conditions; the plan, which is all that the picture expert sees,
  always stays.
  """
  text_span, *plan = token_row(text, codes)[1:]
  kept = (dataclasses.replace(span, condition='') for span in plan)
  return (*reference_row(latents), text_span, *kept)


def place(spans: Sequence[Span], kind: str) -> tuple[int, int]:
  """First slot of a span in its expert's region, and the slot after its last."""
  start: dict[str, int] = {}
  for span in spans:
    first = start.get(span.expert, 0)
    if span.kind == kind:
      return first, first + span.length
    start[span.expert] = first + span.length
  raise KeyError(f'no span {kind!r} in {[s.kind for s in spans]}')


def region_length(spans: Sequence[Span], expert: str, multiple: int) -> int:
  """Slots of an expert's region: its spans, rounded up to `multiple`."""
  used = sum(span.length for span in spans if span.expert == expert)
  return -(-used // multiple) * multiple


def build(
  spans: Sequence[Span],
  vocabulary: Vocabulary,
  text: Array | None,
  text_length: Array | None,
  codes: Array,
  keep: Array | Mapping[str, Array],
  multiple: int = 1,
) -> dict[str, Region]:
  """Rows of tokens for a batch.

  Args:
    spans: the sequence.
    vocabulary: where each kind's ids lie.
    text: caption ids [B, T]; None, as is `text_length`, where the sequence has no span of them.
    text_length: tokens of the caption that are real [B].
    codes: visual prompt [B, P].
    keep: bool [B]; False drops every condition: the spans that have one are absent. Or that of each
      condition by name.
    multiple: regions are padded with absent tokens to a multiple of this.

  Returns:
    The region of each expert, in the order in which `spans` first names them.

  Raises:
    ValueError: `text` or `codes` are not as long as their span.
  """
  B = codes.shape[0]
  given = {'text': text, 'codes': codes}
  for span in spans:
    if span.kind in given and (count := given[span.kind].shape[1]) != span.length:
      raise ValueError(f'{span.kind} has {count} tokens, but its span has {span.length}')
  ids, present = [], []
  for span in spans:
    ids.append(_ids(span, vocabulary, text, codes, B))
    there = jnp.ones((B, span.length), bool)
    if span.kind == 'text':
      there = jnp.arange(span.length)[None] < text_length[:, None]
    if span.condition:
      kept = keep[span.condition] if isinstance(keep, Mapping) else keep
      there &= kept[:, None]
    present.append(there)
  regions: dict[str, list[Region]] = {}
  seen = jnp.zeros((B, 1), jnp.int32)
  blocks = _block_ends(spans, present)
  for i, span in enumerate(spans):
    order = seen + jnp.cumsum(present[i], 1, dtype=jnp.int32) - 1
    seen = seen + jnp.sum(present[i], 1, keepdims=True, dtype=jnp.int32)
    reach = jnp.broadcast_to(blocks[i], order.shape) if span.full else order + 1
    after = ids[i + 1][:, :1] if i + 1 < len(spans) else jnp.zeros((B, 1), jnp.int32)
    targets = jnp.concatenate([ids[i][:, 1:], after], 1)
    weights = present[i].astype(jnp.float32) * float(span.predicts)
    zero = lambda x, there=present[i]: jnp.where(there, x, 0)
    visibility = Visibility(
      order=zero(order), since=jnp.zeros_like(order), reach=zero(reach), until=zero(NEVER)
    )
    region = Region(ids[i], zero(order), visibility, targets, weights)
    regions.setdefault(span.expert, []).append(region)
  return {
    expert: _padded(concatenate(parts), region_length(spans, expert, multiple))
    for expert, parts in regions.items()
  }


def _ids(span: Span, vocabulary: Vocabulary, text: Array | None, codes: Array, B: int) -> Array:
  if span.kind == 'text':
    return text.astype(jnp.int32)
  if span.kind == 'codes':
    return codes.astype(jnp.int32) + vocabulary.text
  special = {name: getattr(vocabulary, name) for name in ('bos', 'boi', 'eoi', 'bot', 'eot')}
  known = special | {'ref_boi': vocabulary.boi} | dict.fromkeys(_EMBEDDED, 0)
  return jnp.full((B, span.length), known[span.kind], jnp.int32)


def _block_ends(spans: Sequence[Span], present: Sequence[Array]) -> list[Array]:
  """For each span, the order after the last token of the bidirectional block it lies in: [B, 1]."""
  totals = jnp.cumsum(
    jnp.stack([jnp.sum(there, 1, dtype=jnp.int32) for there in present], 1), axis=1
  )
  ends, last = [], len(spans) - 1
  for i in range(len(spans)):
    j = i
    while j < last and spans[j].full and spans[j + 1].full:
      j += 1
    ends.append(totals[:, j : j + 1])
  return ends


def _padded(region: Region, length: int) -> Region:
  """Absent tokens behind the region: every field is 0 there."""

  extra = length - region.ids.shape[1]
  return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, extra))), region)
