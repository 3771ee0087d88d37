"""Spans and layouts: the static description of a token sequence.

A layout lists spans in logical order, which decides who sees whom. Tokens are stored expert by
expert, so each expert's region has a fixed place for each of its spans.
"""

from __future__ import annotations

import collections
import dataclasses

SEES = ('all', 'frame')
SEEN_BY = ('all', 'frame', 'block', 'token')


@dataclasses.dataclass(frozen=True)
class Span:
  """A run of tokens with the same properties.

  A token sees the tokens before it; a token of a full span sees its whole bidirectional block.
  `sees`, `seen_by` and `window` restrict this.

  Each query sees one interval of the logical order, except the keys whose `until` it has reached
  (contracts.Visibility). To add a rule of this form, add a field here and its bound in builder.py.
  A rule that skips tokens inside the interval, such as every second one, can't be expressed.

  Attributes:
    name: unique in its layout, such as `frame1/text`.
    length: number of slots, filled or not.
    expert: expert whose region stores the tokens.
    full: whether the span is bidirectional; neighbouring full spans with equal `frame` form one
      block.
    predicts: whether each token's output predicts the id of the next token that is present.
    condition: name of the condition that removes the span if it is dropped; '' for none.
    frame: frame that the span belongs to; None if none.
    sees: `all` tokens before it, or only those since the start of its `frame`.
    seen_by: `all` tokens after it, those up to the end of its `frame` or of its bidirectional
      `block` (of a causal span: the span), or only the `token` itself.
    window: maximum number of tokens that a token sees, counted back from itself (0: no limit); its
      own bidirectional block is always seen whole.
    shared_position: whether all tokens have one rotary position, which neighbouring spans of this
      kind and frame share. The next span continues at the position after it, or at the same one if
      no other token sees the span (`seen_by='token'`).
    id: joint-vocabulary id of tokens whose ids are not in the batch; 0 for slots whose embedding
      doesn't come from the vocabulary.

  Raises:
    ValueError: a field is invalid, or fields contradict each other.
  """

  name: str
  length: int
  expert: str
  full: bool = False
  predicts: bool = False
  condition: str = ''
  frame: int | str | None = None
  sees: str = 'all'
  seen_by: str = 'all'
  window: int = 0
  shared_position: bool = False
  id: int = 0

  def __post_init__(self) -> None:
    framed = 'frame' in (self.sees, self.seen_by)
    problems = {
      'name must not be empty': not self.name,
      'expert must not be empty': not self.expert,
      f'length is {self.length}: it must be at least 1': self.length < 1,
      f'id is {self.id}: it must be at least 0': self.id < 0,
      f'window is {self.window}: it must be at least 0': self.window < 0,
      f"sees is '{self.sees}': it must be one of {', '.join(SEES)}": self.sees not in SEES,
      f"seen_by is '{self.seen_by}': it must be one of {', '.join(SEEN_BY)}": self.seen_by
      not in SEEN_BY,
      "sees='frame' and seen_by='frame' need a frame": framed and self.frame is None,
      # Tokens of a block see those stored after them, which an upper bound can't forbid.
      "seen_by='token' needs full=False": self.full and self.seen_by == 'token',
      'predicts needs full=False: tokens of a block see what they would predict': self.full
      and self.predicts,
    }
    for problem, applies in problems.items():
      if applies:
        raise ValueError(f"span '{self.name}': {problem}")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Spans in logical order.

  Attributes:
    spans: the spans; their names differ, and spans of one frame are neighbours.

  Raises:
    ValueError: a name occurs twice, or spans of one frame are not neighbours.
  """

  spans: tuple[Span, ...]

  def __post_init__(self) -> None:
    for name, count in collections.Counter(span.name for span in self.spans).items():
      if count > 1:
        raise ValueError(f"{count} spans have the name '{name}': give each its own")
    finished = set()
    for span, following in zip(self.spans, self.spans[1:]):
      if span.frame != following.frame:
        finished.add(span.frame)
        if following.frame is not None and following.frame in finished:
          raise ValueError(
            f"span '{following.name}' is not next to the other spans of frame "
            f'{following.frame!r}: spans of one frame must be neighbours'
          )

  def __contains__(self, name: str) -> bool:
    return any(span.name == name for span in self.spans)

  @property
  def experts(self) -> tuple[str, ...]:
    """The experts, in the order in which the spans first name them."""
    return tuple(dict.fromkeys(span.expert for span in self.spans))

  @property
  def conditions(self) -> frozenset[str]:
    """Names of the conditions that can be dropped."""
    return frozenset(span.condition for span in self.spans if span.condition)

  def place(self, name: str) -> tuple[int, int]:
    """First slot of a span in its expert's region, and the slot after its last.

    Raises:
      KeyError: the layout has no such span.
    """
    used: dict[str, int] = {}
    for span in self.spans:
      first = used.get(span.expert, 0)
      if span.name == name:
        return first, first + span.length
      used[span.expert] = first + span.length
    raise KeyError(f'no span {name!r} in {[span.name for span in self.spans]}')

  def region_length(self, expert: str, multiple: int = 1) -> int:
    """Slots of an expert's region: those of its spans, rounded up to `multiple`."""
    used = sum(span.length for span in self.spans if span.expert == expert)
    return -(-used // multiple) * multiple
