"""The masks that the five systems need.

The docstring of every builder shows the mask of its default sizes: rows are queries, columns are
keys, both in storage order. A new builder gets an entry in BUILDERS and in SIZED; tests of masks
and of all implementations of attention take their names from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vpe_jax.contracts import Region, Visibility, concatenate
from vpe_jax.sequence import layouts, packing
from vpe_jax.sequence.builder import NEVER, build
from vpe_jax.sequence.spans import Layout, Span

Mask = tuple[Visibility, Visibility]  # of queries and of keys
ABSENT = (0, 0, 0, 0)  # order, since, reach, until
_span = functools.partial(Span, expert='joint')


def _built(layout: Layout, **options: Any) -> Mask:
  """The mask of all regions of a layout, in storage order."""
  return _stored(build(layout, **({'keep': jnp.ones((1,), bool)} | options)))


def _stored(regions: Mapping[str, Region]) -> Mask:
  sequence = concatenate([region.visibility for region in regions.values()])
  return sequence, sequence


def causal(length: int = 4) -> Mask:
  """Text.

  1 0 0 0
  1 1 0 0
  1 1 1 0
  1 1 1 1
  """
  return _built(layouts.causal_text(length))


def prefix(seen: int = 2, rest: int = 2) -> Mask:
  """A bidirectional prefix, then text.

  1 1 0 0
  1 1 0 0
  1 1 1 0
  1 1 1 1
  """
  return _built(Layout((_span('image', seen, full=True), _span('text', rest))))


def transfusion(text: int = 2, image: int = 2, after: int = 1) -> Mask:
  """Text, a bidirectional image, text (VUGEN, Show-o2).

  1 0 0 0 0
  1 1 0 0 0
  1 1 1 1 0
  1 1 1 1 0
  1 1 1 1 1
  """
  spans = (_span('text', text), _span('image', image, full=True), _span('after', after))
  return _built(Layout(spans))


def mixture(text: int = 1, codes: int = 1, image: int = 1, multiple: int = 1) -> Mask:
  """A sequence with its condition and one whose condition is dropped, in two experts (VPE).

  Stored: bos, text, bot, codes, eot, boi | time, image. Batch element 0, then 1:

  1 0 0 0 0 0 0 0
  1 1 0 0 0 0 0 0
  1 1 1 0 0 0 0 0
  1 1 1 1 0 0 0 0
  1 1 1 1 1 0 0 0
  1 1 1 1 1 1 0 0
  1 1 1 1 1 1 1 1
  1 1 1 1 1 1 1 1

  1 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  1 0 0 0 0 1 0 0
  1 0 0 0 0 1 1 1
  1 0 0 0 0 1 1 1
  """
  prompt = [
    Span(name, length, 'ar', condition='prompt')
    for name, length in (('text', text), ('bot', 1), ('codes', codes), ('eot', 1))
  ]
  spans = [Span(name, length, 'dit', full=True) for name, length in (('time', 1), ('x', image))]
  layout = Layout((Span('bos', 1, 'ar'), *prompt, Span('boi', 1, 'ar'), *spans))
  return _built(layout, keep=jnp.array([True, False]), multiple=multiple)


def packed(samples: Sequence[tuple[int, int]] = ((1, 2), (2, 1))) -> Mask:
  """Samples of (text, image) in one sequence of one expert; `order` continues over samples.

  1 0 0 0 0 0
  1 1 1 0 0 0
  1 1 1 0 0 0
  0 0 0 1 0 0
  0 0 0 1 1 0
  0 0 0 1 1 1
  """
  return _packed(samples, ('joint', 'joint'), {'joint': sum(map(sum, samples))})


def packed_two(samples: Sequence[tuple[int, int]] = ((1, 2), (2, 1)), pad: int = 1) -> Mask:
  """The same samples in a sequence of two experts, each region padded: text . text | images .

  1 0 0 0 0 0 0 0
  0 1 0 0 0 0 0 0
  0 1 1 0 0 0 0 0
  0 0 0 0 0 0 0 0
  1 0 0 0 1 1 0 0
  1 0 0 0 1 1 0 0
  0 1 1 0 0 0 1 0
  0 0 0 0 0 0 0 0
  """
  text, image = map(sum, zip(*samples, strict=True))
  return _packed(samples, ('text', 'image'), {'text': text + pad, 'image': image + pad})


def _packed(
  samples: Sequence[tuple[int, int]], experts: tuple[str, str], budgets: Mapping[str, int]
) -> Mask:
  """The mask of one packed sequence of all samples, which are padded to the longest one first."""
  texts, images = np.array(samples).T
  text = Span('text', int(texts.max()), experts[0])
  image = Span('image', int(images.max()), experts[1], full=True)
  regions = build(Layout((text, image)), lengths={'text': texts, 'image': images})
  return _stored(packing.pack(regions, [range(len(samples))], budgets)[0])


def editing(reference: int = 2, text: int = 2, image: int = 2) -> Mask:
  """A bidirectional source image, text, and the image in another expert (VPE, App. D).

  1 1 0 0 0 0
  1 1 0 0 0 0
  1 1 1 0 0 0
  1 1 1 1 0 0
  1 1 1 1 1 1
  1 1 1 1 1 1
  """
  spans = (_span('source', reference, full=True), _span('text', text))
  return _built(Layout((*spans, Span('image', image, 'dit', full=True))))


def interleaved(frames: int = 2, text: int = 1, latents: int = 1) -> Mask:
  """Teacher forcing (MMCORE): each frame as text, noisy latents, clean latents.

  1 0 0 0 0 0
  1 1 0 0 0 0
  0 0 1 0 0 0
  0 0 0 1 0 0
  0 0 1 1 1 0
  0 0 1 0 0 1
  """
  return _built(layouts.teacher_forced_frames(frames, text, latents, 'joint', 'joint'))


def position_queries(text: int = 1, groups: int = 2, mates: int = 2) -> Mask:
  """Groups of parallel queries, each followed by its finished pairs of query and latent (VGT).

  1 0 0 0 0 0 0 0 0 0 0 0 0
  1 1 0 0 0 0 0 0 0 0 0 0 0
  1 0 1 0 0 0 0 0 0 0 0 0 0
  1 0 0 1 0 0 0 0 0 0 0 0 0
  1 0 0 1 1 0 0 0 0 0 0 0 0
  1 0 0 1 1 1 0 0 0 0 0 0 0
  1 0 0 1 1 1 1 0 0 0 0 0 0
  1 0 0 1 1 1 1 1 0 0 0 0 0
  1 0 0 1 1 1 1 0 1 0 0 0 0
  1 0 0 1 1 1 1 0 0 1 0 0 0
  1 0 0 1 1 1 1 0 0 1 1 0 0
  1 0 0 1 1 1 1 0 0 1 1 1 0
  1 0 0 1 1 1 1 0 0 1 1 1 1
  """
  return _built(layouts.position_queries(text, groups, mates))


def sliding(length: int = 4, width: int = 2) -> Mask:
  """Text that sees the last `width` tokens, itself included (Gemma's local layers).

  1 0 0 0
  1 1 0 0
  0 1 1 0
  0 0 1 1
  """
  return _built(Layout((_span('text', length, window=width),)))


def windows(count: int = 2, width: int = 2) -> Mask:
  """Bidirectional windows (Qwen2.5's image tower).

  1 1 0 0
  1 1 0 0
  0 0 1 1
  0 0 1 1
  """
  window = lambda n: _span(f'window{n}', width, full=True, frame=n, sees='frame')
  return _built(Layout(tuple(map(window, range(count)))))


def _sequence(tokens: Sequence[tuple[int, int, int, int]]) -> Mask:
  """A sequence of tokens with these (order, since, reach, until)."""
  sequence = Visibility(*(jnp.asarray(x, jnp.int32)[None] for x in np.array(tokens).T))
  return sequence, sequence


def scattered(length: int = 5) -> Mask:
  """Text with absent tokens in between, and a last token whose interval contains no key.

  1 0 0 0 0
  0 0 0 0 0
  1 0 1 0 0
  0 0 0 0 0
  0 0 0 0 0
  """
  tokens = [(n, 0, n + 1, NEVER) if n % 2 == 0 else ABSENT for n in range(length)]
  tokens[-1] = (length, length + 5, length + 9, 0)
  return _sequence(tokens)


def cached(known: int = 2, image: int = 2, free: int = 1) -> Mask:
  """An image's queries against a cache: a prefix, the image, and slots not yet written.

  1 1 1 1 0
  1 1 1 1 0
  """
  spans = (_span('prefix', known), _span('image', image, full=True), _span('free', free))
  key, _ = _built(Layout(spans))
  return key[:, known : known + image], key


BUILDERS: dict[str, Callable[..., Mask]] = {
  builder.__name__: builder
  for builder in (
    causal, prefix, transfusion, mixture, packed, packed_two, editing, interleaved,
    position_queries, sliding, windows, scattered, cached,
  )
}  # fmt: skip
# Sizes that fill several blocks; all but `cached` have at most LENGTH tokens.
LENGTH = 112
SIZED: dict[str, tuple] = {
  'causal': (112,),
  'prefix': (50, 62),
  'transfusion': (30, 60, 22),
  'mixture': (11, 40, 40, 16),
  'packed': (((10, 30), (5, 17), (30, 20)),),
  'packed_two': (((10, 26), (5, 17), (20, 20)), 7),
  'editing': (40, 20, 52),
  'interleaved': (3, 5, 16),
  'position_queries': (20, 3, 8),
  'sliding': (112, 20),
  'windows': (7, 16),
  'scattered': (101,),
  'cached': (60, 64, 20),
}
